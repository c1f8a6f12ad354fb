"""Statistics, parts and codecs of masks: histograms, small parts, COCO run lengths, the deflate stream of a PNG.

For example:

    pixels_of_class = histogram(mask)
    for runs in encode_rle(mask):
        segmentation = {"size": list(mask.shape), "counts": runs.compressed.decode()}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import Float32, UInt8, check_dtype, check_integer
from multisa.kernels.cpu import native

Counts = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]

MAX_RLE_PIXELS = 2**32 - 1  # a run length of COCO has 32 bits
MAX_PARTS_PIXELS = 2**30  # the borders of parts, up to four a pixel, have indices of 32 bits
MAX_PNG_SIDE = 2**31 - 1  # the limit of the PNG format


@dataclass(frozen=True, eq=False)
class ClassRuns:
    """The pixels of one class as run lengths.

    `columns` and `rows` count pixels outside, inside, outside, ... from the first pixel on. They start with 0
    if the first pixel is inside, and end with the last run inside if that run reaches the last pixel.
    """

    class_id: int
    area: int  # pixels
    box: tuple[int, int, int, int]  # x, y, width, height in pixels, tight
    columns: Counts  # uint32 [n], column by column from the left, each from the top: COCO's `counts`
    compressed: bytes  # `columns` as COCO's string (pycocotools, maskApi.c: rleToString), ASCII
    rows: Counts  # uint32 [m], row by row from the top, each from the left


def encode_rle(mask: UInt8) -> tuple[ClassRuns, ...]:
    """Encode every class of a mask, in ascending order of ids; 0 and 255 are ordinary classes.

    mask: uint8 [H, W], H, W >= 1, fewer than 2^32 pixels. The time does not depend on the number of classes.
    Returns one `ClassRuns` per class in the mask. Raises TypeError for another dtype, ValueError for another
    shape.
    """
    mask = _checked_mask(mask)
    if mask.size > MAX_RLE_PIXELS:
        raise ValueError(f"mask: got {mask.size} pixels, expected at most {MAX_RLE_PIXELS}; cut it into tiles")
    return tuple(ClassRuns(*runs) for runs in native.encode_rle(mask))


def deflate_mask(mask: UInt8) -> bytes:
    """Return the IDAT data of a PNG: the mask with PNG's filter Up on every row, as a zlib stream.

    mask: uint8 [H, W], H, W >= 1. The bytes are the same on every machine. The encoder searches only for runs
    of one byte: a filtered mask is zero except along outlines, and Huffman codes built for it compress better
    than a general search. The encoding is lossless; noise grows by less than one percent. Raises TypeError
    for another dtype, ValueError for another shape.
    """
    mask = _checked_mask(mask)
    if max(mask.shape) > MAX_PNG_SIDE:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected sides of at most {MAX_PNG_SIDE}")
    return native.deflate_mask(mask)


def histogram(values: UInt8) -> Int64:
    """Count the values of a uint8 array of any shape: int64 [256]. Raises TypeError for another dtype."""
    check_dtype("values", values, np.uint8, "an array of uint8")
    return native.histogram(np.ravel(values))


def joint_histogram(rows: UInt8, columns: UInt8) -> Int64:
    """Count the pairs of values of two uint8 arrays of one shape: int64 [256, 256], `rows` first.

    joint_histogram(mask, confidence)[c] is the histogram of confidences of class c. Raises TypeError for
    another dtype, ValueError for shapes that differ.
    """
    if np.shape(rows) != np.shape(columns):
        raise ValueError(f"got shapes {np.shape(rows)} and {np.shape(columns)}, expected one shape for both")
    for name, array in (("rows", rows), ("columns", columns)):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise TypeError(f"{name}: got {getattr(array, 'dtype', type(array).__name__)}, expected uint8")
    return native.joint_histogram(np.ravel(rows), np.ravel(columns))


def confidence_levels(probabilities: Float32) -> UInt8:
    """Quantise probabilities, float32 of any shape, to uint8 0..255 with the rounding of the ONNX segmenter.

    Values outside [0, 1] are clipped.
    """
    return np.asarray(probabilities.clip(0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def absorb_small_parts(labels: UInt8, min_pixels: int, kept: Sequence[int] = ()) -> UInt8:
    """Give connected parts of a mask that are too small to a neighbour: specks vanish, and so do holes.

    A part is what is connected over the sides of pixels (4-connectivity) and has one id; 0 is an ordinary id, 255
    belongs to no part and stays. The smallest part goes first, of equals the one whose first pixel comes first in
    reading order. It takes the id of the neighbouring part with which it shares the longest border, of equals the one
    with the smaller id, and is one part with all neighbours of that id from then on. This ends when no part of fewer
    than `min_pixels` pixels has a neighbour.

    labels: uint8 [H, W], H, W >= 1, at most 2^30 pixels. min_pixels: at least 1, which changes nothing. kept: ids,
    0..255, of classes that remain: the largest part of each, of equals the first in reading order, is not absorbed.
    Returns uint8 [H, W]. Raises TypeError for another dtype, ValueError for another shape or number.
    """
    labels = _checked_mask(labels, "labels")
    if labels.size > MAX_PARTS_PIXELS:
        raise ValueError(f"labels: got {labels.size} pixels, expected at most {MAX_PARTS_PIXELS}; cut it into tiles")
    fewest = check_integer("min_pixels", min_pixels, minimum=1)
    ids = [check_integer("kept", class_id, minimum=0) for class_id in kept]
    if max(ids, default=0) > 255:
        raise ValueError(f"kept: got {ids}, expected ids of 0..255")
    absorbed = np.empty_like(labels)
    native.absorb_small_parts(labels, absorbed, min(fewest, labels.size + 1), np.array(ids, np.uint8))
    return absorbed


def _checked_mask(mask: UInt8, name: str = "mask") -> UInt8:
    """Return the mask as a contiguous array; raise TypeError or ValueError unless it is uint8 [H, W]."""
    check_dtype(name, mask, np.uint8, "an array of uint8 class ids")
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{name}: got shape {list(mask.shape)}, expected [H, W] with H, W >= 1")
    return np.ascontiguousarray(mask)
