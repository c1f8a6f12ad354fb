"""The files of one shard: written under temporary names, flushed, then renamed into place together.

with ShardFolder(output, number) as files:   # OUT/.multisa/tmp/...
    files.write("masks/a.png", data)
    size, sha256 = files.commit()            # the journal's line comes after that
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import ImageError, MultisaError
from multisa.runtime.files import flush_file, flush_folder, sha256_of_file
from multisa.runtime.sources.storage import JOB_FOLDER

PRIVATE = JOB_FOLDER  # below OUT: everything that may differ between two runs
TEMPORARY = f"{PRIVATE}/tmp"
PARTS = f"{PRIVATE}/parts"
FILES = "files"  # the part that lists a shard's files

_ESCAPED = re.compile(r"\\([\\nr])")  # as sha256sum escapes names
_UNESCAPED = {"\\": "\\", "n": "\n", "r": "\r"}
_FLUSH_THREADS = 8  # a flush waits for the disk, so several wait in parallel
_MAX_NAME = 255  # bytes of a file name, in the common file systems
_MAX_PATH = 4096  # bytes of a path, on Linux


@dataclass(frozen=True)
class _File:
    relative: str
    temporary: Path
    size: int
    sha256: str


class ShardFolder(AbstractContextManager["ShardFolder"]):
    """Holds the files of a shard until they are committed; a context manager, which removes what is left."""

    def __init__(self, output: Path, shard: int, guard: str = "") -> None:
        """guard: a file below OUT that must still exist at the commit; "" for none.

        It is removed with the run, and a machine that was given up may finish its shard long after that.
        """
        self._output = output
        self._guard = guard
        self._shard = shard
        # Another process may work on the same shard if a machine that was given up still runs.
        self._folder = output / TEMPORARY / f"{shard:06d}-{secrets.token_hex(4)}"
        self._folder.mkdir(parents=True)
        self._files: dict[str, _File] = {}

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, relative: str, data: bytes) -> None:
        """Keep a file for the posix path `relative` below OUT. Raises ValueError for a path outside OUT."""
        if relative in self._files:
            raise ValueError(f"{relative}: written twice in shard {self._shard}, expected once")
        temporary = self._folder / str(len(self._files))
        path_below(self._output, relative)
        temporary.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        self._files[relative] = _File(relative, temporary, len(data), digest)

    def write_part(self, writer: str, data: bytes) -> None:
        """Keep what finalizing the run needs of this shard."""
        self.write(part_path(writer, self._shard), data)

    def commit(self) -> tuple[int, str]:
        """Flush all files and rename them into place.

        Returns the total size in bytes and the SHA-256 of the part "files", which has a line for each file in
        the format of sha256sum.
        """
        checksums = b"".join(_checksum_line(self._files[path]) for path in sorted(self._files))
        self.write_part(FILES, checksums)
        # Sorted, the list is renamed before any result: whatever is in place can be found.
        files = [self._files[path] for path in sorted(self._files)]
        with ThreadPoolExecutor(_FLUSH_THREADS, thread_name_prefix="flush") as threads:
            list(threads.map(flush_file, (file.temporary for file in files)))
            parents = {path_below(self._output, file.relative).parent for file in files}
            folders = _make_folders(self._output, parents)
            if self._guard and not (self._output / self._guard).is_file():
                raise MultisaError(f"{self._output}: the run that shard {self._shard} belongs to has ended")
            self._remove_obsolete()
            for file in files:
                file.temporary.replace(path_below(self._output, file.relative))
            list(threads.map(flush_folder, sorted(folders)))
        return sum(file.size for file in files), hashlib.sha256(checksums).hexdigest()

    def _remove_obsolete(self) -> None:
        """Remove files that an earlier attempt has left and that the shard no longer has.

        An image that an interrupted commit has written may have failed this time. The list of its files is
        replaced next.
        """
        part = self._output / part_path(FILES, self._shard)
        for relative, _ in listed_files(part) if part.is_file() else ():
            if relative not in self._files:
                remove_file(self._output, relative)


class CommittedShards:
    """The parts of committed shards, and the files that finalizing the run makes of them; a RunFolder."""

    def __init__(self, output: Path, shards: Iterable[int]) -> None:
        self.output = output
        self.written: list[str] = []
        self._shards = tuple(shards)

    def parts(self, writer: str) -> Iterator[bytes]:
        """What `write_part` was given for a writer, shard by shard."""
        for shard in self._shards:
            yield (self.output / part_path(writer, shard)).read_bytes()

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below OUT piece by piece; it is flushed and renamed into place at the end."""
        target = path_below(self.output, relative)
        temporary = self.output / TEMPORARY / secrets.token_hex(8)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            folders = _make_folders(self.output, {target.parent})
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
            relative = _ESCAPED.sub(lambda found: _UNESCAPED[found[1]], relative)
        yield relative, digest


