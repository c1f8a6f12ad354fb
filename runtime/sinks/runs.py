"""Runs of equal class ids in a mask, all classes in one pass: COCO's counts, and runs along the rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

_BITS, _MORE, _FIRST = 5, 32, 48  # of one character of COCO's counts
_MAX_CHARACTERS = 13  # for any number of 64 bits


@dataclass(frozen=True)
class CocoMask:
    """The mask of one class as COCO's tools read it."""

    class_id: int
    counts: str  # compressed run lengths, down the columns
    area: int  # pixels
    box: tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True, eq=False)
class ClassRuns:
    """Where one class is in a mask laid out flat: from each of `starts` up to each of `ends`."""

    class_id: int
    starts: Int64
    ends: Int64


def coco_masks(mask: UInt8) -> tuple[CocoMask, ...]:
    """Encode every class id in uint8 [H, W], by id. The same strings as pycocotools' encoder."""
    height = mask.shape[0]
    return tuple(
        CocoMask(
            runs.class_id,
            _compressed(_counts(runs, mask.size)),
            int((runs.ends - runs.starts).sum()),
            _box(runs, height),
        )
        for runs in _runs_of_classes(mask.ravel(order="F"))
    )


def row_runs(mask: UInt8) -> tuple[ClassRuns, ...]:
    """Find the runs of every class id in uint8 [H, W], by id; a run goes on into the next row."""
    return _runs_of_classes(mask.ravel())


def _runs_of_classes(flat: UInt8) -> tuple[ClassRuns, ...]:
    if not flat.size:
        return ()
    cuts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], cuts))
    ends = np.concatenate((cuts, [flat.size]))
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    ids, first = np.unique(values[order], return_index=True)
    groups = np.split(order, first[1:])
    return tuple(ClassRuns(int(i), starts[group], ends[group]) for i, group in zip(ids, groups, strict=True))


def _counts(runs: ClassRuns, size: int) -> Int64:
    """Lengths of what is not the class and what is, in turn; the first may be 0."""
    bounds = np.empty(2 * len(runs.starts) + 1, np.int64)
    bounds[0], bounds[1::2], bounds[2::2] = 0, runs.starts, runs.ends
    counts = np.diff(bounds)
    return counts if runs.ends[-1] == size else np.append(counts, size - runs.ends[-1])


def _compressed(counts: Int64) -> str:
    # From the fourth on, the difference to the number before the last; 5 bits a character, lowest first.
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    characters = np.zeros((len(rest), _MAX_CHARACTERS), np.uint8)
    alive = np.ones(len(rest), bool)
    for place in range(_MAX_CHARACTERS):
        low = rest & (2**_BITS - 1)
        rest >>= _BITS
        more = np.where(low & 2 ** (_BITS - 1), rest != -1, rest != 0)
        characters[alive, place] = (low + _FIRST + _MORE * more)[alive]
        alive &= more
        if not alive.any():
            break
    return characters[characters > 0].tobytes().decode("ascii")


def _box(runs: ClassRuns, height: int) -> tuple[int, int, int, int]:
    first, last = runs.starts // height, (runs.ends - 1) // height
    x, right = int(first.min()), int(last.max())
    if (first < last).any():  # a run over the end of a column touches the last row and the first
        y, bottom = 0, height - 1
    else:
        y, bottom = int((runs.starts % height).min()), int(((runs.ends - 1) % height).max())
    return x, y, right - x + 1, bottom - y + 1
