"""The journal of a run: one line for each committed shard, in OUT/.multisa/journal.jsonl.

    {"shard":        12, "images":       250, "failed":         6, "bytes":  ..., "sha256": "..."}

A shard counts as done when its line, including the newline, is on the disk. Only the last line can be
incomplete, after a kill or a power failure; it is cut off, and its shard is processed again.

The lines are plain JSON: a million of them (256 million images at the default shard size) load in about 4 s.
They are padded to one length, which bounds what an incomplete line can be.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from multisa.runtime.errors import MultisaError
from multisa.runtime.files import flush_folder

_NUMBER = 9  # digits of a count, padded with blanks
_SIZE = 18  # digits of a number of bytes
_EXPECTED = "expected a line of a journal: the file was altered; restore it, or start over with --overwrite"


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard contains."""

    shard: int
    images: int  # with a mask
    failed: int
    size: int  # bytes of all files
    sha256: str  # of the list of its files and their digests

    def line(self) -> bytes:
        """Its line in the journal."""
        return (
            f'{{"shard": {self.shard:{_NUMBER}}, "images": {self.images:{_NUMBER}}, '
            f'"failed": {self.failed:{_NUMBER}}, "bytes": {self.size:{_SIZE}}, "sha256": "{self.sha256}"}}\n'
        ).encode()

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read a line. Raises ValueError unless it is exactly what `line` writes."""
        try:
            value = json.loads(line)
            result = cls(value["shard"], value["images"], value["failed"], value["bytes"], value["sha256"])
            if result.line() == line:
                return result
        except (TypeError, KeyError, RecursionError):
            pass
        raise ValueError("not a line of a journal")


_LINE_LENGTH = len(ShardResult(0, 0, 0, 0, "0" * 64).line())


class Journal(AbstractContextManager["Journal"]):
    """Which shards are committed; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises MultisaError if any line but the last is not a line of a journal."""
        self._path = path
        self._done = bytearray()  # one byte a shard, since there may be millions
        self.shards = 0
        self.images = 0
        self.failed = 0
        self.torn = False  # whether an incomplete last line was cut off
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            flush_folder(path.parent)
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def __contains__(self, shard: int) -> bool:
        return shard < len(self._done) and bool(self._done[shard])

    def append(self, result: ShardResult) -> None:
        """Count a shard as done; returns when its line is on the disk. Raises OSError."""
        line = result.line()
        size = os.fstat(self._file).st_size
        try:
            while line:  # a full disk may take a part of it; writing the rest then raises the reason
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        os.fsync(self._file)
        self._count(result)

    def digests(self) -> Iterator[tuple[int, str]]:
        """(shard, SHA-256 of its list of files), in the order of the lines."""
        with self._path.open("rb") as lines:
            for result in map(ShardResult.parse, lines):
                yield result.shard, result.sha256

    def _load(self) -> None:
        position = 0
        with self._path.open("rb") as lines:
            for line in lines:
                try:
                    result = ShardResult.parse(line)
                except ValueError as error:
                    rest = line + lines.read(_LINE_LENGTH)
                    if len(rest) > _LINE_LENGTH:  # not the last line
                        raise MultisaError(
                            f"{self._path}: got {rest[:60]!r} at byte {position}, {_EXPECTED}"
                        ) from error
                    break
                self._count(result)
                position += len(line)
        if position < os.fstat(self._file).st_size:
            self.torn = True
            os.ftruncate(self._file, position)
            os.fsync(self._file)

    def _count(self, result: ShardResult) -> None:
        if result.shard >= len(self._done):
            size = max(result.shard + 1, 2 * len(self._done))
            self._done.extend(bytes(size - len(self._done)))
        if not self._done[result.shard]:  # a shard that was done twice counts once
            self._done[result.shard] = 1
            self.shards += 1
            self.images += result.images
            self.failed += result.failed