def is_intact(output: Path, shard: int, sha256: str) -> bool:
    """Whether every file of a committed shard exists with the bytes that were written.

    sha256: of its part "files", from the journal.
    """
    part = output / part_path(FILES, shard)
    try:
        return sha256_of_file(part) == sha256 and all(
            sha256_of_file(path_below(output, path)) == digest for path, digest in listed_files(part)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def _checksum_line(file: _File) -> bytes:
    escaped = file.relative.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "" if escaped == file.relative else "\\"
    return f"{mark}{file.sha256}  {escaped}\n".encode(errors="surrogateescape")


def part_path(writer: str, shard: int) -> str:
    """Path below OUT of a part of a shard."""
    return f"{PARTS}/{writer}/{shard:06d}"


def path_below(output: Path, relative: str) -> Path:
    """The path `relative` below OUT. Raises ValueError for one that leads out of it."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in relative:
        raise ValueError(f"{relative!r}: expected a path below the folder of the results")
    return output / path


def remove_file(output: Path, relative: str) -> bool:
    """Remove a file of the results, if it exists; returns whether `relative` can be one.

    Paths that lead out of OUT, from a list that was altered, are ignored.
    """
    try:
        path = path_below(output, relative)
    except ValueError:
        return False
    if leads_elsewhere(output, path.parent) or path.is_dir():
        return False
    path.unlink(missing_ok=True)
    return True


def leads_elsewhere(output: Path, folder: Path) -> bool:
    """Whether a link in one of the folders of results leads out of it, for instance to the images.

    The folders right below OUT may be links, for instance to another disk; a run checks them at its start.
    """
    parts = folder.relative_to(output).parts
    return not folder.resolve().is_relative_to(output.joinpath(*parts[:1]).resolve())


def check_path_length(output: Path, relative: str) -> None:
    """Raise ImageError if the file system cannot hold a path of the results."""
    longest = max(len(os.fsencode(part)) for part in PurePosixPath(relative).parts)
    whole = len(os.fsencode(output.absolute() / relative))
    if longest > _MAX_NAME or whole >= _MAX_PATH:
        reason = os.strerror(errno.ENAMETOOLONG)
        raise ImageError(f"its results cannot be written: {reason}: rename the image")


def clear_temporary(output: Path) -> None:
    """Remove the temporary files of runs that were interrupted."""
    shutil.rmtree(output / TEMPORARY, ignore_errors=True)


def _make_folders(output: Path, folders: set[Path]) -> set[Path]:
    """Create folders below OUT; returns all folders whose entries change, parents of new ones included."""
    changed = set(folders)
    for folder in folders:
        if leads_elsewhere(output, folder):
            raise MultisaError(
                f"{folder}: is a link to {folder.resolve()} or lies behind one, expected only folders of the "
                "results: remove the link, then run the same command again to resume"
            )
        missing = folder
        while not missing.exists() and missing != output:
            missing = missing.parent
            changed.add(missing)
        folder.mkdir(parents=True, exist_ok=True)
    return changed
