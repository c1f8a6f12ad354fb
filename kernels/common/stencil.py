"""The half stencil of pixel pairs. Every affinity array of the project stores its planes in this order.

A pair is stored once, at its upper (or left) pixel: plane p of an affinity array [P, h, w] holds, at (y, x),
the pair (y, x) -> (y + dy, x + dx) with (dy, dx) = stencil_offsets(radius)[p].
"""

import functools
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import check_integer

Boundary = Literal["full", "psa"]

# The compiled kernels keep tables of this many stencil rows. A radius of 64 already means 6,000 planes.
MAX_RADIUS = 64


@functools.lru_cache(maxsize=32)
def stencil_offsets(radius: int) -> tuple[tuple[int, int], ...]:
    """List the offsets (dy, dx) of the half stencil, dx^2 + dy^2 < radius^2, in reading order.

    The order is (0, 1..radius-1), then for dy = 1..radius-1 each dx from -(radius-1) to radius-1 (Ahn & Kwak
    2018). Radius 5 gives 34 offsets, radius 1 none. Raises TypeError or ValueError unless radius is an
    integer in 1..MAX_RADIUS.
    """
    radius = check_integer("radius", radius, minimum=1)
    if radius > MAX_RADIUS:
        raise ValueError(f"radius: got {radius}, expected at most {MAX_RADIUS}")
    reach = range(-(radius - 1), radius)
    right = [(0, dx) for dx in range(1, radius)]
    below = [(dy, dx) for dy in range(1, radius) for dx in reach if dx * dx + dy * dy < radius * radius]
    return (*right, *below)


@functools.lru_cache(maxsize=1024)
def path_offsets(dy: int, dx: int) -> tuple[tuple[int, int], ...]:
    """List the integer points of the straight path from (0, 0) to (dy, dx), both ends included.

    A point belongs to the path if its squared distance to the segment is below 1, as in irn (Ahn et al.
    2019). Such points lie in the box spanned by the two ends, so a path never leaves the grid. Points are in
    reading order.
    """
    length_squared = max(dy * dy + dx * dx, 1)
    rows = range(min(0, dy), max(0, dy) + 1)
    columns = range(min(0, dx), max(0, dx) + 1)
    return tuple((y, x) for y in rows for x in columns if (dy * x - dx * y) ** 2 < length_squared)


def pair_slices(offset: tuple[int, int], shape: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return indices (source, target) that select the two pixels of every in-grid pair of one offset.

    Both select arrays of equal shape from an [h, w] grid. They are empty if the offset does not fit the grid.
    """
    dy, dx = offset
    height, width = shape
    rows = max(height - dy, 0)
    columns = max(width - abs(dx), 0)
    left = max(-dx, 0)
    source = (slice(0, rows), slice(left, left + columns))
    target = (slice(dy, dy + rows), slice(left + dx, left + dx + columns))
    if rows == 0 or columns == 0:
        return (slice(0, 0), slice(0, 0)), (slice(0, 0), slice(0, 0))
    return source, target


def check_boundary(boundary: Boundary) -> None:
    """Raise ValueError unless `boundary` is "full" or "psa"."""
    if boundary not in get_args(Boundary):
        raise ValueError(f"boundary: got {boundary!r}, expected one of {', '.join(get_args(Boundary))}")


def edge_mask(radius: int, shape: tuple[int, int], boundary: Boundary) -> npt.NDArray[np.bool_]:
    """Mark the pairs that exist: bool [P, h, w].

    "full" keeps every pair whose target lies in the grid. "psa" also drops the pairs whose source lies within
    radius-1 pixels of the left, right or bottom border, as the code of Ahn & Kwak (2018) does.
    """
    check_boundary(boundary)
    height, width = shape
    offsets = stencil_offsets(radius)
    mask = np.zeros((len(offsets), height, width), dtype=np.bool_)
    for plane, offset in zip(mask, offsets, strict=True):
        source, _ = pair_slices(offset, shape)
        plane[source] = True
    if boundary == "psa":
        margin = radius - 1
        kept = np.zeros(shape, dtype=np.bool_)
        kept[: max(height - margin, 0), margin : max(width - margin, margin)] = True
        mask &= kept
    return mask
