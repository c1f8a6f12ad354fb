"""From class maps to labels on a device: bilinear resizing, background and normalisation, argmax.

    maps = DeviceLabelMaps(device, (94, 125), (375, 500))
    maps.probabilities(walked, 3, out, background=0.3, stream=stream)      # device addresses; does not wait
    queue_argmax(device, out, ids, 4, 375 * 500, mask, confidence, stream=stream)

The CPU path of the same steps is `multisa.runtime`'s post-processing, which resizes with Pillow.
"""

from dataclasses import dataclass

import numpy as np

from multisa.kernels.common.checks import Float32, Int32, check_integer
from multisa.kernels.cuda.device import LARGEST_GRID_YZ, Argument, Device, Workspace, divide_up

THREADS = 256
ENLARGE_COLUMNS = 32  # pixels of a block of labels_enlarge
ENLARGE_ROWS = 32
PEAK_THREADS = 1024  # one block reads all values once, without atomics


@dataclass(frozen=True)
class Taps:
    """Inputs and weights of every output of a resampled axis.

    first, count: int32 [outputs]; weights: float32 [outputs, most], 0 from `count` on, summing to one.
    """

    first: Int32
    count: Int32
    weights: Float32


def bilinear_taps(inputs: int, outputs: int) -> Taps:
    """Lay out Pillow's BILINEAR filter along one axis: half-pixel centres, widened when shrinking.

    After precompute_coeffs of Pillow's libImaging/Resample.c, in float64. With equal sizes each output is its
    input. Raises TypeError or ValueError unless both sizes are integers of at least 1.
    """
    check_integer("inputs", inputs, minimum=1)
    check_integer("outputs", outputs, minimum=1)
    scale = inputs / outputs
    support = max(scale, 1.0)
    centres = (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), inputs)
    count = last - first
    most = int(count.max())
    steps = np.arange(most)
    distance = np.abs((first[:, None] + steps - centres[:, None] + 0.5) / support)
    weights = np.where(steps < count[:, None], np.maximum(1.0 - distance, 0.0), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return Taps(first.astype(np.int32), count.astype(np.int32), weights.astype(np.float32))


class DeviceLabelMaps:
    """Resizing of maps from one size to another. The taps of the filter are uploaded once."""

    def __init__(self, device: Device, source: tuple[int, int], target: tuple[int, int]) -> None:
        """Upload the taps of (height, width) `source` to `target`. Raises ValueError for too large a size."""
        if max(source[0] * source[1], target[0] * target[1]) >= 2**31 - THREADS:
            raise ValueError(f"size: got {source} to {target}, expected fewer pixels")
        self._device = device
        self._source = source
        self._target = target
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

        channels: address of int32 [count], the index of each map to resize; 0 stands for the first `count`.
        """
        if check_integer("count", count, minimum=1) > LARGEST_GRID_YZ:
            raise ValueError(f"count: got {count} maps, expected at most {LARGEST_GRID_YZ}")
        arguments = [maps, channels, *self._taps, *self._sizes, out]
        self._device.launch("maps_resize", (self._blocks, count, 1), (THREADS, 1, 1), arguments, stream=stream)

    # more than six parameters: device addresses and numbers of one launch
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
        """Queue class maps, float32 [count, *source], to probabilities, float32 [1 + count, *target].

        Resizes the maps, multiplies them by `gains`, puts a constant `background` in front and divides by the
        sum of each pixel. gains: address of float32 [count], or 0 for ones. to_peak: divide by the highest
        value of all maps first, if it is above 0. Does not wait.
        """
        check_integer("count", count, minimum=1)
        peak = self._memory["peak"] if to_peak else 0
        if to_peak:
            values = np.int32(count * self._source[0] * self._source[1])
            self._device.launch("maps_peak", (1, 1, 1), (PEAK_THREADS, 1, 1), (maps, values, peak), stream=stream)
        arguments = [maps, np.int32(count), *self._taps, *self._sizes, peak, gains]
        arguments += [np.float32(background), out]
        self._device.launch("maps_to_probabilities", (self._blocks, 1, 1), (THREADS, 1, 1), arguments, stream=stream)

    @property
    def _blocks(self) -> int:
        return divide_up(self._target[0] * self._target[1], THREADS)


# more than six parameters: the argument list of the kernel
def queue_argmax(
    device: Device,
    probabilities: int,
    ids: int,
    labels: int,
    pixels: int,
    mask: int,
    confidence: int,
    *,
    probabilities_out: int = 0,
    stream: int = 0,
) -> None:
    """Queue the most probable label of every pixel, the first of equals, and its probability.

    Reads probabilities, float32 [labels, pixels] in [0, 1], and ids, int32 [labels] of 0..255. Writes mask,
    uint8 [pixels] of ids; confidence, uint8 [pixels], 255 times the highest probability, rounded as by
    `confidence_levels`; and probabilities_out, float16 [labels, pixels], a copy, unless it is 0. Does not
    wait.
    """
    arguments = (probabilities, ids, np.int32(labels), np.int32(pixels), mask, confidence, probabilities_out)
    grid = (divide_up(pixels, THREADS), 1, 1)
    device.launch("labels_argmax", grid, (THREADS, 1, 1), arguments, stream=stream)


# more than six parameters: the argument list of the kernel
def queue_enlarge(
    device: Device,
    probabilities: int,
    ids: int,
    classes: int,
    source: tuple[int, int],
    target: tuple[int, int],
    mask: int,
    confidence: int,
    *,
    stream: int = 0,
) -> None:
    """Queue `multisa.kernels.enlarge_probabilities`: bilinear resizing and argmax in one kernel.

    Reads probabilities, float32 [classes, *source] in [0, 1], and ids, int32 [classes] of 0..255. Writes mask and
    confidence, uint8 [*target] each, as `queue_argmax` does. Does not wait.
    """
    blocks = divide_up(target[1], ENLARGE_COLUMNS) * divide_up(target[0], ENLARGE_ROWS)
    sizes = [np.int32(size) for size in (classes, *source, *target)]
    arguments: list[Argument] = [probabilities, ids, *sizes, mask, confidence]
    device.launch("labels_enlarge", (blocks, 1, 1), (THREADS, 1, 1), arguments, stream=stream)


def queue_take_errors(device: Device, walk: int, crf: int, out: int, *, stream: int = 0) -> None:
    """Queue moving the error words of a walk and a CRF (0: none) to uint32 [2] at `out`, clearing them."""
    device.launch("take_errors", (1, 1, 1), (32, 1, 1), (walk, crf, out), stream=stream)
