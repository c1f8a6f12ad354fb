"""From class probabilities on a coarse grid to the labels and confidences of an image, in one pass.

    labels, confidence = enlarge_probabilities(probabilities, (3000, 4000))     # [7, 96, 128] probabilities

A class that is below another at all four corners of a grid cell is below it in the whole cell, because bilinear
interpolation is a convex combination of the corners. So most cells have one label, and only the probability of that
class is interpolated. csrc/cpu/enlarge.hpp does this; the enlarged probabilities are never in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from multisa.kernels.common.checks import (
    Backend,
    Float32,
    UInt8,
    check_dtype,
    check_integer,
    choose_backend,
    is_device_array,
)
from multisa.kernels.cpu import native

MAX_CLASSES = 256  # as many as a uint8 mask can distinguish
ROUNDING = 1e-5  # as in csrc/cpu/enlarge.hpp: a softmax in float32 can leave [0, 1] by less
MAX_VALUES = 2**31 - 256  # indices have 32 bits, and those of the last block of a GPU may pass the end


def enlarge_probabilities(
    probabilities: Float32, size: tuple[int, int], class_ids: Sequence[int] | None = None, *, backend: Backend = "auto"
) -> tuple[UInt8, UInt8]:
    """Resize class probabilities bilinearly and take the most probable class of every pixel.

    The interpolation has half-pixel centres and repeats the edges: PyTorch's interpolate(mode="bilinear",
    align_corners=False), which when shrinking samples points. Where several classes have the highest probability the
    first wins; where they differ by less than the rounding of float32 (about 1e-7) any of them may.

    probabilities: float32 [C, h, w] in [0, 1], 1 <= C <= 256; a softmax may leave [0, 1] by 1e-5. size: (H, W) of the
        result, at least 1 each.
    class_ids: the id of each class, 0..255; None stands for 0..C-1.
    backend: as in `random_walk`. Device arrays give device arrays; their values are not checked.

    Returns labels, uint8 [H, W], the ids; and confidence, uint8 [H, W], their probabilities as by
    `confidence_levels`. Raises TypeError for another dtype, ValueError for another shape or value, NaN included.
    """
    chosen = choose_backend("enlarge_probabilities", backend, probabilities)
    if not is_device_array(probabilities):
        check_dtype("probabilities", probabilities, np.float32, "a float32 array; use .astype(numpy.float32)")
    shape = _checked_shape(probabilities)
    if np.shape(size) != (2,):
        raise ValueError(f"size: got {size!r}, expected two whole numbers (H, W)")
    height, width = (check_integer("size", side, minimum=1) for side in size)
    if max(math.prod(shape), height * width) > MAX_VALUES:
        raise ValueError(
            f"size: got {list(shape)} to {[height, width]}, expected at most {MAX_VALUES} values in each; "
            "cut the image into tiles"
        )
    ids = _checked_ids(class_ids, shape[0])
    if chosen == "cuda":
        from multisa.kernels.cuda import calls

        if isinstance(probabilities, np.ndarray) and not are_probabilities(probabilities):
            raise _value_error(probabilities)
        sizes = (height, width)
        enlarged: tuple[UInt8, UInt8] = calls.enlarge_on_device(
            probabilities, sizes, tuple(ids.tolist()), calls.default_device()
        )
        return enlarged
    labels, confidence = (np.empty((height, width), np.uint8) for _ in range(2))
    if not native.enlarge(np.ascontiguousarray(probabilities), ids, labels, confidence):
        raise _value_error(probabilities)
    return labels, confidence


def _checked_shape(probabilities: Any) -> tuple[int, ...]:
    """Return the shape of a NumPy or device array; raise ValueError unless it is [C, h, w]."""
    on_device = is_device_array(probabilities)
    shape = tuple(probabilities.__cuda_array_interface__["shape"] if on_device else probabilities.shape)
    if len(shape) != 3 or 0 in shape or shape[0] > MAX_CLASSES:
        raise ValueError(
            f"probabilities: got shape {list(shape)}, expected [C, h, w] with C of 1..{MAX_CLASSES} and h, w >= 1"
        )
    return shape


def _checked_ids(class_ids: Sequence[int] | None, classes: int) -> UInt8:
    """Return the ids as uint8 [classes]; raise TypeError or ValueError unless they are whole numbers of 0..255."""
    if class_ids is None:
        return np.arange(classes, dtype=np.uint8)
    ids = np.asarray(class_ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"class_ids: got {ids.dtype}, expected whole numbers")
    if ids.shape != (classes,) or ids.min() < 0 or ids.max() > 255:
        raise ValueError(f"class_ids: got {ids.tolist()}, expected {classes} ids of 0..255, one for each class")
    return ids.astype(np.uint8)


def are_probabilities(values: Float32) -> bool:
    """Whether float32 values of any shape, at least one, are in [0, 1] up to ROUNDING; NaN is not."""
    return bool(values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING)


def _value_error(probabilities: Float32) -> ValueError:
    return ValueError(
        f"probabilities: got values from {probabilities.min()} to {probabilities.max()}, expected [0, 1]; "
        "apply the softmax first"
    )
