"""The journal of a run: one line for each committed shard, in OUT/.multisa/journal.jsonl.

    {"shard":        12, "images":       250, "failed":         6, "bytes":  ..., "sha256": "..."}

All lines are of one length, which is what lets millions of them be read in a moment.
A shard counts as done when its line, newline included, is on the disk; nothing else does. A line that a kill
or a loss of power has torn can only be the last one; it is cut off, and its shard is done again.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import MultisaError
from multisa.runtime.files import flush_folder

_NUMBER = 9  # digits of a count, padded with blanks
_LINES_AT_ONCE = 1 << 16
_EXPECTED = "expected a line of a journal: it was altered; restore the file, or begin anew with --overwrite"


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard holds; its line."""

    shard: int
    images: int  # with a mask
    failed: int
    size: int  # bytes of all files
    sha256: str  # of the list of its files and their digests

    def line(self) -> bytes:
        """As the journal keeps it."""
        return (
            f'{{"shard": {self.shard:{_NUMBER}}, "images": {self.images:{_NUMBER}}, '
            f'"failed": {self.failed:{_NUMBER}}, "bytes": {self.size:18}, "sha256": "{self.sha256}"}}\n'
        ).encode()


_SAMPLE = np.frombuffer(ShardResult(0, 0, 0, 0, "0" * 64).line(), np.uint8)
_WIDTH = len(_SAMPLE)
_STARTS = tuple(
    _SAMPLE.tobytes().index(f'"{key}": '.encode()) + len(key) + 4 for key in ("shard", "images", "failed")
)
# Where a line is as all others are: up to the value of "bytes", without the three numbers.
_FIXED = np.ones(_WIDTH, bool)
_FIXED[_SAMPLE.tobytes().index(b'"bytes": ') + 9 : -3] = False
for _start in _STARTS:
    _FIXED[_start : _start + _NUMBER] = False


class Journal:
    """Which shards are committed; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open, or begin. Raises MultisaError for a line, but the last, that is no line of a journal."""
        self._path = path
        self._done = bytearray()  # one byte a shard
        self.images = self.failed = self.shards = 0
        self.torn = False  # whether the last line was cut off
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            flush_folder(path.parent)
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def __contains__(self, shard: int) -> bool:
        return shard < len(self._done) and bool(self._done[shard])

    def append(self, result: ShardResult) -> None:
        """Count a shard as done; returns when the disk has it."""
        line = result.line()
        written = os.write(self._file, line)
        if written != len(line):  # a full disk may take a part of it
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(28, os.strerror(28), str(self._path))
        os.fsync(self._file)
        self._count(result.shard, result.images, result.failed)

    def digests(self) -> Iterator[tuple[int, str]]:
        """(shard, SHA-256 of its list of files), in the order of the lines. Raises MultisaError."""
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    values = json.loads(line)
                    yield values["shard"], values["sha256"]
                except (ValueError, TypeError, KeyError) as error:  # what opening it does not look at
                    raise MultisaError(
                        f"{self._path}: got {line[:60]!r} as line {number} ({error}), {_EXPECTED}"
                    ) from error

    def _load(self) -> None:
        size = os.fstat(self._file).st_size
        position = 0
        while lines := os.pread(self._file, _LINES_AT_ONCE * _WIDTH, position):
            rows = np.frombuffer(lines[: len(lines) // _WIDTH * _WIDTH], np.uint8).reshape(-1, _WIDTH)
            good = _leading(rows)
            self._count_all(rows[:good])
            position += good * _WIDTH
            if good < len(rows) or not len(rows):
                break
        if position < size:
            self._cut_off(position, size)

    def _cut_off(self, position: int, size: int) -> None:
        """Remove the last line, which is torn. Raises MultisaError when it is not the last one."""
        rest = os.pread(self._file, 2 * _WIDTH, position)
        if len(rest) > _WIDTH:
            raise MultisaError(f"{self._path}: got {rest[:60]!r} at byte {position}, {_EXPECTED}")
        self.torn = True
        os.ftruncate(self._file, position)
        os.fsync(self._file)

    def _count_all(self, rows: npt.NDArray[np.uint8]) -> None:
        if not len(rows):
            return
        shards, images, failed = _numbers(rows).T
        self._grow(int(shards.max()))
        done = np.frombuffer(self._done, np.uint8)
        # A shard that was done again has two lines, of which the first one counts.
        numbers, first = np.unique(shards, return_index=True)
        new = first[done[numbers] == 0]
        done[numbers] = 1
        self.shards += len(new)
        self.images += int(images[new].sum())
        self.failed += int(failed[new].sum())

    def _grow(self, shard: int) -> None:
        if shard >= len(self._done):
            self._done = bytearray(self._done) + bytes(max(shard + 1, 2 * len(self._done)) - len(self._done))

    def _count(self, shard: int, images: int, failed: int) -> None:
        self._grow(shard)
        if not self._done[shard]:
            self._done[shard] = 1
            self.shards += 1
            self.images += images
            self.failed += failed


def _numbers(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Shard, images and failed of lines, int64 [n, 3]; a blank counts as the digit 0 that it stands for."""
    numbers = np.zeros((len(rows), len(_STARTS)), np.int64)
    for place in range(_NUMBER):
        for column, start in enumerate(_STARTS):
            numbers[:, column] = numbers[:, column] * 10 + (rows[:, start + place] & 15)
    return numbers


def _leading(rows: npt.NDArray[np.uint8]) -> int:
    """How many of the first rows are lines of a journal."""
    wrong = (rows[:, _FIXED] != _SAMPLE[_FIXED]).any(axis=1)
    for start in _STARTS:
        digits = rows[:, start : start + _NUMBER]
        wrong |= ((digits != ord(" ")) & ((digits < ord("0")) | (digits > ord("9")))).any(axis=1)
    places = np.flatnonzero(wrong)
    return int(places[0]) if len(places) else len(rows)
