"""Balancing background and foreground in a trained segmenter."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.imaging.png import voc_palette
from multisa.training.balance import background_ratio, balance_segmenter
from multisa.training.config import load_config
from multisa.training.data import Item, read_dataset
from multisa.training.inference import save_maps
from multisa.training.loop import CHECKPOINT, save_checkpoint
from multisa.training.models import create_model
from multisa.training.stage_cache import Stage
from multisa.training.stage_functions import SegmenterTraining

TINY = Path(__file__).with_name("tiny.toml")


def masks_in(folder: Path, *masks: list[list[int]]) -> SegmenterTraining:
    items = []
    for number, mask in enumerate(masks):
        write_mask(folder / f"{number}.png", np.array(mask, np.uint8), voc_palette())
        items.append(Item(str(number), folder / f"{number}.jpg", (1,), folder / f"{number}.png"))
    return SegmenterTraining("segmenter", tuple(items), None, masks=folder)


def test_pixels_of_all_masks_count_but_those_to_ignore(tmp_path: Path) -> None:
    training = masks_in(tmp_path, [[0, 0, 0, 2, 255]], [[0, 0, 0, 1, 1]])
    assert background_ratio(training) == 6 / 3
    assert background_ratio(replace(training, masks=None, truth=True)) == 6 / 3


def test_soft_targets_count_by_their_probability(tmp_path: Path) -> None:
    for name, background in (("0", 0.75), ("1", 0.5)):
        share = np.full((1, 4, 4), background, np.float32)
        save_maps(tmp_path / f"{name}.npy", np.concatenate([share, 1 - share]))
    items = tuple(Item(name, tmp_path / f"{name}.jpg", (2,), None) for name in ("0", "1"))
    training = SegmenterTraining("segmenter", items, None, probabilities=tmp_path)
    assert background_ratio(training) == pytest.approx(1.25 / 0.75)


@pytest.mark.parametrize("only", [0, 1, 255])
def test_labels_of_one_kind_weigh_nothing(only: int, tmp_path: Path) -> None:
    assert background_ratio(masks_in(tmp_path, [[only, only]])) == 1


def test_only_the_background_gets_less_likely(tmp_path: Path, voc_folder: Path) -> None:
    dataset, segmenter = read_dataset(voc_folder), load_config(str(TINY)).segmenter
    torch.manual_seed(0)
    network = create_model(segmenter, len(dataset.class_names)).eval()
    trained = Stage("segmenter", tmp_path / "trained", "", {"losses": [1.5]})
    trained.folder.mkdir()
    save_checkpoint(trained.folder / CHECKPOINT, network, None, {"losses": [1.5]})
    training = masks_in(tmp_path, [[0, 0, 0, 1]])
    output = tmp_path / "balanced"
    output.mkdir()
    assert balance_segmenter(segmenter, training, dataset, trained, output) == {"losses": [1.5], "background_ratio": 3}
    balanced = create_model(segmenter, len(dataset.class_names), checkpoint=output / CHECKPOINT).eval()
    image = network.backbone.normalise(torch.randint(0, 256, (1, 65, 80, 3), dtype=torch.uint8))
    with torch.inference_mode():
        before, after = network(image), balanced(image)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
    torch.testing.assert_close(after[:, 0], before[:, 0] - math.log(3))
