"""The random walk that spreads class scores along affinities, without ever forming the transition matrix.

    walked = random_walk(cam, affinity)              # [C, h, w] scores, [34, h, w] affinities

The walk is (D^-1 A^beta)^steps applied to each channel (Ahn & Kwak 2018, equations 4 and 5), D being the row
sums. The matrix is similar to the symmetric D^-1/2 A^beta D^-1/2, so its eigenvalues lie in [-1, 1] and its
power is well approximated by a Chebyshev series of degree about sqrt(steps) (Sachdeva & Vishnoi 2014, theorem
3.3): 72 products for 256 steps. The products themselves are in csrc/cpu/walk.hpp.
"""

import functools
import math

import numpy as np
import numpy.typing as npt

from multisa.kernels.backend import Backend, choose_backend
from multisa.kernels.native import native
from multisa.kernels.stencil import Boundary, check_boundary, check_integer, edge_mask, stencil_offsets

Float32 = npt.NDArray[np.float32]

# Bound of the truncated Chebyshev tail, relative to the range of the scores; float32 sums err by 1e-5.
CHEBYSHEV_TOLERANCE = 1e-4

# Far beyond any walk that is still on its way.
MAX_STEPS = 2**31 - 1

# Of float32, in which the kernels calculate.
SMALLEST, LARGEST = float(np.finfo(np.float32).smallest_normal), float(np.finfo(np.float32).max)


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
    backend: Backend = "auto",
) -> Float32:
    """Average the scores along the affinities: (D^-1 A^beta)^steps on each channel, self-loops of weight 1.

    scores: float32 [C, h, w] or [N, C, h, w], finite; affinity: float32 [P, h, w] or [N, P, h, w] in [0, 1],
    the half stencil `stencil_offsets(radius)`; entries whose target lies outside the grid are ignored.
    Returns float32 of the scores' shape (in `out` when given), within each channel's [min, max]; a constant
    stays. beta > 0 is the elementwise power of A, steps >= 0 the length of the walk. exact=True takes every
    step instead of the Chebyshev series (tail below CHEBYSHEV_TOLERANCE). boundary="psa" drops pairs near the
    left, right and bottom border as psa does. backend="cuda" runs on a GPU, as does "auto" where the arrays
    lie there (anything with `__cuda_array_interface__`): the result is then a device array, nothing waits,
    and the values are not checked. Raises TypeError for another dtype, ValueError for another shape or value;
    what `out` holds is then not defined.
    """
    if choose_backend("random_walk", backend, scores, affinity) == "cuda":
        from multisa.kernels.cuda import calls
        from multisa.kernels.cuda.walk import WalkSettings

        settings = WalkSettings(radius, beta, steps, exact, boundary)
        walked_there: Float32 = calls.random_walk_on_device(
            scores, affinity, settings, out, calls.default_device()
        )
        return walked_there
    check_walk_arguments(scores, affinity, radius=radius, beta=beta, steps=steps)
    check_boundary(boundary)
    check_out(out, scores.shape)
    degree = steps if exact else chebyshev_degree(steps)
    series = chebyshev_coefficients(steps, degree) if degree < steps else []
    batch = (1,) * (4 - scores.ndim)
    # Channels are written one group after the other, so the result may not lie in what is still to be read.
    direct = out is not None and out.flags.c_contiguous and not np.may_share_memory(out, scores)
    walked = out if out is not None and direct else np.empty(scores.shape, dtype=np.float32)
    valid = native.walk(
        np.ascontiguousarray(scores).reshape(*batch, *scores.shape),
        np.ascontiguousarray(affinity).reshape(*batch, *affinity.shape),
        walked.reshape(*batch, *scores.shape),
        radius,
        beta,
        radius - 1 if boundary == "psa" else 0,
        steps,
        series,
    )
    if not valid:
        check_walk_values(scores, affinity, edge_mask(radius, (scores.shape[-2], scores.shape[-1]), boundary))
    if out is None or walked is out:
        return walked
    out[...] = walked
    return out


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


def check_walk_numbers(beta: float, steps: int) -> None:
    """Raise TypeError or ValueError unless beta is above 0 and steps at least 0, both within bounds."""
    if check_integer("steps", steps, minimum=0) > MAX_STEPS:
        raise ValueError(f"steps: got {steps}, expected at most {MAX_STEPS}")
    if not SMALLEST <= beta <= LARGEST:
        raise ValueError(f"beta: got {beta}, expected a finite number above 0")


def check_walk_arguments(scores: Float32, affinity: Float32, *, radius: int, beta: float, steps: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless a walk is defined on these arguments."""
    for name, array in (("scores", scores), ("affinity", affinity)):
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{name}: got {got}, expected a float32 array; use .astype(numpy.float32)")
    check_walk_numbers(beta, steps)
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


def check_walk_values(scores: Float32, affinity: Float32, mask: npt.NDArray[np.bool_]) -> None:
    """Raise ValueError unless the scores are finite and the affinities of the pairs in `mask` in [0, 1]."""
    if not np.isfinite(scores).all():
        raise ValueError("scores: got NaN or infinity, expected finite values; check the network's output")
    pairs = affinity[..., mask]
    if pairs.size and not (pairs.min() >= 0 and pairs.max() <= 1):
        raise ValueError(
            f"affinity: got values from {pairs.min()} to {pairs.max()}, expected [0, 1] without NaN"
        )


def check_out(out: Float32 | None, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `out` is None or an array that can hold the result."""
    if out is None:
        return
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: got {type(out).__name__}, expected a float32 array {list(shape)} or None")
    if out.dtype != np.float32 or out.shape != shape:
        raise ValueError(
            f"out: got {out.dtype} {list(out.shape)}, expected float32 {list(shape)} as the scores"
        )
    if not out.flags.writeable:
        raise ValueError("out: got a read-only array, expected one that can be written")
