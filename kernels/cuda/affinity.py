"""Affinities on a device: which kernels run, on which grids.

affinity = DeviceAffinity(device, GridShape(images=16, height=64, width=64))
affinity.from_boundary(boundary, out, stream)     # device addresses; queues work and returns
affinity.check(stream)                            # waits; raises ValueError if the input was invalid
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import check_integer
from multisa.kernels.common.stencil import path_offsets, stencil_offsets
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

# As in affinity.cuh.
TILE_WIDTH = 32  # pixels of a block
TILE_HEIGHT = 8
RUN = 4  # pixels of a thread
FEATURE_CHUNK = 16  # features in shared memory at once
UNROLLED_RADIUS = 5
THREADS = 256


@dataclass(frozen=True)
class GridShape:
    """A batch of grids; all at least 1."""

    images: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_positive(self)


class DeviceAffinity:
    """Both affinities for one shape and radius. The tables of the stencil are uploaded once."""

    def __init__(self, device: Device, shape: GridShape, radius: int = 5) -> None:
        """Upload the tables. Raises ValueError for a radius above MAX_RADIUS or too large a batch."""
        if check_integer("radius", radius, minimum=1) > MAX_RADIUS:
            raise ValueError(f"radius: got {radius}, expected at most {MAX_RADIUS} on a device")
        self._device = device
        self._shape = shape
        self._radius = radius
        offsets = stencil_offsets(radius)
        self._pairs = len(offsets)
        rows = divide_up(shape.height, TILE_HEIGHT)
        if max(shape.images * max(self._pairs, 1), rows) > LARGEST_GRID_YZ:
            raise ValueError(f"images, height: got {shape}, expected less in one batch; split it")
        if shape.height * shape.width >= 2**31 - THREADS:
            raise ValueError(f"height, width: got {shape.height}, {shape.width}, expected a smaller grid")
        self._tiles = divide_up(shape.width, TILE_WIDTH), rows, shape.images
        paths, points = _path_table(offsets)
        pairs = np.array(offsets, dtype=np.int32).reshape(-1, 2)
        tables = {"offsets": pairs, "paths": paths, "points": points}
        self._memory = Workspace(device, {name: table.nbytes for name, table in tables.items()})
        for name, table in tables.items():
            device.upload(self._memory[name], table)
        self._errors = ErrorWord(device, STENCIL_ERRORS)

    def from_features(self, features: int, depth: int, out: int, stream: int = 0) -> None:
        """Queue exp(-mean over D of |f_i - f_j|) (Ahn & Kwak 2018, equation 1). Does not wait.

        features: address of float32 [images, depth, height, width], finite; out: of float32 [images, P,
        height, width], both contiguous. Raises ValueError unless depth is at least 1.
        """
        check_integer("depth", depth, minimum=1)
        if not self._pairs:
            return
        sizes: list[Argument] = [np.int32(depth), np.int32(self._shape.height), np.int32(self._shape.width)]
        if self._radius == UNROLLED_RADIUS:
            block = TILE_WIDTH // RUN * TILE_HEIGHT, UNROLLED_RADIUS, 1
            tile = (TILE_WIDTH + 2 * RUN) * (TILE_HEIGHT + UNROLLED_RADIUS - 1)
            shared_bytes = 4 * min(depth, FEATURE_CHUNK) * tile
            arguments = [features, out, self._errors.pointer, *sizes]
            self._device.launch(
                "affinity_features", self._tiles, block, arguments, shared_bytes=shared_bytes, stream=stream
            )
            return
        pixels = divide_up(self._shape.height * self._shape.width, THREADS)
        arguments = [features, self._memory["offsets"], out, self._errors.pointer, *sizes]
        arguments.append(np.int32(self._pairs))
        grid = (pixels, self._shape.images * self._pairs, 1)
        self._device.launch("affinity_features_any", grid, (THREADS, 1, 1), arguments, stream=stream)

    def from_boundary(self, boundary: int, out: int, stream: int = 0) -> None:
        """Queue 1 - max over the straight path (Ahn et al. 2019). Does not wait.

        boundary: address of float32 [images, height, width] in [0, 1]; out: of float32 [images, P, height,
        width], both contiguous.
        """
        if not self._pairs:
            return
        reach = self._radius - 1
        shared_bytes = 4 * (TILE_WIDTH + 2 * reach) * (TILE_HEIGHT + reach)
        sizes = (self._shape.height, self._shape.width, self._pairs, reach)
        arguments: list[Argument] = [boundary, self._memory["paths"], self._memory["points"], out]
        arguments += [self._errors.pointer, *(np.int32(size) for size in sizes)]
        block = (TILE_WIDTH * TILE_HEIGHT, 1, 1)
        self._device.launch(
            "affinity_boundary", self._tiles, block, arguments, shared_bytes=shared_bytes, stream=stream
        )

    def check(self, stream: int = 0) -> None:
        """Wait for `stream`. Raise ValueError if a call since the last check met invalid values."""
        self._errors.check(stream)


def _path_table(offsets: tuple[tuple[int, int], ...]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """List (dy, dx, first, last + 1) of every pair, and the points (dy, dx) of all paths in one list."""
    paths: list[tuple[int, int, int, int]] = []
    points: list[tuple[int, int]] = []
    for dy, dx in offsets:
        path = path_offsets(dy, dx)
        paths.append((dy, dx, len(points), len(points) + len(path)))
        points.extend(path)
    return np.array(paths, dtype=np.int32).reshape(-1, 4), np.array(points, dtype=np.int32).reshape(-1, 2)
