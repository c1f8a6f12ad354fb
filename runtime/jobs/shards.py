"""Writing the files of one shard: all are on the disk under other names before the first takes its own.

with ShardFolder(out, number) as files:   # OUT/.multisa/tmp/...
    files.write("masks/a.png", data)
    result = files.commit()               # renamed into place; the journal's line comes after that
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from multisa.runtime.errors import ImageError, MultisaError
from multisa.runtime.files import flush_folder, sha256_of_file

PRIVATE = ".multisa"  # below OUT: all that may differ between two runs
TEMPORARY = f"{PRIVATE}/tmp"
PARTS = f"{PRIVATE}/parts"
FILES = "files"  # the part that lists a shard's files

_ESCAPED = re.compile(r"\\([\\nr])")  # as sha256sum has them
_PLAIN = {"\\": "\\", "n": "\n", "r": "\r"}
_FLUSHERS = 8  # flushes wait for the disk, so several wait at once
_NAME_MAX, _PATH_MAX = 255, 4096  # bytes; where the system does not say


@dataclass(frozen=True)
class _File:
    relative: str
    temporary: Path
    size: int
    sha256: str


class ShardFolder:
    """Keeps the files of a shard until they are committed; a context manager, which removes what is left."""

    def __init__(self, out: Path, shard: int, guard: str = "") -> None:
        """guard: a file below OUT without which nothing takes its name any more; "" for none.

        It goes with the run, and a machine that was given up may be done with its shard long after that.
        """
        self._out, self._guard = out, guard
        self._shard = shard
        # Another process may be at the same shard when a machine that was given up is still alive.
        self._folder = out / TEMPORARY / f"{shard:06d}-{secrets.token_hex(4)}"
        self._folder.mkdir(parents=True)
        self._files: dict[str, _File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, relative: str, data: bytes) -> None:
        """Keep a file for the posix path `relative` below OUT. Raises ValueError where that leaves it."""
        if relative in self._files:
            raise ValueError(f"{relative}: written twice in shard {self._shard}, expected once")
        temporary = self._folder / str(len(self._files))
        below(self._out, relative)
        temporary.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        self._files[relative] = _File(relative, temporary, len(data), digest)

    def write_part(self, writer: str, data: bytes) -> None:
        """Keep what the end of the run needs of this shard."""
        self.write(part_path(writer, self._shard), data)

    def commit(self) -> tuple[int, str]:
        """Flush everything, rename it into place; returns the bytes and the SHA-256 of the part "files".

        That part has a line for each file, as sha256sum writes and checks them.
        """
        checksums = b"".join(_checksum_line(self._files[path]) for path in sorted(self._files))
        self.write_part(FILES, checksums)
        # In this order the list takes its name before any result does: what is there can always be found.
        files = [self._files[path] for path in sorted(self._files)]
        with ThreadPoolExecutor(_FLUSHERS, thread_name_prefix="flush") as flushers:
            list(flushers.map(_flush, (file.temporary for file in files)))
            folders = _make_folders(self._out, {below(self._out, file.relative).parent for file in files})
            if self._guard and not (self._out / self._guard).is_file():
                raise MultisaError(f"{self._out}: the run that shard {self._shard} was done for has ended")
            self._remove_others()
            for file in files:
                file.temporary.replace(below(self._out, file.relative))
            list(flushers.map(flush_folder, sorted(folders)))
        return sum(file.size for file in files), hashlib.sha256(checksums).hexdigest()

    def _remove_others(self) -> None:
        """Remove what this shard has left when it was done before and is not to have any more.

        An image that was done by a commit that was cut may have failed now. The list that knows of its files
        is replaced next.
        """
        part = self._out / part_path(FILES, self._shard)
        for relative, _ in listed_files(part) if part.is_file() else ():
            if relative not in self._files:
                remove_file(self._out, relative)


class FinishedFolder:
    """The folder of a run whose shards are all committed, as sinks see it at the end."""

    def __init__(self, out: Path, shards: Iterable[int]) -> None:
        self.out, self._shards = out, tuple(shards)
        self.written: list[str] = []

    def parts(self, writer: str) -> Iterator[bytes]:
        """What `write_part` was given for `sink`, shard by shard."""
        for shard in self._shards:
            yield (self.out / part_path(writer, shard)).read_bytes()

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below OUT piece by piece; it is flushed, and takes its name, at the end."""
        target = below(self.out, relative)
        temporary = self.out / TEMPORARY / secrets.token_hex(8)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            folders = _make_folders(self.out, {target.parent})
            temporary.replace(target)
            for folder in folders:
                flush_folder(folder)
            self.written.append(relative)
        finally:
            temporary.unlink(missing_ok=True)


