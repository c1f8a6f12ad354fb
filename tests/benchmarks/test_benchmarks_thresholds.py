"""The regret of thresholds without ground truth, on images whose best thresholds are known."""

import numpy as np
import pytest

from multisa.benchmarks.thresholds import Image, measure, subsets


def image(class_id: int, high: float, low: float, object_score: float) -> Image:
    """Half of the image shows the object, whose pixels have scores of `object_score` or `high`."""
    maps = np.full((1, 20, 40), low, np.float32)
    maps[0, :, :20] = high
    maps[0, :, 10:20] = object_score
    truth = np.zeros((20, 40), np.uint8)
    truth[:, :20] = class_id
    return Image(maps, np.array([class_id]), truth[::2, ::2])


def test_scores_between_two_separate_groups_have_no_regret() -> None:
    row = measure([image(1, 0.8, 0.1, 0.8), image(2, 0.8, 0.1, 0.8)])
    assert row["miou"] == row["best_miou"] == row["best_miou_with_gains"] == 100
    assert row["regret"] == row["regret_with_gains"] == 0 and 0.1 < row["background"] < 0.8


def test_gains_help_where_the_classes_have_other_scores() -> None:
    found = [image(1, 0.9, 0.45, 0.8), image(2, 0.4, 0.1, 0.3)] * 3
    row = measure(found)
    assert row["best_miou"] < 90 < row["miou"]
    assert row["gains"][0] <= 1 < row["gains"][1]
    assert row["regret"] == pytest.approx(row["best_miou"] - row["miou"], abs=0.011)


def test_images_without_masks_count_for_the_choice_only() -> None:
    with_mask, other = image(1, 0.8, 0.1, 0.8), image(1, 0.8, 0.1, 0.8)
    row = measure([with_mask, Image(other.maps, other.class_ids, None)])
    assert row["images"] == 1


def test_subsets_are_all_classes_halves_and_pairs() -> None:
    assert list(subsets(["a", "b"])) == [("a", "b")]
    found = list(subsets(list("abcdef")))
    assert found == [tuple("abcdef"), tuple("ace"), tuple("bdf"), ("a", "b"), ("c", "d"), ("e", "f")]
