"""The random walk in float64, written as the paper states it: the oracle for tests of the fast kernel."""

import numpy as np
import numpy.typing as npt

from multisa.kernels.random_walk import check_walk_arguments, check_walk_values
from multisa.kernels.stencil import Boundary, edge_mask, pair_slices, stencil_offsets

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def random_walk_reference(
    scores: Float32,
    affinity: Float32,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    boundary: Boundary = "full",
) -> Float64:
    """Apply T = D^-1 A^beta `steps` times to every channel (Ahn & Kwak 2018, equations 4 and 5) in float64.

    Arguments, checks and meaning are those of `random_walk`; every step is taken. Returns float64 of the
    scores' shape.
    """
    check_walk_arguments(scores, affinity, radius=radius, beta=beta, steps=steps)
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
