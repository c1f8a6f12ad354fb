"""Affinities against plain loops over pixels."""

from typing import Any

import numpy as np
import pytest

from multisa.kernels import affinity_from_boundary, affinity_from_features, path_offsets, stencil_offsets

SIZES = [(1, 1), (1, 6), (7, 1), (5, 9), (11, 8)]


def pairs(height: int, width: int, radius: int) -> list[tuple[int, int, int, int, int]]:
    """List plane, y, x and the target of every in-grid pair."""
    return [
        (plane, y, x, y + dy, x + dx)
        for plane, (dy, dx) in enumerate(stencil_offsets(radius))
        for y in range(height)
        for x in range(width)
        if 0 <= y + dy < height and 0 <= x + dx < width
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [2, 5])
def test_features(size: tuple[int, int], radius: int) -> None:
    features = np.random.default_rng(1).normal(size=(3, *size)).astype(np.float32)
    expected = np.zeros((len(stencil_offsets(radius)), *size))
    for plane, y, x, v, u in pairs(*size, radius):
        expected[plane, y, x] = np.exp(-np.abs(features[:, y, x] - features[:, v, u]).mean())
    affinity = affinity_from_features(features, radius=radius)
    assert affinity.dtype == np.float32
    np.testing.assert_allclose(affinity, expected, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [2, 5])
def test_boundary(size: tuple[int, int], radius: int) -> None:
    boundary = np.random.default_rng(2).random(size, dtype=np.float32)
    expected = np.zeros((len(stencil_offsets(radius)), *size))
    for plane, y, x, v, u in pairs(*size, radius):
        path = path_offsets(v - y, u - x)
        expected[plane, y, x] = 1 - max(boundary[y + dy, x + dx] for dy, dx in path)
    affinity = affinity_from_boundary(boundary, radius=radius)
    assert affinity.dtype == np.float32
    np.testing.assert_allclose(affinity, expected, atol=1e-6)


def test_a_wall_cuts_exactly_the_pairs_across_it() -> None:
    boundary = np.zeros((9, 9), dtype=np.float32)
    boundary[:, 4] = 1
    affinity = affinity_from_boundary(boundary)
    values = {(plane, y, x): affinity[plane, y, x] for plane, y, x, _, _ in pairs(9, 9, 5)}
    apart = {(plane, y, x) for plane, y, x, _, u in pairs(9, 9, 5) if min(x, u) <= 4 <= max(x, u)}
    assert {key for key, value in values.items() if value == 0} == apart
    assert apart and len(apart) < len(values)


def test_batches_and_strided_input_equal_single_images() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(2, 6, 7, 4)).astype(np.float32).transpose(0, 3, 1, 2)
    boundary = rng.random((3, 12, 14), dtype=np.float32)[:, ::2, ::2]
    for index, image in enumerate(features):
        np.testing.assert_array_equal(affinity_from_features(features)[index], affinity_from_features(image))
    for index, one in enumerate(boundary):
        np.testing.assert_array_equal(affinity_from_boundary(boundary)[index], affinity_from_boundary(one))


@pytest.mark.parametrize(
    ("boundary", "error", "message"),
    [
        (np.zeros((4, 4)), TypeError, "got float64"),
        ([[0.0]], TypeError, "got list"),
        (np.zeros(4, np.float32), ValueError, r"got shape \[4\]"),
        (np.zeros((4, 0), np.float32), ValueError, r"got shape \[4, 0\]"),
        (np.full((4, 4), 1.5, np.float32), ValueError, "sigmoid"),
        (np.full((4, 4), np.nan, np.float32), ValueError, "nan"),
    ],
)
def test_bad_boundaries(boundary: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        affinity_from_boundary(boundary)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1, 4, 4), (0, 4, 4)])
def test_bad_feature_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features: got shape"):
        affinity_from_features(np.zeros(shape, np.float32))
