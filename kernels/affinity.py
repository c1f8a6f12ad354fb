"""Affinities of pixel pairs, from a feature map (AffinityNet of psa) or a boundary map (irn, PuzzleCAM).

For example:

    affinity = affinity_from_boundary(boundary)      # [h, w] -> [34, h, w]
"""

import numpy as np

from multisa.kernels import cpu
from multisa.kernels.common.checks import Backend, Float32, check_dtype, choose_backend


def affinity_from_features(features: Float32, *, radius: int = 5, backend: Backend = "auto") -> Float32:
    """Compare the features of every pair: exp(-mean over D of |f_i - f_j|) (Ahn & Kwak 2018, equation 1).

    features: float32 [D, h, w] or [N, D, h, w], finite, D, h, w >= 1.
    radius: 1..64 on the CPU, 1..16 on a GPU. backend: as in `random_walk`.

    Returns float32 [P, h, w] or [N, P, h, w] in [0, 1], planes in the order of `stencil_offsets(radius)`, 0
    where the pair's target lies outside the grid. Raises TypeError for another dtype, ValueError for another
    shape or values that are not finite.
    """
    if choose_backend("affinity_from_features", backend, features) == "cuda":
        return _on_device("features", features, radius)
    _check_map("features", features, (3, 4), "[D, h, w] or [N, D, h, w]")
    return cpu.affinity(features, radius, boundary=False)


def affinity_from_boundary(boundary: Float32, *, radius: int = 5, backend: Backend = "auto") -> Float32:
    """Look for a boundary between the pixels of every pair: 1 - max over the straight path (Ahn et al. 2019).

    boundary: float32 [h, w] or [N, h, w], probabilities in [0, 1].
    radius: 1..64 on the CPU, 1..16 on a GPU. backend: as in `random_walk`.

    Returns float32 [P, h, w] or [N, P, h, w] in [0, 1], planes in the order of `stencil_offsets(radius)`, 0
    where the pair's target lies outside the grid. Raises TypeError for another dtype, ValueError for another
    shape or values outside [0, 1].
    """
    if choose_backend("affinity_from_boundary", backend, boundary) == "cuda":
        return _on_device("boundary", boundary, radius)
    _check_map("boundary", boundary, (2, 3), "[h, w] or [N, h, w]")
    return cpu.affinity(boundary, radius, boundary=True)


def _on_device(name: str, array: Float32, radius: int) -> Float32:
    from multisa.kernels.cuda import calls

    affinity: Float32 = calls.affinity_on_device(name, array, radius, calls.default_device())
    return affinity


def _check_map(name: str, array: Float32, ranks: tuple[int, int], expected: str) -> None:
    """Raise TypeError or ValueError unless `array` is float32, of one of the ranks, and not empty."""
    check_dtype(name, array, np.float32, f"a float32 array {expected}; use .astype(numpy.float32)")
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {expected} with no size 0")
