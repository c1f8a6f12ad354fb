"""Array types, checks of arguments, and the choice between CPU and CUDA."""

import logging
import operator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Backend = Literal["auto", "cpu", "cuda"]

# The kernels compute in float32, so a parameter must be a normal number there.
FLOAT32_SMALLEST = float(np.finfo(np.float32).smallest_normal)
FLOAT32_LARGEST = float(np.finfo(np.float32).max)

_LOGGER = logging.getLogger("multisa.kernels")


def choose_backend(kernel: str, backend: Backend, *arrays: object) -> Literal["cpu", "cuda"]:
    """Resolve "auto" from the arrays of a call: "cuda" if any of them lies on a device, else "cpu".

    Logs the choice at DEBUG to "multisa.kernels". Raises ValueError for an unknown name, and for "cpu" with
    arrays on a device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")
    on_device = any(is_device_array(array) for array in arrays)
    if backend == "cpu" and on_device:
        raise ValueError("backend: got 'cpu' for arrays on a device, expected 'auto' or 'cuda'; or copy them")
    chosen: Literal["cpu", "cuda"] = "cuda" if on_device or backend == "cuda" else "cpu"
    _LOGGER.debug("%s: runs on %s", kernel, chosen)
    return chosen


def is_device_array(array: object) -> bool:
    """Return whether an array lies on a CUDA device."""
    return hasattr(array, "__cuda_array_interface__")


def check_dtype(name: str, array: object, dtype: type[np.generic], expected: str) -> None:
    """Raise TypeError, with `expected` in its message, unless `array` is a NumPy array of `dtype`."""
    if isinstance(array, np.ndarray) and array.dtype == dtype:
        return
    got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
    raise TypeError(f"{name}: got {got}, expected {expected}")


def check_integer(name: str, value: int, *, minimum: int) -> int:
    """Return `value` as an int. Raises TypeError unless it is an integer, ValueError below `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, expected an integer; pass int({name})") from None
    if number < minimum:
        raise ValueError(f"{name}: got {number}, expected at least {minimum}")
    return number


def check_out(out: Float32 | None, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `out` is None or a writeable float32 array of `shape`."""
    if out is None:
        return
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: got {type(out).__name__}, expected a float32 array {list(shape)} or None")
    if out.dtype != np.float32 or out.shape != shape:
        raise ValueError(f"out: got {out.dtype} {list(out.shape)}, expected float32 {list(shape)} as the scores")
    if not out.flags.writeable:
        raise ValueError("out: got a read-only array, expected a writeable one")
