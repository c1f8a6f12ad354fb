"""Maps to labels on the CPU: Pillow's filter, NumPy's argmax, and what is refused."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.kernels import argmax_labels, resize_maps, scores_to_probabilities
from multisa.kernels.label_maps import bilinear_taps, confidence_levels


def maps(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (9, 4)),
        ((94, 125), (375, 500)),
        ((47, 61), (94, 125)),
        ((64, 80), (13, 17)),
        ((7, 100), (50, 11)),
        ((2, 3), (2, 3)),
        ((3, 3001), (4, 1000)),
    ],
)
def test_resize_equals_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    given = maps(2, *source)
    got = resize_maps(given, target)
    assert got.dtype == np.float32 and got.shape == (2, *target)
    for one, there in zip(given, got, strict=True):
        expected = Image.fromarray(one).resize(target[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(there, np.asarray(expected), rtol=0, atol=3e-7)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (30_000, 7_500), (7, 30_000), (5, 5), (9, 8)])
def test_taps_stay_inside_and_sum_to_one(inputs: int, outputs: int) -> None:
    taps = bilinear_taps(inputs, outputs)
    assert taps.first.min() == 0 and (taps.count >= 1).all()
    assert (taps.first + taps.count).max() == inputs
    np.testing.assert_allclose(taps.weights.sum(axis=1), 1, atol=1e-6)


def test_probabilities() -> None:
    """The formula on maps that are not resized; the peak is one for all classes."""
    given = maps(2, 6, 5)
    got = scores_to_probabilities(given, (6, 5), background=0.3, gains=(2, 0.5), to_peak=True)
    weighed = np.stack([np.full((6, 5), 0.3), 2 * given[0] / given.max(), given[1] / given.max() / 2])
    np.testing.assert_allclose(got, weighed / weighed.sum(axis=0), atol=1e-6)
    nothing = scores_to_probabilities(np.zeros_like(given), (3, 3), background=0.3, to_peak=True)
    np.testing.assert_array_equal(nothing, np.stack([np.ones((3, 3)), *np.zeros((2, 3, 3))]))


def test_argmax_takes_the_first_of_equals() -> None:
    probabilities = np.array([[[0.25, 0.5, 0.2]], [[0.5, 0.5, 0.2]], [[0.25, 0.0, 0.6]]], np.float32)
    mask, confidence = argmax_labels(probabilities, (0, 4, 9))
    assert mask.tolist() == [[4, 0, 9]] and confidence.tolist() == [[128, 128, 153]]
    assert confidence_levels(np.array([-1, 0, 1, 2], np.float32)).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resize_maps(maps(2, 3, 4).astype(np.float64), (1, 1)), TypeError, "got float64"),
        (lambda: resize_maps(maps(3, 4), (1, 1)), ValueError, r"got shape \[3, 4\]"),
        (lambda: resize_maps(maps(1, 3, 4), (0, 1)), ValueError, "outputs: got 0"),
        (lambda: resize_maps(maps(1, 3, 4), (1, 1), backend="gpu"), ValueError, "backend: got 'gpu'"),  # type: ignore
        (lambda: scores_to_probabilities(maps(1, 3, 4), (1, 1), background=0), ValueError, "background: got"),
        (
            lambda: scores_to_probabilities(maps(1, 3, 4), (1, 1), background=1, gains=(1, 2)),
            ValueError,
            "gains: got",
        ),
        (lambda: argmax_labels(maps(2, 3, 4), (0, 256)), ValueError, r"ids: got \[0, 256\]"),
        (lambda: argmax_labels(maps(2, 3, 4), (0,)), ValueError, "expected 2 class ids"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
