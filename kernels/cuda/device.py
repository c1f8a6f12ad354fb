"""What a host schedule needs from a device: memory, launches by kernel name, recorded schedules, error words.

The schedules (walk.py, affinity.py, crf.py, label_maps.py) are written once against `Device`. `PycudaDevice`
runs them on a GPU; the test suite runs the same launches on the CPU.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import check_integer

# A kernel argument: a plain int is a device address, a NumPy scalar is a value of just that type
# (np.int32 -> int, np.uint32 -> unsigned, np.int64 -> long long, np.float32 -> float).
Argument = int | np.generic
Dim3 = tuple[int, int, int]
Schedule = Callable[[int], None]  # takes the stream to work on

ALIGNMENT = 256  # bytes; what cuMemAlloc guarantees, and enough for any vector load
LARGEST_GRID_YZ = 65535  # blocks along the second and third axis of a grid
MAX_RADIUS = 16  # a tile with its halo must fit the 48 KB of shared memory that every device grants

# Bits of the error word of walk and affinities, as in stencil.cuh.
STENCIL_ERRORS = {
    1: "affinity: got values outside [0, 1] or NaN, expected [0, 1]; check the network's output",
    2: "scores: got NaN or infinity, expected finite values; check the network's output",
    4: "boundary: got values outside [0, 1] or NaN, expected [0, 1]; apply the sigmoid first",
    8: "features: got NaN or infinity, expected finite values; check the network's output",
}


class Buffer(Protocol):
    """Device memory that lives as long as this object; new memory has no defined contents."""

    @property
    def pointer(self) -> int:
        """Device address of the first byte, a multiple of ALIGNMENT."""

    @property
    def size(self) -> int:
        """Size in bytes."""


class DeviceMemory(Protocol):
    """Memory of a CUDA device or its emulation. `stream` is a CUstream as an integer, 0 the default."""

    def allocate(self, size: int) -> Buffer:
        """Allocate `size` bytes (0 is allowed). Called in constructors only, never inside an operation."""

    def upload(self, target: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device and wait for it. For constructors only."""

    def download(self, source: int, array: npt.NDArray[Any], stream: int = 0) -> None:
        """Wait for the work queued on `stream`, then copy device memory into a contiguous array."""


class Device(DeviceMemory, Protocol):
    """A CUDA device that launches our kernels, or its emulation."""

    def __hash__(self) -> int:
        """Tell devices apart: caches of memory and graphs use the device as a key."""

    def fill(self, target: int, value: int, count: int, stream: int = 0) -> None:
        """Queue writing `count` 32-bit words `value` (unsigned) from `target` on. Does not wait."""

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
        """Queue one launch of the `extern "C"` kernel `name` of kernels.cu. Does not wait.

        A grid with a 0 in it is an error: a schedule omits a launch that has nothing to do.
        """

    def record(self, schedule: Schedule) -> Schedule:
        """Call `schedule(stream)` once and record its fills and launches (a CUDA graph) without running them.

        Returns a function that queues all of them at once on the stream it gets. Addresses and values are
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


class ErrorWord:
    """A word on the device in which kernels set a bit when they meet invalid input.

    Kernels cannot raise, and reading the word waits for the device, so only `check` reads it.
    """

    size = 4  # bytes

    def __init__(self, device: Device, messages: Mapping[int, str]) -> None:
        """Allocate the word and clear it; `messages` has the meaning of each bit."""
        self._device = device
        self._messages = messages
        self._buffer = device.allocate(self.size)
        device.upload(self.pointer, np.zeros(1, dtype=np.uint32))

    @property
    def pointer(self) -> int:
        """Device address of the word."""
        return self._buffer.pointer

    def check(self, stream: int) -> None:
        """Wait for `stream`. Raise ValueError for the bits set since the last check, and clear them."""
        word = np.zeros(1, dtype=np.uint32)
        self._device.download(self.pointer, word, stream)
        if not word[0]:
            return
        self._device.fill(self.pointer, 0, 1, stream)
        raise ValueError(describe_errors(int(word[0]), self._messages))


def describe_errors(word: int, messages: Mapping[int, str]) -> str:
    """Return the messages of the bits set in an error word, "" for 0."""
    return "; ".join(text for bit, text in messages.items() if word & bit)


def check_positive(sizes: Any) -> None:
    """Raise TypeError or ValueError unless every field of the dataclass `sizes` is an integer >= 1."""
    for field in dataclasses.fields(sizes):
        check_integer(field.name, getattr(sizes, field.name), minimum=1)
