"""`PycudaDevice`: carries out host schedules on an NVIDIA GPU, in the primary context that frameworks share.

For example:

    device = PycudaDevice()

It needs pycuda, the NVIDIA driver, a GPU, and kernels.fatbin (made by multisa.kernels.cuda.build).
"""

import contextlib
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.build import FATBIN, SOURCES, source_digest
from multisa.kernels.cuda.device import Argument, Dim3, Schedule
from multisa.kernels.cuda.driver import Driver, DriverError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the stream for recording does not wait for the default stream


class DeviceUnavailableError(RuntimeError):
    """The kernels cannot run on a GPU here; the message says what is missing."""


class PycudaBuffer:
    """Memory of the device, freed with this object."""

    def __init__(self, allocation: Any, size: int) -> None:
        """Keep pycuda's DeviceAllocation."""
        self._allocation = allocation
        self.pointer = int(allocation)
        self.size = size


class PycudaDevice:
    """A `Device`: pycuda holds context and memory, the driver launches on the caller's streams.

    Not to be shared by threads that record at the same time.
    """

    def __init__(self, ordinal: int = 0, fatbin: Path = FATBIN) -> None:
        """Retain the primary context of GPU `ordinal` and load the kernels; raises DeviceUnavailableError."""
        if not fatbin.is_file():
            raise DeviceUnavailableError(
                f"{fatbin}: not found; run python -m multisa.kernels.cuda.build (needs nvcc)"
            )
        _check_current(fatbin)
        self._cuda = cuda = _import_pycuda()
        try:
            cuda.init()
            count = cuda.Device.count()
            if not 0 <= ordinal < count:
                raise DeviceUnavailableError(f"GPU {ordinal}: got {count} GPUs, expected more than {ordinal}")
            self._context = cuda.Device(ordinal).retain_primary_context()
            self.name = str(cuda.Device(ordinal).name())
        except cuda.Error as error:
            raise DeviceUnavailableError(f"{error}; check the driver by running nvidia-smi") from error
        with self.active():
            try:
                self._driver = Driver()
                self._module = self._driver.load_module(fatbin.read_bytes())
            except DriverError as error:
                raise DeviceUnavailableError(f"{fatbin}: {self.name} cannot load it: {error}") from error
            self._capture_stream = cuda.Stream(NON_BLOCKING)
        self._functions: dict[str, int] = {}
        weakref.finalize(self, _unload, cuda, self._context, self._driver, self._module)

    def allocate(self, size: int) -> PycudaBuffer:
        """Allocate device memory; raises pycuda's MemoryError when there is not enough."""
        with self.active():
            return PycudaBuffer(self._cuda.mem_alloc(max(size, 1)), size)

    def upload(self, target: int, array: npt.NDArray[Any]) -> None:
        """Copy to the device; returns when it is there for every stream."""
        if not array.size:
            return
        with self.active():
            self._cuda.memcpy_htod(target, np.ascontiguousarray(array))
            # From pageable memory the copy may still be under way for streams that do not wait for stream 0.
            self._cuda.Context.synchronize()

    def download(self, source: int, array: npt.NDArray[Any], stream: int = 0) -> None:
        """Wait for `stream`, then copy into the contiguous `array`."""
        with self.active():
            self._driver.synchronise(stream)
            if array.size:
                self._cuda.memcpy_dtoh(array, source)

    def fill(self, target: int, value: int, count: int, stream: int = 0) -> None:
        """Queue writing 32-bit words."""
        with self.active():
            self._driver.fill(target, value, count, stream)

    def launch(
        self,
        name: str,
        grid: Dim3,
        block: Dim3,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        stream: int = 0,
    ) -> None:
        """Queue one launch; raises DriverError when the driver refuses it."""
        with self.active():
            if name not in self._functions:
                self._functions[name] = self._driver.function(self._module, name)
            self._driver.launch(self._functions[name], grid, block, arguments, shared_bytes, stream)

    def record(self, schedule: Schedule) -> Schedule:
        """Capture the schedule as a CUDA graph; what is returned launches it."""
        driver, stream = self._driver, int(self._capture_stream.handle)
        with self.active():
            driver.begin_capture(stream)
            try:
                schedule(stream)
            finally:
                graph = driver.end_capture(stream)  # also ends a capture whose schedule failed
            executable = driver.instantiate(graph)

        def replay(stream: int) -> None:
            with self.active():
                driver.launch_graph(executable, stream)

        weakref.finalize(replay, self._destroy_graph, executable)
        return replay

    def _destroy_graph(self, executable: int) -> None:
        """Free a recording that nobody holds any more."""
        with self.active():
            self._driver.destroy_graph(executable)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Return a `with` block in which the primary context is current, and afterwards whichever was."""
        return _current(self._cuda, self._context)


@contextlib.contextmanager
def _current(cuda: Any, context: Any) -> Iterator[None]:
    """Push a context of pycuda, and pop it."""
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


def _unload(cuda: Any, context: Any, driver: Driver, module: int) -> None:
    """Unload the kernels of a device that nobody holds any more."""
    with _current(cuda, context):
        driver.unload_module(module)


def _check_current(fatbin: Path) -> None:
    """Refuse kernels of other sources than those beside them: their arguments may be others."""
    record = fatbin.with_suffix(".json")
    if not (record.is_file() and SOURCES.is_dir()):
        return
    if json.loads(record.read_text(encoding="utf-8")).get("sources") != source_digest():
        raise DeviceUnavailableError(
            f"{fatbin}: made of other sources than those in {SOURCES}; run "
            "python -m multisa.kernels.cuda.build"
        )


def _import_pycuda() -> Any:
    """Import pycuda.driver; it has no type information."""
    try:
        import pycuda.driver
    except ImportError as error:
        raise DeviceUnavailableError(
            f"pycuda: cannot be imported ({error}); pip install 'multisa[gpu]', and an NVIDIA driver"
        ) from error
    return pycuda.driver
