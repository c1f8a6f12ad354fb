"""In plain NumPy: the tiny segmenter, bilinear enlargement, and the mask of class probabilities."""

import numpy as np
from scipy import ndimage


def tiny_probabilities(images: np.ndarray, steepness: float = 0.02) -> np.ndarray:
    """What the segmenter of conftest.py gives for uint8 [N, H, W, 3]: float64 [N, 3, ceil(H / 4), ceil(W / 4)]."""
    count, height, width, _ = images.shape
    rows, columns = -(-height // 4), -(-width // 4)
    padded = np.zeros((count, 4 * rows, 4 * columns))
    padded[:, :height, :width] = images.astype(np.float64).mean(axis=3)
    brightness = padded.reshape(count, rows, 4, columns, 4).max(axis=(2, 4))
    logits = np.stack([0 * brightness, brightness - 85, 2 * brightness - 85 - 170], axis=1) * steepness
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def enlarge(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, with half-pixel centres and clamped edges: float64 [C, h, w] -> [C, *size]."""
    places = []
    for source, target in zip(maps.shape[1:], size, strict=True):
        places.append(np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0))
    grid = np.meshgrid(*places, indexing="ij")
    return np.stack([ndimage.map_coordinates(one.astype(np.float64), grid, order=1, mode="nearest") for one in maps])


def clear(maps: np.ndarray, by: float = 1e-4) -> np.ndarray:
    """Pixels whose highest probability exceeds the others by more than rounding, bool [H, W]."""
    ordered = np.sort(maps, axis=0)
    return np.ones(maps.shape[1:], bool) if len(maps) == 1 else ordered[-1] - ordered[-2] > by


def part_sizes(mask: np.ndarray, class_id: int) -> list[int]:
    """Pixels of each 4-connected part of a class."""
    parts, _ = ndimage.label(mask == class_id)
    return np.bincount(parts.ravel())[1:].tolist()
