"""What counts as an edge on the grid, and a whole measurement on a small data set."""

from pathlib import Path

import numpy as np
import pytest

from multisa.benchmarks.full_size import LABELS, OURS, cells, changes_on_grid, measure, nearest
from multisa.runtime.demo import IMAGES
from multisa.runtime.predict.segmenter import Segmenter
from multisa.training.annotations.base import MaskFile
from multisa.training.data import Item


def test_enlarged_labels_have_all_edges_on_the_grid_and_others_have_not() -> None:
    small = np.random.default_rng(0).integers(0, 3, (48, 64)).astype(np.uint8)
    large = nearest(small, (375, 500))
    on, every = changes_on_grid(large, (48, 64))
    assert on == every > 1000
    shifted = np.roll(large, 3, (0, 1))
    on, every = changes_on_grid(shifted, (48, 64))
    assert on < 0.3 * every


def test_pixels_lie_in_cells_of_equal_size() -> None:
    assert cells(12, 3).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.bincount(cells(500, 64)).tolist() == pytest.approx([500 / 64] * 64, abs=1)


def test_random_edges_are_on_the_grid_by_chance() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (400, 400)).astype(np.uint8)
    on, every = changes_on_grid(mask, (50, 50))
    assert on / every == pytest.approx(50 / 400, rel=0.1)


def test_a_mask_from_probabilities_does_not_follow_the_grid(tmp_path: Path) -> None:
    photo = IMAGES / "chelsea.jpg"
    with Segmenter() as segment:
        segment(photo).save(tmp_path / "mask.png")  # as the ground truth
        row = measure(segment, [Item("photo", photo, (), MaskFile(tmp_path / "mask.png"))], factor=4)
    assert row["miou"]["own size"] == 100 and row["miou"][OURS] > 90
    assert row["changes_on_grid"][LABELS] == 1 and row["changes_on_grid"][OURS] < 0.5
    assert 0 < row["enlarge_ms"]["median"] <= row["enlarge_ms"]["max"]
