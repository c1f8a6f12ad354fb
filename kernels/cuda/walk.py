"""The random walk on a device: which kernels run, on which grids, over which memory.

    walk = DeviceWalk(device, WalkShape(images=16, channels=4, height=64, width=64))
    walk.walk(scores, affinity, out, stream)     # device addresses; queues work and returns
    walk.check(stream)                           # waits; raises ValueError if the input was not valid

The transition matrix is kept as fp16 weights of the half stencil, and D is made of these rounded weights, so
every step is an average (rows sum to one); states are float32.
"""

from dataclasses import dataclass

import numpy as np

from multisa.kernels.cuda.device import Argument, Device, Workspace, divide_up
from multisa.kernels.cuda.limits import LARGEST_GRID_YZ, MAX_RADIUS, ErrorWord, check_positive
from multisa.kernels.random_walk import chebyshev_coefficients, chebyshev_degree, check_walk_numbers
from multisa.kernels.stencil import Boundary, check_boundary, check_integer, stencil_offsets

# As in walk.cuh: pixels of a block, pixels of a thread, and the radius whose steps are unrolled.
TILE_WIDTH, TILE_HEIGHT, RUN = 32, 16, 4
STEP_THREADS = TILE_WIDTH // RUN * TILE_HEIGHT
UNROLLED_RADIUS, LARGEST_GROUP = 5, 4
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


@dataclass(frozen=True)
class WalkSettings:
    """What `multisa.kernels.random_walk` takes under the same names; radius at most MAX_RADIUS here."""

    radius: int = 5
    beta: float = 8.0
    steps: int = 256
    exact: bool = False
    boundary: Boundary = "full"

    def __post_init__(self) -> None:
        check_integer("radius", self.radius, minimum=1)
        if self.radius > MAX_RADIUS:
            raise ValueError(f"radius: got {self.radius}, expected at most {MAX_RADIUS} on a device")
        check_walk_numbers(self.beta, self.steps)
        check_boundary(self.boundary)


class DeviceWalk:
    """The walk for one shape and one setting: memory is allocated and the steps are recorded here, once.

    Walks of one object share that memory: queue them on one stream, or make one object for each stream.
    """

    def __init__(self, device: Device, shape: WalkShape, settings: WalkSettings | None = None) -> None:
        """Reserve the memory and record the steps.

        Raises ValueError when the batch is larger than a launch can span.
        """
        self._device, self._shape = device, shape
        self._settings = settings = settings or WalkSettings()
        offsets = np.array(stencil_offsets(settings.radius), dtype=np.int32).reshape(-1, 2)
        self._pairs = len(offsets)
        self._lay_out()
        images, states = shape.images, shape.images * self._stored
        if max(images * self._pairs, states) > LARGEST_GRID_YZ:
            limit = LARGEST_GRID_YZ // max(self._pairs, self._stored)
            raise ValueError(f"images: got {images}, expected at most {limit} for {shape}; split the batch")
        plane = self._rows * self._pitch
        sizes = {"offsets": offsets.nbytes, "weights": 2 * images * self._pairs * plane}
        sizes |= {"inverse": 4 * images * plane, "centre": 4 * images * plane, "range": 8 * states}
        sizes |= dict.fromkeys(("first", "second", "total"), 4 * states * plane)
        self._memory = Workspace(device, sizes)
        self._errors = ErrorWord(device)
        device.upload(self._memory["offsets"], offsets)
        self._steps, self._result = self._plan()
        self._run_steps = device.record(self._queue_steps) if self._steps else None

    def walk(self, scores: int, affinity: int, out: int, stream: int = 0) -> None:
        """Queue the walk on `stream`; nothing waits.

        scores: address of float32 [images, channels, height, width], finite; affinity: of float32 [images, P,
        height, width] in [0, 1], both contiguous; out: of float32 as the scores, which may be the scores
        themselves. Where an input is not valid the result means nothing and `check` says so.
        """
        shape, memory = self._shape, self._memory
        elements = divide_up(self._rows * self._pitch, THREADS)
        pairs = np.int32(self._pairs)
        if self._pairs:
            arguments = [affinity, memory["offsets"], memory["weights"], self._errors.pointer, *self._plane()]
            arguments += [pairs, np.int32(self._margin), np.float32(self._settings.beta)]
            self._launch("walk_weights", (elements, shape.images * self._pairs, 1), arguments, stream)
        arguments = [memory["weights"], memory["offsets"], memory["inverse"], memory["centre"]]
        self._launch(
            "walk_row_sums", (elements, shape.images, 1), [*arguments, *self._plane(), pairs], stream
        )
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
        """Device address of the word that `check` reads (limits.bad_input), for who must not wait for it."""
        return self._errors.pointer

    def check(self, stream: int = 0) -> None:
        """Wait for `stream`; raise ValueError if a walk since the last check met invalid values."""
        self._errors.check(stream)

    def _lay_out(self) -> None:
        """Choose the channel groups and the padded planes (walk.cuh says what they look like)."""
        shape, settings = self._shape, self._settings
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
        """List (scale, carry, coefficient) of every step, and name the region that then holds the result."""
        steps = self._settings.steps
        degree = steps if self._settings.exact else chebyshev_degree(steps)
        if degree >= steps:
            self._start_coefficient = 0.0
            return [(1.0, 0.0, 0.0)] * steps, "second" if steps % 2 else "first"
        series = chebyshev_coefficients(steps, degree)
        self._start_coefficient = series[0]
        first = (1.0, 0.0, series[1])  # T_1(P) x = P x; from then on T_k+1 = 2 P T_k - T_k-1
        return [first, *((2.0, 1.0, coefficient) for coefficient in series[2:])], "total"

    def _queue_steps(self, stream: int) -> None:
        """Queue every step; each writes over the state before the one it reads."""
        memory, rows, pitch = self._memory, self._rows, self._pitch
        name = f"walk_step_{self._group}" if self._unrolled else "walk_step_any"
        extra = [] if self._unrolled else [np.int32(self._settings.radius), np.int32(self._pairs)]
        tile = (TILE_HEIGHT + 2 * self._halo_y) * (TILE_WIDTH + 2 * self._halo_x)
        grid = (*self._tiles, self._shape.images * self._groups)
        current, following = memory["first"], memory["second"]
        for step in self._steps:
            arguments: list[Argument] = [memory["weights"], memory["inverse"], memory["centre"]]
            arguments += [current, following, memory["total"]]
            arguments += [np.int32(rows), np.int32(pitch), np.int32(self._groups)]
            arguments += [*(np.float32(number) for number in step), *extra]
            block, shared_bytes = (STEP_THREADS, 1, 1), 4 * self._group * tile
            self._device.launch(name, grid, block, arguments, shared_bytes=shared_bytes, stream=stream)
            current, following = following, current

    def _plane(self) -> list[Argument]:
        """The geometry arguments of the kernels in walk_ends.cuh."""
        height, width = self._shape.height, self._shape.width
        sizes = (height, width, self._rows, self._pitch, self._halo_y, self._halo_x)
        return [np.int32(size) for size in sizes]

    def _launch(self, name: str, grid: tuple[int, int, int], arguments: list[Argument], stream: int) -> None:
        self._device.launch(name, grid, (THREADS, 1, 1), arguments, stream=stream)
