"""How much more frequent than the foreground the background is among the labels of a segmenter."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.imaging.png import voc_palette
from multisa.training.balance import background_ratio
from multisa.training.data import Item
from multisa.training.inference import save_maps


def items(folder: Path, count: int) -> tuple[Item, ...]:
    return tuple(Item(str(number), folder / f"{number}.jpg", (1,), None) for number in range(count))


def write_masks(folder: Path, *masks: list[list[int]]) -> tuple[Item, ...]:
    for number, mask in enumerate(masks):
        write_mask(folder / f"{number}.png", np.array(mask, np.uint8), voc_palette())
    return items(folder, len(masks))


def test_pixels_of_all_masks_count_but_those_to_ignore(tmp_path: Path) -> None:
    written = write_masks(tmp_path, [[0, 0, 0, 2, 255]], [[0, 0, 0, 1, 1]])
    assert background_ratio(tmp_path, written, soft=False) == 6 / 3
    assert background_ratio(tmp_path, written[1:], soft=False) == 3 / 2


def test_soft_targets_count_by_their_probability(tmp_path: Path) -> None:
    for name, background in (("0", 0.75), ("1", 0.5)):
        share = np.full((1, 4, 4), background, np.float32)
        save_maps(tmp_path / f"{name}.npy", np.concatenate([share, 1 - share]))
    assert background_ratio(tmp_path, items(tmp_path, 2), soft=True) == pytest.approx(1.25 / 0.75)


def test_images_without_a_class_do_not_count(tmp_path: Path) -> None:
    one, empty = write_masks(tmp_path, [[0, 0, 1]], [[0, 0, 0]])
    assert background_ratio(tmp_path, (one, replace(empty, classes=())), soft=False) == 2


@pytest.mark.parametrize("only", [0, 1, 255])
def test_labels_of_one_kind_weigh_nothing(only: int, tmp_path: Path) -> None:
    assert background_ratio(tmp_path, write_masks(tmp_path, [[only, only]]), soft=False) == 1
