"""How often each byte is in an array, and each pair of bytes in two: what statistics of masks are made of.

For example:

    pixels_of_class = histogram(mask)
    by_class = joint_histogram(mask, confidence)   # row c: of the confidences where the class is c
"""

import numpy as np
import numpy.typing as npt

from multisa.kernels.native import native

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


def histogram(values: UInt8) -> Int64:
    """Count the values of a uint8 array of any shape; int64 [256]. Raises TypeError for another dtype."""
    return native.histogram(_checked("values", values))


def joint_histogram(rows: UInt8, columns: UInt8) -> Int64:
    """Count the pairs of two uint8 arrays of one shape; int64 [256, 256], by the value of `rows` first.

    Raises TypeError for another dtype, ValueError for shapes that differ.
    """
    if np.shape(rows) != np.shape(columns):
        raise ValueError(f"got shapes {np.shape(rows)} and {np.shape(columns)}, expected one shape for both")
    return native.joint_histogram(_checked("rows", rows), _checked("columns", columns))


def _checked(name: str, array: UInt8) -> UInt8:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name}: got {got}, expected an array of uint8")
    return np.ascontiguousarray(array).reshape(-1)
