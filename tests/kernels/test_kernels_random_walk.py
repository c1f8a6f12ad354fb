"""The random walk against its float64 reference, and the reference against powers of the dense matrix."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisa.kernels import affinity_from_boundary, random_walk, random_walk_reference, stencil_offsets
from multisa.kernels.common.stencil import Boundary, edge_mask
from multisa.kernels.common.walk import CHEBYSHEV_TOLERANCE, chebyshev_coefficients, chebyshev_degree

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
SIZES = [(1, 1), (1, 9), (7, 1), (2, 3), (5, 4), (13, 17), (31, 32)]


def scene(channels: int, height: int, width: int, seed: int = 0) -> tuple[Float32, Float32]:
    """Make random scores and the affinity of a boundary map with both open areas and walls."""
    rng = np.random.default_rng(seed)
    boundary = rng.random((height, width), dtype=np.float32) ** 4
    return rng.random((channels, height, width), dtype=np.float32), affinity_from_boundary(boundary)


def dense_walk(scores: Float32, affinity: Float32, radius: int, beta: float, steps: int) -> Float64:
    """Form the transition matrix pixel by pixel and raise it to the power."""
    _, height, width = scores.shape
    matrix = np.eye(height * width)
    for plane, (dy, dx) in enumerate(stencil_offsets(radius)):
        for y in range(height - dy):
            for x in range(max(0, -dx), min(width, width - dx)):
                i, j = y * width + x, (y + dy) * width + x + dx
                matrix[i, j] = matrix[j, i] = float(affinity[plane, y, x]) ** beta
    transition = matrix / matrix.sum(axis=1, keepdims=True)
    power = np.linalg.matrix_power(transition, steps)
    walked: npt.NDArray[np.float64] = scores.reshape(len(scores), -1).astype(np.float64) @ power.T
    return walked.reshape(scores.shape)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 3), (7, 6)])
@pytest.mark.parametrize(("radius", "beta", "steps"), [(5, 8.0, 256), (2, 1.0, 7), (3, 10.0, 64)])
def test_reference_is_the_dense_matrix_power(size: tuple[int, int], radius: int, beta: float, steps: int) -> None:
    scores, _ = scene(2, *size)
    shape = (len(stencil_offsets(radius)), *size)
    affinity = np.random.default_rng(4).random(shape, dtype=np.float32)  # entries outside the grid are not 0
    reference = random_walk_reference(scores, affinity, radius=radius, beta=beta, steps=steps)
    assert reference.dtype == np.float64
    np.testing.assert_allclose(reference, dense_walk(scores, affinity, radius, beta, steps), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("boundary", ["full", "psa"])
@pytest.mark.parametrize("exact", [False, True])
def test_kernel_is_the_reference(size: tuple[int, int], boundary: Boundary, exact: bool) -> None:
    scores, affinity = scene(3, *size)
    reference = random_walk_reference(scores, affinity, boundary=boundary)
    walked = random_walk(scores, affinity, boundary=boundary, exact=exact)
    assert walked.dtype == np.float32 and walked.shape == scores.shape
    assert np.abs(walked - reference).max() < 5e-5
    has_edges = edge_mask(5, size, boundary).any()
    assert (np.abs(reference - scores).max() > 0.05) == has_edges  # the input is meaningful


@pytest.mark.parametrize("radius", [1, 2, 3, 7, 11, 16])
@pytest.mark.parametrize("size", [(50, 1), (64, 1), (100, 2), (1, 130), (3, 3), (19, 40)])
@pytest.mark.parametrize("steps", [4, pytest.param(256, marks=pytest.mark.slow)])
def test_every_radius_on_every_shape(size: tuple[int, int], radius: int, steps: int) -> None:
    rng = np.random.default_rng(7)
    scores = rng.random((5, *size), dtype=np.float32)
    affinity = rng.random((len(stencil_offsets(radius)), *size), dtype=np.float32)
    reference = random_walk_reference(scores, affinity, radius=radius, steps=steps)
    assert np.abs(random_walk(scores, affinity, radius=radius, steps=steps) - reference).max() < 1e-4


def test_permuted_channels_give_permuted_maps() -> None:
    scores, affinity = scene(9, 14, 19)
    order = [8, 0, 3, 1, 7, 2, 6, 5, 4]
    walked = random_walk(scores, affinity)
    np.testing.assert_allclose(random_walk(scores[order], affinity), walked[order], atol=2e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_constant_between_walls_stays(exact: bool) -> None:
    # Two values, so that keeping the result within the range of the input cannot do it.
    boundary = np.random.default_rng(8).random((20, 31), dtype=np.float32) * np.float32(0.9)
    boundary[:, 15] = 1
    scores = np.full((1, 20, 31), 0.25, np.float32)
    scores[..., 16:] = 0.75
    walked = random_walk(scores, affinity_from_boundary(boundary), exact=exact)
    np.testing.assert_allclose(walked[..., :15], 0.25, atol=3e-5)
    np.testing.assert_allclose(walked[..., 16:], 0.75, atol=3e-5)


def test_out_that_overlaps_the_scores() -> None:
    _, affinity = scene(1, 9, 11)
    memory = np.random.default_rng(9).random((10, 9, 11), dtype=np.float32)
    expected = random_walk(memory[:9].copy(), affinity)
    np.testing.assert_array_equal(random_walk(memory[:9], affinity, out=memory[1:]), expected)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ([1], TypeError, "out: got list"),
        (np.zeros((3, 2, 9, 11), np.float32), ValueError, r"out: got float32 \[3, 2, 9, 11\]"),
        (np.zeros((2, 9, 11)), ValueError, "out: got float64"),
        (np.broadcast_to(np.float32(0), (2, 9, 11)), ValueError, "out: got a read-only array"),
    ],
)
def test_out_that_cannot_be(out: Any, error: type[Exception], message: str) -> None:
    scores, affinity = scene(2, 9, 11)
    with pytest.raises(error, match=message):
        random_walk(scores, affinity, out=out)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 19, 20, 33, 64, 1000])
@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_lengths_of_walk(steps: int, beta: float) -> None:
    scores, affinity = scene(2, 12, 11)
    reference = random_walk_reference(scores, affinity, steps=steps, beta=beta)
    assert np.abs(random_walk(scores, affinity, steps=steps, beta=beta) - reference).max() < 1e-4


def test_hardly_connected_and_fully_connected_grids() -> None:
    scores, _ = scene(2, 20, 21)
    for value in (0.0, 1e-4, 0.3, 1.0):
        affinity = np.full((34, 20, 21), value, dtype=np.float32)
        reference = random_walk_reference(scores, affinity)
        assert np.abs(random_walk(scores, affinity) - reference).max() < 1e-4


def test_a_wall_is_not_crossed() -> None:
    boundary = np.zeros((10, 15), dtype=np.float32)
    boundary[:, 7] = 1
    scores = np.zeros((1, 10, 15), dtype=np.float32)
    scores[0, 5, 3] = 1
    walked = random_walk(scores, affinity_from_boundary(boundary))[0]
    assert (walked[:, :7] > 0.005).all()
    assert (walked[:, 7:] == 0).all()


@pytest.mark.parametrize("boundary", ["full", "psa"])
def test_boundaries_differ_only_where_they_should(boundary: Boundary) -> None:
    scores, affinity = scene(1, 16, 18)
    walked = random_walk(scores, affinity, boundary=boundary)
    unmoved = np.isclose(walked, scores, atol=1e-6)[0]
    assert unmoved[-1, 0] == unmoved[-1, -1] == (boundary == "psa")  # isolated corners of psa


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 300),
    st.floats(0.25, 12),
    st.integers(0, 2**16),
)
def test_an_average_stays_in_range(channels: int, height: int, width: int, steps: int, beta: float, seed: int) -> None:
    scores, affinity = scene(channels, height, width, seed)
    walked = random_walk(scores, affinity, steps=steps, beta=beta)
    assert (walked.max(axis=(1, 2)) <= scores.max(axis=(1, 2))).all()
    assert (walked.min(axis=(1, 2)) >= scores.min(axis=(1, 2))).all()
    constant = np.full_like(scores, 0.7)
    np.testing.assert_array_equal(random_walk(constant, affinity, steps=steps, beta=beta), constant)


def test_constants_stay_without_the_help_of_the_range() -> None:
    scores, affinity = scene(1, 21, 19)
    scores[:] = 0.7
    scores[0, 0, 0], scores[0, 20, 18] = -5, 5  # far from the middle, so clipping cannot hide an error
    middle = random_walk(scores, affinity, steps=64)
    assert np.abs(middle - random_walk_reference(scores, affinity, steps=64)).max() < 5e-4


def test_batches_strided_input_and_out() -> None:
    images = [scene(2, 9, 8, seed) for seed in range(3)]
    scores = np.stack([one for one, _ in images])
    affinity = np.stack([one for _, one in images])
    single = np.stack([random_walk(*image) for image in images])
    assert not np.array_equal(single[0], single[1])
    np.testing.assert_array_equal(random_walk(scores, affinity), single)
    strided = np.asfortranarray(scores), np.repeat(affinity, 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(random_walk(*strided), single)
    np.testing.assert_array_equal(random_walk_reference(*strided), random_walk_reference(scores, affinity))
    out = np.full((3, 9, 8, 2), np.nan, dtype=np.float32).transpose(0, 3, 1, 2)
    assert random_walk(scores, affinity, out=out) is out
    np.testing.assert_array_equal(out, single)
    np.testing.assert_array_equal(random_walk(scores, affinity), random_walk(scores, affinity))


def test_no_channels_and_no_neighbours() -> None:
    scores, affinity = scene(2, 6, 5)
    assert random_walk(scores[:0], affinity).shape == (0, 6, 5)
    np.testing.assert_allclose(random_walk(scores, affinity[:0], radius=1), scores, rtol=1e-6)


def test_chebyshev_series() -> None:
    assert chebyshev_degree(256) == 72
    assert chebyshev_degree(7) == 7
    x = np.linspace(-1, 1, 501)
    for steps in (7, 64, 255, 256, 4096):
        degree = chebyshev_degree(steps)
        series = np.polynomial.chebyshev.chebval(x, chebyshev_coefficients(steps, degree))
        assert np.abs(series - x**steps).max() < 2 * CHEBYSHEV_TOLERANCE
        assert series[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": np.zeros((1, 4, 4))}, TypeError, "scores: got float64"),
        ({"scores": [[[0.0]]]}, TypeError, "scores: got list"),
        ({"scores": np.zeros((4, 4), np.float32)}, ValueError, r"scores: got shape \[4, 4\]"),
        ({"scores": np.zeros((1, 4, 0), np.float32)}, ValueError, "h, w >= 1"),
        ({"scores": np.zeros((1, 5, 4), np.float32)}, ValueError, "resize the scores"),
        ({"scores": np.full((1, 4, 4), np.nan, np.float32)}, ValueError, "scores: got NaN"),
        ({"affinity": np.zeros((34, 4, 4))}, TypeError, "affinity: got float64"),
        ({"affinity": np.zeros((12, 4, 4), np.float32)}, ValueError, r"expected \[34, 4, 4\]"),
        ({"affinity": np.full((34, 4, 4), 1.1, np.float32)}, ValueError, "affinity: got values"),
        ({"affinity": np.full((34, 4, 4), np.nan, np.float32)}, ValueError, "without NaN"),
        ({"radius": 0}, ValueError, "radius: got 0"),
        ({"beta": 0.0}, ValueError, "beta: got 0"),
        ({"beta": float("inf")}, ValueError, "beta: got inf"),
        ({"beta": 1e39}, ValueError, "beta: got 1e\\+39"),
        ({"steps": 2**63}, ValueError, "steps: got 9223372036854775808"),
        ({"steps": -1}, ValueError, "steps: got -1"),
        ({"steps": 2.0}, TypeError, "steps: got float"),
        ({"boundary": "wrap"}, ValueError, "full, psa"),
    ],
)
@pytest.mark.parametrize("walk", [random_walk, random_walk_reference])
def test_bad_arguments(walk: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"scores": np.zeros((1, 4, 4), np.float32), "affinity": np.zeros((34, 4, 4), np.float32)}
    with pytest.raises(error, match=message):
        walk(**(arguments | change))


@pytest.mark.parametrize("out", [np.empty((1, 4, 5), np.float32), np.empty((1, 4, 4))])
def test_bad_out(out: Any) -> None:
    scores, affinity = scene(1, 4, 4)
    with pytest.raises(ValueError, match="out: got"):
        random_walk(scores, affinity, out=out)
