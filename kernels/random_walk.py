"""The random walk that spreads class scores along affinities without forming the transition matrix.

    walked = random_walk(cam, affinity)              # [C, h, w] scores, [34, h, w] affinities

The walk is (D^-1 A^beta)^steps applied to each channel (Ahn & Kwak 2018, equations 4 and 5), where D holds
the row sums. The matrix is similar to the symmetric D^-1/2 A^beta D^-1/2, so its eigenvalues lie in [-1, 1]
and a Chebyshev series of degree about sqrt(steps) approximates its power well (Sachdeva & Vishnoi 2014,
theorem 3.3): 72 products for 256 steps. csrc/cpu/walk.hpp computes the products.
"""

import numpy as np
import numpy.typing as npt

from multisa.kernels import cpu
from multisa.kernels.common.checks import Backend, Float32, check_dtype, check_out, choose_backend
from multisa.kernels.common.stencil import Boundary, edge_mask, pair_slices, stencil_offsets
from multisa.kernels.common.walk import WalkSettings, check_walk_values

Float64 = npt.NDArray[np.float64]


# more than six parameters: keyword-only settings with defaults, so that a call needs no other import
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

    Ahn & Kwak 2018, equations 4 and 5. The result stays within each channel's [min, max].

    scores: float32 [C, h, w] or [N, C, h, w], finite.
    affinity: float32 [P, h, w] or [N, P, h, w] in [0, 1], planes in the order of `stencil_offsets(radius)`;
        entries whose target lies outside the grid are ignored.
    beta: elementwise power of A, above 0. steps: length of the walk, at least 0.
    exact: take every step instead of the Chebyshev series, whose tail is below 1e-4 of the scores' range.
    boundary: "psa" drops pairs near the left, right and bottom border, as psa does; "full" keeps them.
    out: float32 of the scores' shape to write to. Its contents are undefined after an error.
    backend: "cuda" runs on a GPU. "auto" does so if the arrays lie there (`__cuda_array_interface__`). For
        device arrays the result is a device array, the call does not wait, and values are not checked.

    Returns float32 of the scores' shape. Raises TypeError for another dtype, ValueError for another shape or
    value.
    """
    settings = WalkSettings(radius, beta, steps, exact, boundary)
    if choose_backend("random_walk", backend, scores, affinity) == "cuda":
        from multisa.kernels.cuda import calls

        on_device: Float32 = calls.random_walk_on_device(scores, affinity, settings, out, calls.default_device())
        return on_device
    _check_arguments(scores, affinity, radius)
    check_out(out, scores.shape)
    return cpu.random_walk(scores, affinity, settings, out)


def random_walk_reference(
    scores: Float32,
    affinity: Float32,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    boundary: Boundary = "full",
) -> Float64:
    """Compute `random_walk` step by step in float64, as the paper states it: the oracle of the tests.

    Applies T = D^-1 A^beta `steps` times to every channel (Ahn & Kwak 2018, equations 4 and 5). Arguments and
    errors are those of `random_walk`. Returns float64 of the scores' shape.
    """
    WalkSettings(radius, beta, steps, boundary=boundary)
    _check_arguments(scores, affinity, radius)
    mask = edge_mask(radius, (scores.shape[-2], scores.shape[-1]), boundary)
    check_walk_values(scores, affinity, mask)
    powered = np.where(mask, affinity, 0.0).astype(np.float64) ** beta
    ones = np.ones((*scores.shape[:-3], 1, *scores.shape[-2:]))
    degree = _apply_affinity(powered, ones, radius)
    state = scores.astype(np.float64)
    for _ in range(steps):
        state = _apply_affinity(powered, state, radius) / degree
    return state


def _apply_affinity(powered: Float64, state: Float64, radius: int) -> Float64:
    """Multiply the symmetric matrix of half planes [..., P, h, w], plus the identity, with [..., C, h, w]."""
    result = state.copy()
    for index, offset in enumerate(stencil_offsets(radius)):
        source, target = pair_slices(offset, (state.shape[-2], state.shape[-1]))
        edge = powered[..., index, None, :, :][..., *source]
        result[..., *source] += edge * state[..., *target]
        result[..., *target] += edge * state[..., *source]
    return result


def _check_arguments(scores: Float32, affinity: Float32, radius: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless dtypes and shapes fit each other."""
    expected_type = "a float32 array; use .astype(numpy.float32)"
    check_dtype("scores", scores, np.float32, expected_type)
    check_dtype("affinity", affinity, np.float32, expected_type)
    if scores.ndim not in (3, 4) or 0 in scores.shape[-2:]:
        raise ValueError(f"scores: got shape {list(scores.shape)}, expected [C, h, w] or [N, C, h, w], h, w >= 1")
    expected = (*scores.shape[:-3], len(stencil_offsets(radius)), *scores.shape[-2:])
    if affinity.shape != expected:
        raise ValueError(
            f"affinity: got shape {list(affinity.shape)}, expected {list(expected)} for scores "
            f"{list(scores.shape)} and radius {radius}; resize the scores to the affinity's grid"
        )
