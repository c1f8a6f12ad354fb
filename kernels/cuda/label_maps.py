"""From class maps to labels on a device: which kernels run, on which grids.

maps = DeviceLabelMaps(device, (94, 125), (375, 500))
maps.probabilities(walked, 3, out, background=0.3, stream=stream)      # device addresses; nothing waits
queue_argmax(device, out, ids, 4, 375 * 500, mask, confidence, stream=stream)
"""

import numpy as np

from multisa.kernels.cuda.device import Argument, Device, Workspace, divide_up
from multisa.kernels.cuda.limits import LARGEST_GRID_YZ
from multisa.kernels.label_maps import bilinear_taps
from multisa.kernels.stencil import check_integer

THREADS = 256
PEAK_THREADS = 1024  # one block sees all values, so that they come from memory once and need no atomics


class DeviceLabelMaps:
    """Resizing of maps from one size to another; the filter's taps are uploaded here, once."""

    def __init__(self, device: Device, source: tuple[int, int], target: tuple[int, int]) -> None:
        """Upload the taps of (height, width) `source` to `target`. Raises ValueError for too large a size."""
        if max(source[0] * source[1], target[0] * target[1]) >= 2**31 - THREADS:
            raise ValueError(f"size: got {source} to {target}, expected fewer pixels")
        self._device, self._source, self._target = device, source, target
        axes = [bilinear_taps(*pair) for pair in zip(source, target, strict=True)]
        tables = {
            f"{name}{axis}": getattr(taps, name)
            for axis, taps in enumerate(axes)
            for name in ("first", "count", "weights")
        }
        sizes = {name: table.nbytes for name, table in tables.items()}
        self._memory = Workspace(device, sizes | {"peak": 4})
        for name, table in tables.items():
            device.upload(self._memory[name], table)
        self._taps: list[Argument] = []
        for axis, taps in enumerate(axes):
            self._taps += [self._memory[f"{name}{axis}"] for name in ("first", "count", "weights")]
            self._taps.append(np.int32(taps.weights.shape[1]))
        self._sizes = [np.int32(size) for size in (*source, *target)]

    def resize(self, maps: int, count: int, out: int, *, channels: int = 0, stream: int = 0) -> None:
        """Queue resizing `count` maps, float32 [., *source], into float32 [count, *target].

        channels: address of int32 [count], which map each is; 0: the first `count`.
        """
        if check_integer("count", count, minimum=1) > LARGEST_GRID_YZ:
            raise ValueError(f"count: got {count} maps, expected at most {LARGEST_GRID_YZ}")
        arguments = [maps, channels, *self._taps, *self._sizes, out]
        self._device.launch(
            "maps_resize", (self._blocks, count, 1), (THREADS, 1, 1), arguments, stream=stream
        )

    def probabilities(
        self,
        maps: int,
        count: int,
        out: int,
        *,
        background: float,
        gains: int = 0,
        to_peak: bool = False,
        stream: int = 0,
    ) -> None:
        """Queue `multisa.kernels.scores_to_probabilities`: float32 [count, *source] to [1 + count, *target].

        gains: address of float32 [count], or 0 for ones.
        """
        check_integer("count", count, minimum=1)
        peak = self._memory["peak"] if to_peak else 0
        if to_peak:
            values = np.int32(count * self._source[0] * self._source[1])
            self._device.launch(
                "maps_peak", (1, 1, 1), (PEAK_THREADS, 1, 1), (maps, values, peak), stream=stream
            )
        arguments = [maps, np.int32(count), *self._taps, *self._sizes, peak, gains]
        arguments += [np.float32(background), out]
        self._device.launch(
            "maps_to_probabilities", (self._blocks, 1, 1), (THREADS, 1, 1), arguments, stream=stream
        )

    @property
    def _blocks(self) -> int:
        return divide_up(self._target[0] * self._target[1], THREADS)


def queue_argmax(
    device: Device,
    probabilities: int,
    ids: int,
    labels: int,
    pixels: int,
    mask: int,
    confidence: int,
    *,
    soft: int = 0,
    stream: int = 0,
) -> None:
    """Queue `multisa.kernels.argmax_labels`: float32 [labels, pixels], ids int32 [labels] to uint8 [pixels].

    soft: address of float16 [labels, pixels] for the probabilities themselves, or 0.
    """
    arguments = (probabilities, ids, np.int32(labels), np.int32(pixels), mask, confidence, soft)
    grid = (divide_up(pixels, THREADS), 1, 1)
    device.launch("labels_argmax", grid, (THREADS, 1, 1), arguments, stream=stream)


def queue_take_errors(device: Device, walk: int, crf: int, out: int, *, stream: int = 0) -> None:
    """Queue moving the error words of a walk and a CRF (0: none) to uint32 [2] at `out`; clears them."""
    device.launch("take_errors", (1, 1, 1), (32, 1, 1), (walk, crf, out), stream=stream)
