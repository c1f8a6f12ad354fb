"""The random walk that spreads class scores along affinities, without ever forming the transition matrix.

    walked = random_walk(cam, affinity)              # [C, h, w] scores, [34, h, w] affinities

The walk is (D^-1 A^beta)^steps applied to each channel (Ahn & Kwak 2018, equations 4 and 5), D being the row
sums. With the symmetric S = D^-1/2 A^beta D^-1/2 it is D^-1/2 S^steps D^1/2, and S^steps is well approximated
by its Chebyshev series of degree about sqrt(steps) (Sachdeva & Vishnoi 2014, theorem 3.3): 72 products for
256 steps.
"""

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy.sparse import dia_array

from multisa.kernels.stencil import Boundary, check_integer, edge_mask, stencil_offsets

Float32 = npt.NDArray[np.float32]

# Bound of the truncated Chebyshev tail, relative to the range of the scores; float32 sums err by 1e-5.
CHEBYSHEV_TOLERANCE = 1e-4

# Edges below this count as none: far under the resolution of a float32 sum with the self-loop of 1, and their
# products would be denormal numbers, which processors multiply a hundred times slower.
NEGLIGIBLE_EDGE = np.float32(1e-20)


def random_walk(
    scores: Float32,
    affinity: Float32,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    exact: bool = False,
    boundary: Boundary = "full",
    out: Float32 | None = None,
) -> Float32:
    """Average the scores along the affinities: (D^-1 A^beta)^steps on each channel, self-loops of weight 1.

    scores: float32 [C, h, w] or [N, C, h, w], finite; affinity: float32 [P, h, w] or [N, P, h, w] in [0, 1],
    the half stencil `stencil_offsets(radius)`; entries whose target lies outside the grid are ignored.
    Returns float32 of the scores' shape (in `out` when given), within each channel's [min, max]; a constant
    stays. beta > 0 is the elementwise power of A, steps >= 0 the length of the walk. exact=True takes every
    step instead of the Chebyshev series (tail below CHEBYSHEV_TOLERANCE). boundary="psa" drops pairs near the
    left, right and bottom border as psa does. Raises TypeError for another dtype, ValueError for another
    shape or value.
    """
    check_walk_arguments(scores, affinity, radius=radius, beta=beta, steps=steps)
    result = _check_out(out, scores)
    mask = edge_mask(radius, (scores.shape[-2], scores.shape[-1]), boundary)
    if scores.ndim == 3:
        result[...] = _walk_one(scores, affinity, mask, radius, beta, steps, exact)
        return result
    for index, (image_scores, image_affinity) in enumerate(zip(scores, affinity, strict=True)):
        result[index] = _walk_one(image_scores, image_affinity, mask, radius, beta, steps, exact)
    return result


def _walk_one(
    scores: Float32,
    affinity: Float32,
    mask: npt.NDArray[np.bool_],
    radius: int,
    beta: float,
    steps: int,
    exact: bool,
) -> Float32:
    """Walk one image: scores [C, h, w], affinity and mask [P, h, w] -> float32 [C, h, w]."""
    channels = scores.shape[0]
    weights = np.where(mask, affinity, np.float32(0)) ** np.float32(beta)
    weights[weights < NEGLIGIBLE_EDGE] = 0
    matrix, degree_root = _symmetric_transition(weights, radius)
    degree = steps if exact else chebyshev_degree(steps)
    walked = np.empty((channels, degree_root.size), dtype=np.float32)
    # Channels never mix: one at a time keeps the states in the first-level cache.
    for row, start in zip(walked, scores.reshape(channels, degree_root.size), strict=True):
        state = start * degree_root
        if degree >= steps:
            for _ in range(steps):
                state = matrix @ state
        else:
            state = _chebyshev_power(matrix, state, chebyshev_coefficients(steps, degree))
        # An average never leaves the range of its input; this removes the last 1e-5 of error.
        np.clip(state / degree_root, start.min(), start.max(), out=row)
    return walked.reshape(scores.shape)


