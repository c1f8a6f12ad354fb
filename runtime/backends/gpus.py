"""List the NVIDIA GPUs by asking the driver alone: creates no CUDA context and loads no CUDA library.

python -c "from multisa.runtime.backends.gpus import probe_gpus; print(probe_gpus())"
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from multisa.kernels.cuda.driver import LIBRARY

# CUdevice_attribute
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """One GPU, in the driver's order."""

    name: str
    target: str  # its architecture, as TensorRT engines name it: "sm89"


@dataclass(frozen=True)
class GpuProbe:
    """The driver's answer. Without a usable GPU `problem` says why, and the rest is empty."""

    driver: str = ""  # newest CUDA version that the driver supports: "13.2"
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    is_absent: bool = False  # no driver or no GPU: an ordinary CPU machine, not a broken installation


class _RefusedError(Exception):
    """The driver refused a call; the message quotes it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # CUresult


def probe_gpus() -> GpuProbe:
    """Ask the driver for its version and its GPUs. Raises nothing."""
    try:
        library = ctypes.CDLL(LIBRARY)
        call = _caller(library)
        call("cuInit", 0)
        version, count = ctypes.c_int(), ctypes.c_int()
        call("cuDriverGetVersion", ctypes.byref(version))
        call("cuDeviceGetCount", ctypes.byref(count))
        gpus = tuple(_gpu(call, ordinal) for ordinal in range(count.value))
    except OSError:
        return GpuProbe(problem=f"no NVIDIA driver here: {LIBRARY} cannot be loaded", is_absent=True)
    except (AttributeError, _RefusedError) as error:
        return GpuProbe(
            problem=f"no usable NVIDIA GPU here: {error}; check the driver by running nvidia-smi",
            is_absent=isinstance(error, _RefusedError) and error.status == _NO_DEVICE,
        )
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"  # 13020 is 13.2
    if not gpus:
        return GpuProbe(driver, problem="no NVIDIA GPU here: the driver knows of none", is_absent=True)
    return GpuProbe(driver, gpus)


_Call = Callable[..., None]


def _caller(library: ctypes.CDLL) -> _Call:
    def call(name: str, *arguments: object) -> None:
        status = getattr(library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            library.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode(errors="replace") if text.value else "unknown error"
            raise _RefusedError(f"{name}: {reason} (CUDA error {status})", status)

    return call


def _gpu(call: _Call, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGetName", name, _NAME_BYTES, device)
    call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")
