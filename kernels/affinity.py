"""Affinities of pixel pairs, from a feature map (AffinityNet of psa) or a boundary map (irn, PuzzleCAM).

For example:

    affinity = affinity_from_boundary(boundary)      # [h, w] -> [34, h, w]
"""

import numpy as np
import numpy.typing as npt

from multisa.kernels.stencil import pair_slices, path_offsets, stencil_offsets

Float32 = npt.NDArray[np.float32]


def affinity_from_features(features: Float32, *, radius: int = 5) -> Float32:
    """Compare the features of every pair: exp(-mean over D of |f_i - f_j|) (Ahn & Kwak 2018, equation 1).

    features: float32 [D, h, w] or [N, D, h, w], finite, D, h, w >= 1. Returns float32 [P, h, w] or [N, P, h,
    w] in [0, 1], planes in the order of `stencil_offsets(radius)`; 0 where the pair's target lies outside the
    grid. Raises TypeError for another dtype, ValueError for another shape.
    """
    _check_map("features", features, (3, 4), "[D, h, w] or [N, D, h, w]")
    offsets = stencil_offsets(radius)
    *batch, _, height, width = features.shape
    affinity = np.zeros((*batch, len(offsets), height, width), dtype=np.float32)
    for index, offset in enumerate(offsets):
        source, target = pair_slices(offset, (height, width))
        difference = np.abs(features[..., *source] - features[..., *target])
        affinity[..., index, *source] = np.exp(-difference.mean(axis=-3))
    return affinity


def affinity_from_boundary(boundary: Float32, *, radius: int = 5) -> Float32:
    """Look for boundaries between the pixels of every pair: 1 - max over the straight path (Ahn et al. 2019).

    boundary: float32 [h, w] or [N, h, w], probabilities in [0, 1]. Returns float32 [P, h, w] or [N, P, h, w]
    in [0, 1], planes in the order of `stencil_offsets(radius)`; 0 where the pair's target lies outside the
    grid. Raises TypeError for another dtype, ValueError for another shape or values outside [0, 1].
    """
    _check_map("boundary", boundary, (2, 3), "[h, w] or [N, h, w]")
    if not (boundary.min() >= 0 and boundary.max() <= 1):
        raise ValueError(
            f"boundary: got values from {boundary.min()} to {boundary.max()}, expected probabilities in "
            "[0, 1]; apply the sigmoid first"
        )
    offsets = stencil_offsets(radius)
    *batch, height, width = boundary.shape
    affinity = np.zeros((*batch, len(offsets), height, width), dtype=np.float32)
    for index, offset in enumerate(offsets):
        (rows, columns), _ = pair_slices(offset, (height, width))
        highest = np.zeros((*batch, rows.stop - rows.start, columns.stop - columns.start), dtype=np.float32)
        for y, x in path_offsets(*offset):
            shifted = (slice(rows.start + y, rows.stop + y), slice(columns.start + x, columns.stop + x))
            np.maximum(highest, boundary[..., *shifted], out=highest)
        affinity[..., index, rows, columns] = 1 - highest
    return affinity


def _check_map(name: str, array: Float32, ranks: tuple[int, int], expected: str) -> None:
    """Raise TypeError or ValueError unless `array` is float32, of one of the ranks, with a grid in it."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: got {got}, expected a float32 array {expected}; use .astype(numpy.float32)")
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {expected} with no size 0")
