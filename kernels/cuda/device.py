"""What a host schedule needs of a device: memory, launches by kernel name, and the replay of a schedule.

The schedules (walk.py, affinity.py, crf.py) are written once against `Device`: on a GPU `PycudaDevice`
carries them out, and the test suite carries out the very same launches on the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# A kernel argument: a plain int is a device address, a NumPy scalar is a value of just that type
# (np.int32 -> int, np.uint32 -> unsigned, np.int64 -> long long, np.float32 -> float).
Argument = int | np.generic
Dim3 = tuple[int, int, int]
Schedule = Callable[[int], None]  # takes the stream to work on

ALIGNMENT = 256  # bytes; what cuMemAlloc guarantees, and enough for any vector load


class Buffer(Protocol):
    """Device memory that lives as long as this object; new memory has no defined contents."""

    @property
    def pointer(self) -> int:
        """Device address of the first byte, a multiple of ALIGNMENT."""

    @property
    def size(self) -> int:
        """Size in bytes."""


class DeviceMemory(Protocol):
    """Memory of a CUDA device, or what stands for it. `stream` is a CUstream as an integer, 0 the default."""

    def allocate(self, size: int) -> Buffer:
        """Allocate `size` bytes (0 is allowed). Never called inside an operation, only in constructors."""

    def upload(self, target: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device; returns when it is there. For constructors only."""

    def download(self, source: int, array: npt.NDArray[Any], stream: int = 0) -> None:
        """Copy device memory into a contiguous array, after the work queued on `stream`; waits for it."""


class Device(DeviceMemory, Protocol):
    """A CUDA device that launches our kernels, or what stands for one."""

    def __hash__(self) -> int:
        """Tell devices apart: what is made for one is kept under it."""

    def fill(self, target: int, value: int, count: int, stream: int = 0) -> None:
        """Queue writing `count` 32-bit words `value` (unsigned) from `target` on; does not wait."""

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
        """Queue one launch of the `extern "C"` kernel `name` of kernels.cu; does not wait.

        A grid with a 0 in it is an error: a schedule leaves out a launch that has nothing to do.
        """

    def record(self, schedule: Schedule) -> Schedule:
        """Call `schedule(stream)` once, recording its fills and launches (a CUDA graph), not running them.

        Returns a function that queues all of them at once on the stream it is given. Addresses and values are
        those of the recording.
        """


class Workspace:
    """Named regions in one allocation.

    workspace = Workspace(device, {"state": 4 * pixels, "flags": 4})
    workspace["state"]                    # the device address
    """

    def __init__(self, device: Device, sizes: Mapping[str, int]) -> None:
        """Allocate the regions of `sizes` (bytes each), every one at a multiple of ALIGNMENT."""
        offsets: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._buffer = device.allocate(total)
        self._offsets = offsets

    def __getitem__(self, name: str) -> int:
        """Return the device address of the region `name`."""
        return self._buffer.pointer + self._offsets[name]

    @property
    def size(self) -> int:
        """Size of all regions in bytes."""
        return self._buffer.size


def divide_up(count: int, size: int) -> int:
    """Return how many pieces of `size` cover `count`."""
    return -(-count // size)