def _symmetric_transition(weights: Float32, radius: int) -> tuple["dia_array[np.float32]", Float32]:
    """Build S = D^-1/2 W D^-1/2 from the half planes [P, h, w]; return it and D^1/2 as float32 [h * w].

    In row-major order each offset is one diagonal of S, so the diagonal format needs no column index and its
    product runs over contiguous memory.
    """
    height, width = weights.shape[-2:]
    size = height * width
    planes: dict[int, Float32] = {}
    for (dy, dx), plane in zip(stencil_offsets(radius), weights.reshape(-1, size), strict=True):
        if dy < height and abs(dx) < width:
            # On a narrow grid two offsets can share a diagonal; a pixel has at most one of the two pairs.
            shift = dy * width + dx
            planes[shift] = planes[shift] + plane if shift in planes else plane
    # float64 up to the rounded entries of S: an error in D would be repeated in every step.
    degree = np.zeros(size, dtype=np.float64)
    for shift, plane in planes.items():
        degree += plane
        degree[shift:] += plane[: size - shift]
    degree += 1
    inverse_root = 1 / np.sqrt(degree)
    data = np.zeros((2 * len(planes) + 1, size), dtype=np.float32)
    for index, (shift, plane) in enumerate(planes.items()):
        edges = plane[: size - shift] * inverse_root[: size - shift] * inverse_root[shift:]
        data[2 * index, shift:] = edges
        data[2 * index + 1, : size - shift] = edges
    # The product adds diagonals in this order. The self-loop comes last: it is near 1 where all neighbours
    # are tiny, and a sum that starts with it would lose them one by one (1.3e-4 instead of 1.3e-5 after 256
    # steps).
    data[-1] = inverse_root * inverse_root
    shifts = [signed for shift in planes for signed in (shift, -shift)]
    return dia_array((data, np.array([*shifts, 0])), shape=(size, size)), np.sqrt(degree).astype(np.float32)


def _chebyshev_power(matrix: "dia_array[np.float32]", state: Float32, coefficients: list[float]) -> Float32:
    """Sum c_k T_k(S) x by the recurrence T_k+1 = 2 S T_k - T_k-1; at least two coefficients."""
    previous, current = state, matrix @ state
    total = np.float32(coefficients[0]) * previous + np.float32(coefficients[1]) * current
    for coefficient in coefficients[2:]:
        following = matrix @ current
        following *= 2
        following -= previous
        previous, current = current, following
        if coefficient:
            total += np.float32(coefficient) * current
    return total


def chebyshev_degree(steps: int) -> int:
    """Return the least degree whose tail bound 2 exp(-degree^2 / (2 steps)) is below CHEBYSHEV_TOLERANCE.

    72 for 256 steps; never more than `steps`, where the series is exact.
    """
    degree = math.ceil(math.sqrt(2 * steps * math.log(2 / CHEBYSHEV_TOLERANCE)))
    return min(degree - (degree - steps) % 2, steps)  # coefficients of the other parity vanish


@functools.lru_cache(maxsize=16)
def chebyshev_coefficients(steps: int, degree: int) -> list[float]:
    """Expand x^steps on [-1, 1] in Chebyshev polynomials up to `degree`, divided so that they sum to one.

    c_k = 2^(1-steps) binomial(steps, (steps - k) / 2), halved for k = 0, zero where steps - k is odd. The sum
    is the value at 1, the eigenvalue of a constant: with sum one a constant map stays as it is.
    """
    series = [0.0] * (degree + 1)
    first = steps % 2
    series[first] = 1.0
    for k in range(first, degree - 1, 2):
        series[k + 2] = series[k] * (steps - k) / (steps + k + 2)  # ratio of neighbouring binomials
    series[0] /= 2
    total = math.fsum(series)
    return [coefficient / total for coefficient in series]


def check_walk_arguments(scores: Float32, affinity: Float32, *, radius: int, beta: float, steps: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless a walk is defined on these arguments."""
    for name, array in (("scores", scores), ("affinity", affinity)):
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{name}: got {got}, expected a float32 array; use .astype(numpy.float32)")
    check_integer("steps", steps, minimum=0)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: got {beta}, expected a finite number above 0")
    if scores.ndim not in (3, 4) or 0 in scores.shape[-2:]:
        raise ValueError(
            f"scores: got shape {list(scores.shape)}, expected [C, h, w] or [N, C, h, w], h, w >= 1"
        )
    expected = (*scores.shape[:-3], len(stencil_offsets(radius)), *scores.shape[-2:])
    if affinity.shape != expected:
        raise ValueError(
            f"affinity: got shape {list(affinity.shape)}, expected {list(expected)} for scores "
            f"{list(scores.shape)} and radius {radius}; resize the scores to the affinity's grid"
        )
    if affinity.size and not (affinity.min() >= 0 and affinity.max() <= 1):
        raise ValueError(
            f"affinity: got values from {affinity.min()} to {affinity.max()}, expected [0, 1] without NaN"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores: got NaN or infinity, expected finite values; check the network's output")


def _check_out(out: Float32 | None, scores: Float32) -> Float32:
    """Return `out` when it can hold the result, a new array when it is None."""
    if out is None:
        return np.empty(scores.shape, dtype=np.float32)
    if out.dtype != np.float32 or out.shape != scores.shape:
        raise ValueError(
            f"out: got {out.dtype} {list(out.shape)}, expected float32 {list(scores.shape)} as the scores"
        )
    return out
