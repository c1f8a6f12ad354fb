"""`PrimaryContext`: the primary context of a GPU and its memory, for use from any thread.

    gpu = PrimaryContext()
    with gpu.active():
        ...                              # calls of the driver, and of libraries that use the current context

Needs pycuda and the NVIDIA driver. Frameworks share the primary context of a GPU, so an address from one of
them is valid in another.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.driver import Driver, DriverError


class DeviceUnavailableError(RuntimeError):
    """No GPU is usable; the message names the cause."""


class PycudaBuffer:
    """Device memory, freed with this object."""

    def __init__(self, context: "PrimaryContext", allocation: Any, size: int) -> None:
        """Take ownership of a DeviceAllocation of pycuda."""
        self.pointer = int(allocation)
        self.size = size
        weakref.finalize(self, _free, context, allocation)


class PinnedBuffer:
    """Pinned host memory, which the device copies from and to asynchronously. Freed with this object.

    `array` is uint8 [size]. No view of it may outlive the buffer.
    """

    def __init__(self, context: "PrimaryContext", array: npt.NDArray[np.uint8]) -> None:
        """Take ownership of an array of pycuda's pagelocked_empty."""
        self.array = array
        self.size = array.size
        weakref.finalize(self, _free, context, array.base)

    @property
    def pointer(self) -> int:
        """Host address of the first byte."""
        return int(self.array.ctypes.data)


class PrimaryContext:
    """Primary context, memory and copies of GPU `ordinal`; `driver` has the calls on streams.

    Several threads may use it; each buffer serves one thread at a time.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Retain the primary context; raises DeviceUnavailableError."""
        self._cuda = cuda = _import_pycuda()
        try:
            cuda.init()
            count = cuda.Device.count()
            if not 0 <= ordinal < count:
                raise DeviceUnavailableError(f"GPU {ordinal}: got {count} GPUs, expected more than {ordinal}")
            gpu = cuda.Device(ordinal)
            self._context = gpu.retain_primary_context()
            # At exit, after everything created in it. pycuda's own destructor makes the wrong call for it.
            weakref.finalize(cuda, _release, self._context)
            self.name = str(gpu.name())
            major, minor = gpu.compute_capability()
            self.driver = Driver()
        except cuda.Error as error:
            raise DeviceUnavailableError(f"{error}; check the driver by running nvidia-smi") from error
        except DriverError as error:
            raise DeviceUnavailableError(str(error)) from error
        self.compute_capability: tuple[int, int] = (int(major), int(minor))
        # What calls raise, so that callers can catch it without importing pycuda.
        self.errors: tuple[type[Exception], ...] = (cuda.Error, DriverError)

    def allocate(self, size: int) -> PycudaBuffer:
        """Allocate device memory; raises the MemoryError of pycuda if there is not enough."""
        with self.active():
            return PycudaBuffer(self, self._cuda.mem_alloc(max(size, 1)), size)

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        """Allocate pinned host memory; raises the MemoryError of pycuda if there is not enough."""
        with self.active():
            return PinnedBuffer(self, self._cuda.pagelocked_empty(max(size, 1), np.uint8))

    def upload(self, target: int, array: npt.NDArray[Any]) -> None:
        """Copy to the device and wait until every stream sees the copy."""
        if not array.size:
            return
        with self.active():
            self._cuda.memcpy_htod(target, np.ascontiguousarray(array))
            # A copy from pageable memory may still run when another, non-blocking stream reads its target.
            self._cuda.Context.synchronize()

    def download(self, source: int, array: npt.NDArray[Any], stream: int = 0) -> None:
        """Wait for `stream`, then copy into the contiguous `array`."""
        with self.active():
            self.driver.synchronise(stream)
            if array.size:
                self._cuda.memcpy_dtoh(array, source)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that makes the primary context current, and restores the previous one."""
        return current(self._cuda, self._context)


@contextlib.contextmanager
def current(cuda: Any, context: Any) -> Iterator[None]:
    """Push a context of pycuda, and pop it at the end."""
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


def _release(context: Any) -> None:
    context.push()
    context.detach()


def _free(context: PrimaryContext, allocation: Any) -> None:
    # In another thread, pycuda can free only if the context is current there.
    with context.active():
        allocation.free()


def _import_pycuda() -> Any:
    """Import pycuda.driver; it has no type information."""
    try:
        import pycuda.driver
    except ImportError as error:
        raise DeviceUnavailableError(
            f"pycuda: cannot be imported ({error}); pip install pycuda, and an NVIDIA driver"
        ) from error
    return pycuda.driver
