"""What the schedules share beyond memory: limits of a launch, and how kernels report bad input."""

import dataclasses
from typing import Any

import numpy as np

from multisa.kernels.cuda.device import Device
from multisa.kernels.stencil import check_integer

LARGEST_GRID_YZ = 65535
MAX_RADIUS = 16  # a tile with its halo must fit the 48 KB of shared memory that every device grants

# Bits as in stencil.cuh, with what they mean.
BAD_INPUT = {
    1: "affinity: got values outside [0, 1] or NaN, expected [0, 1]; check the network's output",
    2: "scores: got NaN or infinity, expected finite values; check the network's output",
    4: "boundary: got values outside [0, 1] or NaN, expected [0, 1]; apply the sigmoid first",
    8: "features: got NaN or infinity, expected finite values; check the network's output",
}


class ErrorWord:
    """A word on the device whose bits kernels set when they meet input they are not defined for.

    Kernels cannot raise, and asking them would wait for the device: so the word is read only by `check`.
    """

    def __init__(self, device: Device) -> None:
        """Allocate the word and clear it."""
        self._device = device
        self._buffer = device.allocate(4)
        device.upload(self.pointer, np.zeros(1, dtype=np.uint32))

    @property
    def pointer(self) -> int:
        """Device address of the word."""
        return self._buffer.pointer

    def check(self, stream: int) -> None:
        """Wait for `stream`; raise ValueError for the bits set since the last check, and clear them."""
        word = np.zeros(1, dtype=np.uint32)
        self._device.download(self.pointer, word, stream)
        if not word[0]:
            return
        self._device.fill(self.pointer, 0, 1, stream)
        raise ValueError(bad_input(int(word[0])))


def bad_input(word: int) -> str:
    """Say what the bits of an error word mean; nothing for 0."""
    return "; ".join(text for bit, text in BAD_INPUT.items() if word & bit)


def check_positive(sizes: Any) -> None:
    """Raise TypeError or ValueError unless every field of the dataclass `sizes` is an integer >= 1."""
    for field in dataclasses.fields(sizes):
        check_integer(field.name, getattr(sizes, field.name), minimum=1)
