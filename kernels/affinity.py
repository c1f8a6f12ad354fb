"""Affinities of pixel pairs, from a feature map (AffinityNet of psa) or a boundary map (irn, PuzzleCAM).

For example:

    affinity = affinity_from_boundary(boundary)      # [h, w] -> [34, h, w]
"""

import numpy as np
import numpy.typing as npt

from multisa.kernels.backend import Backend, choose_backend
from multisa.kernels.native import native
from multisa.kernels.stencil import stencil_offsets

Float32 = npt.NDArray[np.float32]


def affinity_from_features(features: Float32, *, radius: int = 5, backend: Backend = "auto") -> Float32:
    """Compare the features of every pair: exp(-mean over D of |f_i - f_j|) (Ahn & Kwak 2018, equation 1).

    features: float32 [D, h, w] or [N, D, h, w], finite, D, h, w >= 1. Returns float32 [P, h, w] or [N, P, h,
    w] in [0, 1], planes in the order of `stencil_offsets(radius)`; 0 where the pair's target lies outside the
    grid. `backend` is as in `random_walk`. Raises TypeError for another dtype, ValueError for another shape
    or values that are not finite.
    """
    if choose_backend("affinity_from_features", backend, features) == "cuda":
        return _on_device("features", features, radius)
    _check_map("features", features, (3, 4), "[D, h, w] or [N, D, h, w]")
    return _half_stencil("features", features, features.shape[-3:], radius, boundary=False)


def affinity_from_boundary(boundary: Float32, *, radius: int = 5, backend: Backend = "auto") -> Float32:
    """Look for boundaries between the pixels of every pair: 1 - max over the straight path (Ahn et al. 2019).

    boundary: float32 [h, w] or [N, h, w], probabilities in [0, 1]. Returns float32 [P, h, w] or [N, P, h, w]
    in [0, 1], planes in the order of `stencil_offsets(radius)`; 0 where the pair's target lies outside the
    grid. `backend` is as in `random_walk`. Raises TypeError for another dtype, ValueError for another shape
    or values outside [0, 1].
    """
    if choose_backend("affinity_from_boundary", backend, boundary) == "cuda":
        return _on_device("boundary", boundary, radius)
    _check_map("boundary", boundary, (2, 3), "[h, w] or [N, h, w]")
    return _half_stencil("boundary", boundary, (1, *boundary.shape[-2:]), radius, boundary=True)


def _on_device(name: str, array: Float32, radius: int) -> Float32:
    """Run on the first GPU."""
    from multisa.kernels.cuda import calls

    affinity: Float32 = calls.affinity_on_device(name, array, radius, calls.default_device())
    return affinity


def _half_stencil(
    name: str, array: Float32, shape: tuple[int, ...], radius: int, *, boundary: bool
) -> Float32:
    """Run the compiled kernel on maps of shape [D, h, w] with or without a batch in front."""
    planes = len(stencil_offsets(radius))
    batch = array.shape[: array.ndim - (2 if boundary else 3)]
    maps = np.ascontiguousarray(array).reshape(-1, *shape)
    affinity = np.empty((len(maps), planes, *shape[-2:]), dtype=np.float32)
    if not native.affinity(maps, affinity, radius, boundary):
        if boundary:
            raise ValueError(
                f"{name}: got values from {array.min()} to {array.max()}, expected probabilities in [0, 1]; "
                "apply the sigmoid first"
            )
        raise ValueError(f"{name}: got NaN or infinity, expected finite values; check the network's output")
    return affinity.reshape(*batch, planes, *shape[-2:])


def _check_map(name: str, array: Float32, ranks: tuple[int, int], expected: str) -> None:
    """Raise TypeError or ValueError unless `array` is float32, of one of the ranks, with a grid in it."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: got {got}, expected a float32 array {expected}; use .astype(numpy.float32)")
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {expected} with no size 0")
