"""Where one batch enters and leaves a device: pinned memory on the host, its twin there, and its events.

With two slots one batch is on its way in or out while the networks run on the other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.device import ALIGNMENT
from multisa.kernels.cuda.pycuda_context import PinnedBuffer, PrimaryContext, PycudaBuffer

ERROR_BYTES = 8  # two words before each image's mask: what the walk and the CRF found wrong


class PinnedTwin:
    """Memory on both sides that grows to what is asked for; growing must not meet work under way."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Start with none."""
        self._gpu = gpu
        self._device: PycudaBuffer | None = None
        self._host: PinnedBuffer | None = None

    def reserve(self, size: int) -> None:
        """See to `size` bytes; what they hold is then not defined."""
        if self._device is None or self._device.size < size:
            self._device = self._host = None  # given back before more is taken
            self._device, self._host = self._gpu.allocate(size), self._gpu.allocate_pinned(size)

    @property
    def pointer(self) -> int:
        """Device address of the first byte."""
        assert self._device is not None
        return self._device.pointer

    def host(self, offset: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """View the host's side."""
        assert self._host is not None
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        viewed: npt.NDArray[Any] = self._host.array[offset : offset + size].view(dtype)
        return viewed.reshape(shape)

    def upload(self, size: int, stream: int) -> None:
        """Queue copying the first bytes to the device."""
        assert self._host is not None
        self._gpu.driver.upload(self.pointer, self._host.pointer, size, stream)

    def download(self, offset: int, size: int, stream: int, source: int = 0) -> None:
        """Queue copying these bytes to the host; `source`: from another device address."""
        assert self._host is not None
        target = self._host.pointer + offset
        self._gpu.driver.download(target, source or self.pointer + offset, size, stream)


@dataclass(frozen=True)
class OutputLayout:
    """Offsets in bytes of one image's output, [errors, mask, confidence] and then, apart, the soft maps."""

    pixels: int
    soft_labels: int  # 0: no soft maps

    @property
    def mask(self) -> int:
        """Behind the error words."""
        return ERROR_BYTES

    @property
    def confidence(self) -> int:
        """Behind the mask."""
        return ERROR_BYTES + self.pixels

    @property
    def bytes(self) -> int:
        """Of what is always copied back: one piece."""
        return ERROR_BYTES + 2 * self.pixels

    @property
    def soft(self) -> int:
        """Aligned, behind the rest."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stride(self) -> int:
        """From one image of a batch to the next."""
        size = self.soft + 2 * self.soft_labels * self.pixels
        return -(-size // ALIGNMENT) * ALIGNMENT


class Slot:
    """Memory and events of one batch under way."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Make the events; memory comes with the first batch."""
        self.image, self.lists, self.scores, self.output = (PinnedTwin(gpu) for _ in range(4))
        with gpu.active():
            self.scored, self.done = gpu.driver.create_event(), gpu.driver.create_event()
