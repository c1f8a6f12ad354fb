"""Where a kernel runs: on the CPU, or on a CUDA device where its arrays already are."""

import logging
from typing import Literal, get_args

Backend = Literal["auto", "cpu", "cuda"]

_LOGGER = logging.getLogger("multisa.kernels")


def choose_backend(kernel: str, backend: Backend, *arrays: object) -> Literal["cpu", "cuda"]:
    """Resolve "auto" for the arrays of a call: "cuda" if any lies on a device, else "cpu".

    Which one runs is logged at DEBUG to "multisa.kernels". Raises ValueError for another name, and for "cpu"
    with arrays on a device.
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
    """Whether an array says that it lies on a CUDA device."""
    return hasattr(array, "__cuda_array_interface__")
