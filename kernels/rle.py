"""Run lengths of every class of a mask at once, in COCO's order and in that of reading.

For example:

    for runs in encode_rle(mask):
        segmentation = {"size": list(mask.shape), "counts": runs.compressed.decode()}
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.native import native

UInt8 = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.uint32]
_MOST_PIXELS = 2**32 - 1  # a run length of COCO has 32 bits


@dataclass(frozen=True, eq=False)
class ClassRuns:
    """Where one class is. Both counts are outside, inside, outside, ..., from the first pixel on; 0 first
    where that pixel is inside, and nothing after the last run inside that reaches the end."""

    class_id: int
    area: int  # pixels
    box: tuple[int, int, int, int]  # x, y, width, height in pixels, tight
    columns: Counts  # uint32 [n], column by column from the left, each from the top: COCO's `counts`
    compressed: bytes  # the same as COCO's string (pycocotools, maskApi.c: rleToString), ASCII
    rows: Counts  # uint32 [m], row by row from the top, each from the left


def encode_rle(mask: UInt8) -> tuple[ClassRuns, ...]:
    """Encode every class of a mask, by ascending id; 0 and 255 are classes like any other.

    mask: uint8 [H, W], H, W >= 1, fewer than 2^32 pixels. The time does not depend on the number of classes.
    Raises TypeError for another dtype, ValueError for another shape.
    """
    mask = checked_mask(mask)
    if mask.size > _MOST_PIXELS:
        raise ValueError(f"mask: got {mask.size} pixels, expected at most {_MOST_PIXELS}; cut it into tiles")
    return tuple(ClassRuns(*found) for found in native.encode_rle(mask))


def checked_mask(mask: UInt8) -> UInt8:
    """Return the mask as a contiguous array; TypeError or ValueError unless it is uint8 [H, W], not empty."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8:
        got = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"mask: got {got}, expected an array of uint8 class ids")
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected [H, W] with H, W >= 1")
    return np.ascontiguousarray(mask)
