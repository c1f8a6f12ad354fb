"""The journal of a run: one line for each committed shard, in OUT/.multisa/journal.jsonl.

    {"shard": 12, "images": 250, "failed": 6, "bytes": 1043200, "sha256": "..."}

A shard counts as done when its line, newline included, is on the disk; nothing else does. A line that a kill
or a loss of power has torn can only be the last one; it is cut off, and its shard is done again.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from multisa.runtime.errors import MultisaError

_LINE = re.compile(
    rb'\{"shard": (\d{1,9}), "images": (\d{1,9}), "failed": (\d{1,9}), "bytes": \d{1,18}, '
    rb'"sha256": "[0-9a-f]{64}"\}\n'
)
_PIECE = 1 << 24


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard holds; its line."""

    shard: int
    images: int  # with a mask
    failed: int
    bytes: int  # of all files
    sha256: str  # over the paths and the bytes of all files

    def line(self) -> bytes:
        """As the journal keeps it."""
        return (
            f'{{"shard": {self.shard}, "images": {self.images}, "failed": {self.failed}, '
            f'"bytes": {self.bytes}, "sha256": "{self.sha256}"}}\n'
        ).encode()


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

    def _load(self) -> None:
        position, rest = 0, b""
        while piece := os.read(self._file, _PIECE):
            data = rest + piece
            end = 0
            for match in _LINE.finditer(data):
                if match.start() != end:
                    break
                shard, images, failed = match.groups()
                self._count(int(shard), int(images), int(failed))
                end = match.end()
            position, rest = position + end, data[end:]
            newline = rest.find(b"\n")
            if 0 <= newline < len(rest) - 1:
                raise MultisaError(
                    f"{self._path}: got {rest[:60]!r} at byte {position}, expected a line of a journal: "
                    "it was altered; begin anew with --overwrite, or restore the file"
                )
        if rest:
            self.torn = True
            os.ftruncate(self._file, position)
            os.fsync(self._file)

    def _count(self, shard: int, images: int, failed: int) -> None:
        if shard >= len(self._done):
            self._done.extend(bytes(max(shard + 1, 2 * len(self._done)) - len(self._done)))
        if not self._done[shard]:
            self._done[shard] = 1
            self.shards += 1
            self.images += images
            self.failed += failed
