"""Runs of equal class ids in a mask, as formats ask for them; the kernel finds those of all at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels import encode_rle

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CocoMask:
    """The mask of one class as COCO's tools read it."""

    class_id: int
    counts: str  # compressed run lengths, down the columns
    area: int  # pixels
    box: tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True, eq=False)
class FlatRuns:
    """Where one class is in a mask laid out flat: from each of `starts` up to each of `ends`."""

    class_id: int
    starts: Int64
    ends: Int64


def coco_masks(mask: UInt8) -> tuple[CocoMask, ...]:
    """Encode every class id in uint8 [H, W], by id. The same strings as pycocotools' encoder."""
    return tuple(
        CocoMask(runs.class_id, runs.compressed.decode("ascii"), runs.area, runs.box)
        for runs in encode_rle(mask)
    )


def row_runs(mask: UInt8) -> tuple[FlatRuns, ...]:
    """Find the runs of every class id in uint8 [H, W], by id; a run goes on into the next row."""
    found = []
    for runs in encode_rle(mask):
        bounds = np.cumsum(runs.rows, dtype=np.int64)  # outside, inside, outside, ...
        ends = bounds[1::2]
        found.append(FlatRuns(runs.class_id, bounds[: 2 * len(ends) : 2], ends))
    return tuple(found)
