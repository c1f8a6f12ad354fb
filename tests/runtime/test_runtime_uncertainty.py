"""Uncertainty: bounded, worked by hand, higher where the mask is worse."""

import numpy as np
import pytest

from multisa.kernels import CrfParameters, joint_histogram
from multisa.runtime.bundle import LabelParameters
from multisa.runtime.predict.postprocess import pseudo_mask
from multisa.runtime.predict.uncertainty import (
    histogram_disagreement,
    label_disagreement,
    no_class_disagreement,
    uncertainty,
)


@pytest.mark.parametrize(
    ("confidence", "disagreement", "given", "found", "expected"),
    [
        (1.0, 0.0, (), ("dog",), 0.0),
        (0.8, 0.25, (), (), 0.4),
        (1.0, 0.0, ("cat", "dog"), ("dog", "horse"), 0.5),
        (0.9, 0.0, ("cat", "cat"), ("cat",), 0.1),
        (1.0, 0.0, ("cat",), (), 1.0),
        (0.0, 1.0, (), (), 1.0),
    ],
)
def test_uncertainty(
    confidence: float, disagreement: float, given: tuple[str, ...], found: tuple[str, ...], expected: float
) -> None:
    assert uncertainty(confidence, disagreement, given, found) == pytest.approx(expected)


@pytest.mark.parametrize(("confidence", "disagreement"), [(1.1, 0.0), (float("nan"), 0.0), (0.5, -0.1)])
def test_numbers_out_of_range_are_refused(confidence: float, disagreement: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        uncertainty(confidence, disagreement, (), ())


def segmenter_disagreement(mask: np.ndarray, confidence: np.ndarray) -> float:
    return histogram_disagreement(joint_histogram(mask, confidence))


def test_segmenter_counts_classes_alike_whatever_their_size() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[0, 0] = 5
    confidence = np.full((10, 10), 255, np.uint8)
    assert segmenter_disagreement(mask, confidence) == 0
    confidence[0, 0] = 204  # 0.8, sure: only the mean over the two classes falls
    assert segmenter_disagreement(mask, confidence) == pytest.approx(0.1)
    confidence[0, 0] = 153  # 0.6, just sure
    assert segmenter_disagreement(mask, confidence) == pytest.approx(0.2)
    confidence[0, 0] = 152
    assert segmenter_disagreement(mask, confidence) == pytest.approx(1 - (1 + 152 / 255) / 2 * 0.99)


def test_label_compares_before_and_after() -> None:
    before = np.zeros((4, 4), np.uint8)
    before[:2] = 1
    sure = np.full((4, 4), 230, np.uint8)
    assert label_disagreement(before, sure, before, 2) == 0
    after = before.copy()
    after[1] = 0  # class 1: 4 of 8 pixels kept, background: 8 of 12
    assert label_disagreement(before, sure, after, 2) == pytest.approx(1 - (4 / 8 + 8 / 12) / 2)
    sure[3] = 140  # a row that is unsure: 0.55
    assert label_disagreement(before, sure, after, 2) == pytest.approx(1 - (4 / 8 + 8 / 12) / 2 * 12 / 16)


def test_a_class_that_neither_finds_is_disagreement() -> None:
    mask, sure = np.zeros((3, 3), np.uint8), np.full((3, 3), 255, np.uint8)
    assert label_disagreement(mask, sure, mask, 2) == 0.5


def test_no_pixels_no_disagreement() -> None:
    empty = np.zeros((0, 0), np.uint8)
    assert segmenter_disagreement(empty, empty) == 0
    assert label_disagreement(empty, empty, empty, 1) == 0


@pytest.mark.parametrize("seed", range(20))
def test_bounded(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = (int(random.integers(1, 40)), int(random.integers(1, 40)))
    mask, sure = random.integers(0, 7, size, dtype=np.uint8), random.integers(0, 256, size, dtype=np.uint8)
    after = random.integers(0, 7, size, dtype=np.uint8)
    for value in (segmenter_disagreement(mask, sure), label_disagreement(mask, sure, after, 7)):
        assert 0 <= value <= 1
        assert 0 <= uncertainty(float(random.random()), value, "abc", "ab") <= 1


def test_pseudo_mask_says_how_far_the_crf_went() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    right, wrong = np.zeros((2, 1, 40, 40), np.float32)
    right[:, :, 20:] = 1
    wrong[:, :, 10:] = 1  # beyond the edge in the image
    parameters = LabelParameters(crf=CrfParameters())
    found = [pseudo_mask(image, scores, (1,), parameters).disagreement for scores in (right, wrong)]
    assert found[0] < 0.05 < found[1]
    assert pseudo_mask(image, right[:0], (), parameters).disagreement == 0


@pytest.mark.parametrize(
    ("scores", "expected"), [((0.1, 0.1), 0.5), ((0.0, 0.0), 0.0), ((-0.1, 0.0), 0.0), ((0.9, 0.0), 1.0)]
)
def test_where_no_class_is_present_the_closest_score_counts(scores: tuple[float, float], expected: float) -> None:
    named = dict(zip(("cat", "dog"), scores, strict=True))
    assert no_class_disagreement(named, {"cat": 0.4, "dog": 0.2}) == pytest.approx(expected)
    assert no_class_disagreement({}, {}) == 0
    assert no_class_disagreement({"cat": 0.0}, {"cat": 0.0}) == 1  # anything reaches such a threshold
