"""`PycudaDevice` runs host schedules on an NVIDIA GPU, in the primary context that frameworks share.

    device = PycudaDevice()

Needs pycuda, the NVIDIA driver, a GPU, and kernels.fatbin (built by multisa.kernels.cuda.build).
"""

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multisa.kernels.cuda.build import FATBIN, SOURCES, source_digest
from multisa.kernels.cuda.device import Argument, Dim3, Schedule
from multisa.kernels.cuda.driver import Driver, DriverError
from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext, current

__all__ = ["DeviceUnavailableError", "PycudaDevice"]


class PycudaDevice(PrimaryContext):
    """A `Device`: pycuda holds context and memory, the driver launches on the caller's streams.

    Threads that share it must not record at the same time.
    """

    def __init__(self, ordinal: int = 0, fatbin: Path = FATBIN) -> None:
        """Retain the primary context of GPU `ordinal` and load the kernels; raises DeviceUnavailableError."""
        if not fatbin.is_file():
            raise DeviceUnavailableError(
                f"{fatbin}: not found; install with MULTISA_CUDA=1, or in a clone run "
                "python -m multisa.kernels.cuda.build (both need nvcc)"
            )
        _check_current(fatbin)
        super().__init__(ordinal)
        with self.active():
            try:
                self._module = self.driver.load_module(fatbin.read_bytes())
            except DriverError as error:
                raise DeviceUnavailableError(f"{fatbin}: {self.name} cannot load it: {error}") from error
            self._capture_stream = self.driver.create_stream()
        self._functions: dict[str, int] = {}
        weakref.finalize(self, _unload, self._cuda, self._context, self.driver, self._module, self._capture_stream)

    def fill(self, target: int, value: int, count: int, stream: int = 0) -> None:
        """Queue writing 32-bit words."""
        with self.active():
            self.driver.fill(target, value, count, stream)

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
        """Queue one launch. Raises DriverError if the driver fails."""
        with self.active():
            if name not in self._functions:
                self._functions[name] = self.driver.function(self._module, name)
            self.driver.launch(self._functions[name], grid, block, arguments, shared_bytes, stream)

    def record(self, schedule: Schedule) -> Schedule:
        """Capture the schedule as a CUDA graph, and return a function that launches it."""
        driver = self.driver
        stream = self._capture_stream
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
        """Destroy the graph of a recording that is no longer referenced."""
        with self.active():
            self.driver.destroy_graph(executable)


def _unload(cuda: Any, context: Any, driver: Driver, module: int, stream: int) -> None:
    """Unload the kernels of a device that is no longer referenced."""
    with current(cuda, context):
        driver.destroy_stream(stream)
        driver.unload_module(module)


def _check_current(fatbin: Path) -> None:
    """Raise DeviceUnavailableError for kernels built from other sources: their arguments may differ."""
    record = fatbin.with_suffix(".json")
    if not (record.is_file() and SOURCES.is_dir()):
        return
    if json.loads(record.read_text(encoding="utf-8")).get("sources") != source_digest():
        raise DeviceUnavailableError(
            f"{fatbin}: built from other sources than those in {SOURCES}; run python -m multisa.kernels.cuda.build"
        )
