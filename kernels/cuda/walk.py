"""The random walk on a device: which kernels run, on which grids, over which memory.

    walk = DeviceWalk(device, WalkShape(images=16, channels=4, height=64, width=64))
    walk.walk(scores, affinity, out, stream)     # device addresses; queues work and returns
    walk.check(stream)                           # waits; raises ValueError if the input was invalid

The transition matrix is stored as fp16 weights of the half stencil. D is computed from the rounded weights,
so every step is an average (rows sum to one). States are float32.
"""

from dataclasses import dataclass

import numpy as np

from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.device import (
    LARGEST_GRID_YZ,
    MAX_RADIUS,
    STENCIL_ERRORS,
    Argument,
    Device,
    ErrorWord,
    Workspace,
    check_positive,
    divide_up,
)

# As in walk.cuh.
TILE_WIDTH = 32  # pixels of a block
TILE_HEIGHT = 16
RUN = 4  # pixels of a thread
STEP_THREADS = TILE_WIDTH // RUN * TILE_HEIGHT
UNROLLED_RADIUS = 5
LARGEST_GROUP = 4  # channels of a block with unrolled steps
THREADS = 256  # of the kernels around the steps


@dataclass(frozen=True)
class WalkShape:
    """Scores are [images, channels, height, width], affinities [images, P, height, width]; all at least 1."""

    images: int
    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_positive(self)


