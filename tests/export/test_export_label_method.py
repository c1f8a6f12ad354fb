"""The choice of the label method: what a good region is, and when the walk is chosen."""

import numpy as np
import numpy.typing as npt
import pytest

from multisa.export.bundle import parameters_of_run
from multisa.export.label_method import MethodEvidence, region_scores
from multisa.runtime.imaging.decode import UInt8
from tests.export.test_export_model_card import record

OBJECT = (slice(20, 60), slice(30, 80))


def image_of_an_object() -> UInt8:
    """Noise of sharp contrast on flat grey, so that nothing of it survives the blur."""
    image = np.full((96, 128, 3), 128, np.uint8)
    image[OBJECT] = np.random.default_rng(0).choice([0, 255], (40, 50, 1)).astype(np.uint8)
    return image


def classify(image: UInt8) -> npt.NDArray[np.float32]:
    """Class 2 is present as far as its sharp pixels are there; class 1 never is."""
    contrast = np.abs(image[OBJECT].astype(np.float32) - 128).mean() / 128
    return np.array([0, contrast], np.float32)


def mask_with(rows: slice, columns: slice) -> UInt8:
    mask = np.zeros((96, 128), np.uint8)
    mask[rows, columns] = 2
    return mask


def test_the_objects_own_region_scores_highest() -> None:
    image = image_of_an_object()

    def score(rows: slice, columns: slice) -> float:
        return region_scores(image, mask_with(rows, columns), (2,), classify)[0]

    exact = score(*OBJECT)
    assert exact > 0.6
    assert exact > score(slice(10, 70), slice(20, 90)) > score(slice(0, 96), slice(0, 128))  # too large
    assert exact > score(slice(30, 50), slice(40, 70))  # a part of it
    assert exact > score(slice(20, 60), slice(60, 110))  # beside it


def test_a_class_without_a_region_scores_nothing_and_every_class_counts() -> None:
    image = image_of_an_object()
    first, second = region_scores(image, mask_with(*OBJECT), (1, 2), classify)
    assert first == 0 and second > 0.6
    assert region_scores(image, mask_with(*OBJECT), (), classify) == []


@pytest.mark.parametrize(
    ("segmenter", "walk", "best"),
    [
        (0.2, 0.1, "segmenter"),
        (0.1, 0.2, "walk"),
        (0.1, 0.11, "segmenter"),
        (0.1, 0.13, "segmenter"),
        (0.1, 0.15, "walk"),
    ],
)
def test_the_walk_has_to_be_ahead_by_two_standard_errors(segmenter: float, walk: float, best: str) -> None:
    evidence = MethodEvidence({"segmenter": segmenter, "walk": walk}, 0.02, regions=170, images=128)
    assert evidence.chosen == best
    run = record()
    assert parameters_of_run(run, evidence).label_method == best
    assert evidence.as_json()["chosen"] == best