def listed_files(part: Path) -> Iterator[tuple[str, str]]:
    """(path below OUT, SHA-256) of every file of a committed shard, from its part "files"."""
    for line in part.read_bytes().splitlines():
        text = line.decode(errors="surrogateescape")
        digest, _, relative = text.removeprefix("\\").partition("  ")
        if text.startswith("\\"):
            relative = _ESCAPED.sub(lambda found: _PLAIN[found[1]], relative)
        yield relative, digest


def is_intact(out: Path, shard: int, sha256: str) -> bool:
    """Whether every file of a committed shard is there with the bytes that were written.

    sha256: of its part "files", from the journal.
    """
    part = out / part_path(FILES, shard)
    try:
        return sha256_of_file(part) == sha256 and all(
            sha256_of_file(below(out, path)) == digest for path, digest in listed_files(part)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def _checksum_line(file: _File) -> bytes:
    escaped = file.relative.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "" if escaped == file.relative else "\\"
    return f"{mark}{file.sha256}  {escaped}\n".encode(errors="surrogateescape")


def part_path(writer: str, shard: int) -> str:
    """Where a part of a shard is kept, below OUT."""
    return f"{PARTS}/{writer}/{shard:06d}"


def below(out: Path, relative: str) -> Path:
    """The path `relative` below OUT. Raises ValueError for one that would leave it."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in relative:
        raise ValueError(f"{relative!r}: expected a path below the folder of the results")
    return out / path


def remove_file(out: Path, relative: str) -> None:
    """Remove a file of the results, if it is one: a list that was altered leads nowhere else."""
    try:
        path = below(out, relative)
    except ValueError:
        return
    if not leads_elsewhere(out, path.parent) and not path.is_dir():
        path.unlink(missing_ok=True)


def leads_elsewhere(out: Path, folder: Path) -> bool:
    """Whether a link below one of the folders of results leads out of it, say into the images.

    The folders right below OUT may be links, to another disk for instance; a run checks them at its start.
    """
    parts = folder.relative_to(out).parts
    return not folder.resolve().is_relative_to(out.joinpath(*parts[:1]).resolve())


def check_path_length(out: Path, relative: str) -> None:
    """Raise ImageError where the file system cannot hold a path of results."""
    longest = max(len(os.fsencode(part)) for part in PurePosixPath(relative).parts)
    whole = len(os.fsencode(out.absolute() / relative))
    if longest > _NAME_MAX or whole >= _PATH_MAX:
        reason = os.strerror(errno.ENAMETOOLONG)
        raise ImageError(f"its results cannot be written: {reason}: rename the image")


def clear_temporary(out: Path) -> None:
    """Remove what runs that were cut have left under other names."""
    shutil.rmtree(out / TEMPORARY, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(out: Path, folders: set[Path]) -> set[Path]:
    """Make folders below OUT; returns all whose entries change, those that hold a new folder included."""
    changed = set(folders)
    for folder in folders:
        if leads_elsewhere(out, folder):
            raise MultisaError(
                f"{folder}: is reached through a link to {folder.resolve()}, expected folders of the results "
                "alone: remove the link, and the same command goes on"
            )
        missing = folder
        while not missing.exists() and missing != out:
            missing = missing.parent
            changed.add(missing)
        folder.mkdir(parents=True, exist_ok=True)
    return changed