class DeviceWalk:
    """The walk for one shape and one setting. Allocates its memory and records its steps once.

    Walks of one object share that memory: queue them on one stream, or create one object per stream.
    """

    def __init__(self, device: Device, shape: WalkShape, settings: WalkSettings | None = None) -> None:
        """Allocate the memory and record the steps.

        Raises ValueError for a radius above MAX_RADIUS or a batch larger than a launch can span.
        """
        settings = settings or WalkSettings()
        if settings.radius > MAX_RADIUS:
            raise ValueError(f"radius: got {settings.radius}, expected at most {MAX_RADIUS} on a device")
        self._device = device
        self._shape = shape
        self._settings = settings
        offsets = np.array(stencil_offsets(settings.radius), dtype=np.int32).reshape(-1, 2)
        self._pairs = len(offsets)
        self._lay_out()
        images = shape.images
        states = images * self._stored
        if max(images * self._pairs, states) > LARGEST_GRID_YZ:
            limit = LARGEST_GRID_YZ // max(self._pairs, self._stored)
            raise ValueError(f"images: got {images}, expected at most {limit} for {shape}; split the batch")
        plane = self._rows * self._pitch
        sizes = {"offsets": offsets.nbytes, "weights": 2 * images * self._pairs * plane}
        sizes |= {"inverse": 4 * images * plane, "centre": 4 * images * plane, "range": 8 * states}
        sizes |= dict.fromkeys(("first", "second", "total"), 4 * states * plane)
        self._memory = Workspace(device, sizes)
        self._errors = ErrorWord(device, STENCIL_ERRORS)
        device.upload(self._memory["offsets"], offsets)
        self._steps, self._result = self._plan()
        self._run_steps = device.record(self._queue_steps) if self._steps else None

    def walk(self, scores: int, affinity: int, out: int, stream: int = 0) -> None:
        """Queue the walk on `stream`. Does not wait.

        scores: address of float32 [images, channels, height, width], finite; affinity: of float32 [images, P,
        height, width] in [0, 1], both contiguous; out: of float32 as the scores, may equal `scores`. If an
        input is invalid, the result is undefined and `check` raises.
        """
        shape = self._shape
        memory = self._memory
        elements = divide_up(self._rows * self._pitch, THREADS)
        pairs = np.int32(self._pairs)
        if self._pairs:
            arguments = [affinity, memory["offsets"], memory["weights"], self._errors.pointer, *self._plane()]
            arguments += [pairs, np.int32(self._margin), np.float32(self._settings.beta)]
            self._launch("walk_weights", (elements, shape.images * self._pairs, 1), arguments, stream)
        arguments = [memory["weights"], memory["offsets"], memory["inverse"], memory["centre"]]
        self._launch("walk_row_sums", (elements, shape.images, 1), [*arguments, *self._plane(), pairs], stream)
        counts = [np.int32(shape.channels), np.int32(self._stored)]
        arguments = [scores, memory["first"], memory["second"], memory["total"], memory["range"]]
        arguments += [self._errors.pointer, *self._plane(), *counts, np.float32(self._start_coefficient)]
        self._launch("walk_start", (shape.images * self._stored, 1, 1), arguments, stream)
        if self._run_steps is not None:
            self._run_steps(stream)
        pixels = divide_up(shape.height * shape.width, THREADS)
        arguments = [memory[self._result], memory["range"], out, *self._plane(), *counts]
        self._launch("walk_finish", (pixels, shape.images * shape.channels, 1), arguments, stream)

    @property
    def error(self) -> int:
        """Device address of the word that `check` reads (STENCIL_ERRORS), for callers that must not wait."""
        return self._errors.pointer

    def check(self, stream: int = 0) -> None:
        """Wait for `stream`. Raise ValueError if a walk since the last check met invalid values."""
        self._errors.check(stream)

    def _lay_out(self) -> None:
        """Choose the channel groups and the padded planes (walk.cuh shows their layout)."""
        shape = self._shape
        settings = self._settings
        self._unrolled = settings.radius == UNROLLED_RADIUS
        groups = divide_up(shape.channels, LARGEST_GROUP) if self._unrolled else shape.channels
        self._group = divide_up(shape.channels, groups)
        self._groups = divide_up(shape.channels, self._group)
        self._stored = self._groups * self._group
        self._halo_y = settings.radius - 1
        self._halo_x = divide_up(self._halo_y, RUN) * RUN
        self._margin = settings.radius - 1 if settings.boundary == "psa" else 0
        self._tiles = divide_up(shape.width, TILE_WIDTH), divide_up(shape.height, TILE_HEIGHT)
        self._pitch = self._tiles[0] * TILE_WIDTH + 2 * self._halo_x
        self._rows = self._tiles[1] * TILE_HEIGHT + 2 * self._halo_y
        if self._rows * self._pitch >= 2**31 or self._tiles[1] > LARGEST_GRID_YZ:
            raise ValueError(f"height, width: got {shape.height}, {shape.width}, expected a smaller grid")

    def _plan(self) -> tuple[list[tuple[float, float, float]], str]:
        """List (scale, carry, coefficient) of every step, and name the region that holds the result."""
        series = self._settings.chebyshev_series()
        if not series:
            steps = self._settings.steps
            self._start_coefficient = 0.0
            return [(1.0, 0.0, 0.0)] * steps, "second" if steps % 2 else "first"
        self._start_coefficient = series[0]
        first = (1.0, 0.0, series[1])  # T_1(P) x = P x; from then on T_k+1 = 2 P T_k - T_k-1
        return [first, *((2.0, 1.0, coefficient) for coefficient in series[2:])], "total"

    def _queue_steps(self, stream: int) -> None:
        """Queue every step. Each overwrites the state before the one it reads."""
        memory = self._memory
        name = f"walk_step_{self._group}" if self._unrolled else "walk_step_any"
        extra = [] if self._unrolled else [np.int32(self._settings.radius), np.int32(self._pairs)]
        tile = (TILE_HEIGHT + 2 * self._halo_y) * (TILE_WIDTH + 2 * self._halo_x)
        grid = (*self._tiles, self._shape.images * self._groups)
        block = (STEP_THREADS, 1, 1)
        shared_bytes = 4 * self._group * tile
        current = memory["first"]
        following = memory["second"]
        for step in self._steps:
            arguments: list[Argument] = [memory["weights"], memory["inverse"], memory["centre"]]
            arguments += [current, following, memory["total"]]
            arguments += [np.int32(self._rows), np.int32(self._pitch), np.int32(self._groups)]
            arguments += [*(np.float32(number) for number in step), *extra]
            self._device.launch(name, grid, block, arguments, shared_bytes=shared_bytes, stream=stream)
            current, following = following, current

    def _plane(self) -> list[Argument]:
        """Return the geometry arguments of the kernels in walk_ends.cuh."""
        shape = self._shape
        sizes = (shape.height, shape.width, self._rows, self._pitch, self._halo_y, self._halo_x)
        return [np.int32(size) for size in sizes]

    def _launch(self, name: str, grid: tuple[int, int, int], arguments: list[Argument], stream: int) -> None:
        self._device.launch(name, grid, (THREADS, 1, 1), arguments, stream=stream)
