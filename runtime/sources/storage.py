"""Stores: the file access that sources need from a disk or a bucket, and the store of local disks.

Stores raise OSError; `reason_of` turns one into text.
"""

import errno
import hashlib
import io
import os
import re
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging.decode import EXTENSIONS, MAX_FILE_BYTES

JOB_FOLDER = ".multisa"  # marks a folder with the results of a job, whose masks are no images to process
LONGEST_NAME = 255  # bytes of one file or folder name, on every usual file system
LONGEST_PATH = 2000  # bytes; half of what Linux allows, because the output folder needs some

# Extensions of files that are, or hold, images in formats that nothing here reads; what to do with them.
_UNREAD_FORMATS = {
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".jxr", ".psd", ".svg", ".exr", ".hdr", ".dcm"), "convert it"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "develop the raw file"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".pdf"), "extract its images"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, or name it as the source"),
}
# Of masks that stand beside an image (WebDataset, and many data sets in folders).
_MASK_ENDING = re.compile(r"\.(?:masks?|seg|segmentation|labels?|gt)\.png$", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_PORTABLE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
# Fast path: nearly all paths match.
_PLAIN = re.compile(r"[\w-][\w. -]*(?:/[\w-][\w. -]*)*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")


def extension(name: str) -> str:
    """Return the extension of a name in lower case, with its dot; "" without one, as of .hidden."""
    stem, _, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if stem and ending else ""


def is_image(name: str) -> bool:
    """Return whether a name has the extension of an image."""
    return extension(name) in EXTENSIONS


def unread_format(name: str) -> str:
    """Return why a file whose extension is that of an image or archive is not read, or "" for any other."""
    ending = extension(name)
    remedy = _UNREAD_FORMATS.get(ending)
    return f"{ending} is not a supported format ({remedy})" if remedy else ""


def mask_name(name: str) -> str:
    """Return why a name like cat.mask.png is skipped, or "" for any other name."""
    found = _MASK_ENDING.search(name)
    return f"a mask by its name ({found[0]})" if found else ""


def is_tar(name: str) -> bool:
    """Return whether a name has the extension of an uncompressed tar file."""
    return name.lower().endswith(".tar")


def printable(name: str) -> str:
    """Escape the parts of `name` that are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def bad_name(name: str) -> str:
    """Return why a name in a folder is skipped, or ""."""
    if name.startswith("."):
        return "hidden"
    return "" if _is_utf8(name) else "its name is not UTF-8"


def unsafe_path(path: str) -> str:
    """Return why a path from an archive or a bucket is unsafe below the output folder, or ""."""
    if len(path) <= LONGEST_NAME and _PLAIN.fullmatch(path):
        return ""
    if not _is_utf8(path):
        return "its name is not UTF-8"
    if path.startswith("/") or _DRIVE.match(path):
        return "absolute path"
    if "\\" in path:
        return "backslash in its name"
    if _CONTROL.search(path):
        return "control character in its name"
    parts = path.split("/")
    if ".." in parts:
        return "path that leaves its folder (..)"
    if "" in parts or "." in parts:
        return "empty name in its path"
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if len(path.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in parts):
        return "its name is too long"
    return ""


def relative_member_name(name: str) -> str:
    """Strip the leading "./" that some programs write before the names of members."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def member_problem(name: str, size: int, problem: str) -> str:
    """Return why an archive member of this name and size is skipped, or ""; `problem` is a known reason."""
    too_large = f"got {size} bytes, expected at most {MAX_FILE_BYTES}" if size > MAX_FILE_BYTES else ""
    return unsafe_path(name) or problem or too_large or mask_name(name)


def safe_id(path: str) -> str:
    """Turn any path into a relative path that `unsafe_path` accepts.

    A safe path is its own id. Other paths can share one: see `unique_id`.
    """
    if path and not unsafe_path(path):
        return path
    parts = [_safe_part(part) for part in path.split("/") if part not in ("", ".", "..")]
    joined = "/".join(parts) or "_"
    if len(joined.encode()) <= LONGEST_PATH:
        return joined
    return f"{_digest(path)}-{parts[-1]}" if len(parts[-1].encode()) < LONGEST_NAME - 20 else _digest(path)


def unique_id(taken: str, uri: str, attempt: int = 0) -> str:
    """Return another id for `uri` when the id `taken` is in use; a different one for every attempt."""
    path = PurePosixPath(taken)
    suffix = _short_suffix(taken)
    stem = path.name.removesuffix(suffix).encode()[: LONGEST_NAME - 40].decode(errors="ignore")
    mark = _digest(f"{attempt}:{uri}")
    marked = str(path.with_name(f"{stem}~{mark}{suffix}"))
    return marked if len(marked.encode()) <= LONGEST_PATH else mark + suffix


class SeenHashes:
    """A grow-only set of texts that takes 12 to 24 bytes per text (a `set` takes 100).

    Stores 64 bits of a digest: among n texts, a collision has a probability of n^2 / 2^65 (one in 370,000 for
    ten million).
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, text: str) -> bool:
        """Add `text`; return False if the set already contains it."""
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        value = int.from_bytes(digest, "little") or 1  # 0 is an empty slot
        if not _put(self._slots, value):
            return False
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            larger = array("Q", bytes(16 * len(self._slots)))
            for old in self._slots:
                if old:
                    _put(larger, old)
            self._slots = larger
        return True


def _put(slots: "array[int]", value: int) -> bool:
    mask = len(slots) - 1
    i = value & mask
    while slots[i]:
        if slots[i] == value:
            return False
        i = (i + 1) & mask
    slots[i] = value
    return True


def _safe_part(part: str) -> str:
    part = _NOT_PORTABLE.sub("_", printable(part))
    if part.startswith("."):
        part = "_" + part[1:]
    if len(part.encode()) <= LONGEST_NAME:
        return part
    stem = part.encode()[: LONGEST_NAME - 40].decode(errors="ignore")
    return f"{stem}~{_digest(part)}{_short_suffix(part)}"


def _short_suffix(path: str) -> str:
    suffix = PurePosixPath(path).suffix
    return suffix if len(suffix.encode()) <= 16 else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

NameFilter = Callable[[str], bool]  # whether files of this name are listed with size and version

CHANGED = "changed since it was listed: finish with the files as they were, or start a new run"

_LARGEST_READ = 2**30  # bytes; no directory of an archive needs as much
_HEADER_WINDOW = 8192  # bytes: a header and its neighbours
# The folders that contain mount points.
_OF_DISKS = re.compile(r"/(?:mnt|Volumes|(?:run/)?media(?:/[^/]+)?)?")


class Entry(NamedTuple):
    """One name in a folder."""

    name: str
    is_folder: bool
    size: int = -1
    version: str = ""
    problem: str = ""  # why it is skipped


@dataclass(frozen=True)
class Blob(ABC):
    """One file, open for reading at any offset."""

    size: int  # bytes
    version: str  # as in SourceItem
    window: int  # bytes to request at once when reading sequentially

    @abstractmethod
    def read_at(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only at the end of the file."""


class BlobFile(io.RawIOBase):
    """A blob as a seekable binary file."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek as io.IOBase does. Raises OSError for a position before the start."""
        position = (0, self._position, self._blob.size)[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, f"byte {position} lies before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer`, except at the end of the file. Raises ValueError for a huge one, OSError."""
        view = memoryview(buffer).cast("B")
        if len(view) > _LARGEST_READ:
            raise ValueError(f"got a directory of {len(view)} bytes, expected at most {_LARGEST_READ}")
        length = max(0, min(len(view), self._blob.size - self._position))
        data = self._blob.read_at(self._position, length) if length else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


class Store(ABC):
    """Holds files under paths that `join` builds. Several threads may call every method at once."""

    @abstractmethod
    def folder(self, path: str, keep: NameFilter) -> Iterator[Entry]:
        """Yield the names in a folder, sorted by code point; sizes and versions only if `keep(name)`."""

    @abstractmethod
    def open(self, path: str) -> AbstractContextManager[Blob]:
        """Open a file for random access."""

    @abstractmethod
    def stream(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for sequential reading."""

    @abstractmethod
    def read(self, path: str, size: int, version: str) -> bytes:
        """Return a file. Raises ImageError if its size (unless -1) or version differs, or it is too large."""

    @abstractmethod
    def read_range(self, path: str, start: int, length: int, version: str) -> bytes:
        """Return a part of a file, shorter at its end. Raises ImageError if the file is known to differ."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Return whether `path` is a file, or a folder that is not empty."""

    @abstractmethod
    def is_reachable(self, path: str) -> bool:
        """Return whether the disk or server of a file that existed responds, even if the file is gone."""


def join(root: str, relative: str) -> str:
    """Return the path of `relative` below the folder `root`."""
    return f"{root.rstrip('/')}/{relative}" if root else relative


def last_name(folder: str) -> str:
    """Return the name of a folder; of the current one if `folder` is "" or "."."""
    path = folder if "://" in folder else os.path.abspath(folder)  # noqa: PTH100 (text, as all paths)
    return path.rstrip("/").rpartition("/")[2]


def reason_of(error: OSError) -> str:
    """Return the reason without the path, which the messages name themselves."""
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    if isinstance(error, PermissionError):
        return os.strerror(errno.EACCES)
    return error.strerror or str(error) or type(error).__name__


def check_size(got: int, expected: int) -> None:
    """Raise ImageError for a file whose size differs from the listed one or exceeds MAX_FILE_BYTES."""
    if expected >= 0 and got != expected:
        raise ImageError(f"got {got} bytes, expected the {expected} it had when it was listed: {CHANGED}")
    if got > MAX_FILE_BYTES:
        raise ImageError(f"got {got} bytes, expected at most {MAX_FILE_BYTES}")


def check_version(got: str, expected: str) -> None:
    """Raise ImageError if both versions are known and differ."""
    if got and expected and got != expected:
        raise ImageError(CHANGED)


@dataclass(frozen=True)
class _LocalBlob(Blob):
    descriptor: int

    def read_at(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := os.pread(self.descriptor, length, offset)):
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class LocalStore(Store):
    """Files of this machine. Links must not lead out of `root`; None allows all of them."""

    def __init__(self, root: str | None = None) -> None:
        self._root = None if root is None else os.path.realpath(root)

    def folder(self, path: str, keep: NameFilter) -> Iterator[Entry]:
        with os.scandir(path) as scan:
            # In reverse, so that entries can be popped off the end and freed.
            entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
        return self._entries(entries, keep)

    @contextmanager
    def open(self, path: str) -> Iterator[Blob]:
        if self._leaves(path):
            raise OSError(errno.EINVAL, "symbolic link that leaves the folder")
        # Non-blocking: the file may have been replaced by a pipe that nobody writes to.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            yield _LocalBlob(status.st_size, str(status.st_mtime_ns), _HEADER_WINDOW, descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def stream(self, path: str) -> Iterator[BinaryIO]:
        with self.open(path) as blob:
            assert isinstance(blob, _LocalBlob)
            with open(os.dup(blob.descriptor), "rb") as file:  # noqa: PTH123 (it is a descriptor)
                yield file

    def read(self, path: str, size: int, version: str) -> bytes:
        with self.open(path) as blob:
            check_size(blob.size, size)
            check_version(blob.version, version)
            return blob.read_at(0, blob.size)

    def read_range(self, path: str, start: int, length: int, version: str) -> bytes:
        with self.open(path) as blob:
            check_version(blob.version, version)
            return blob.read_at(start, length)

    def exists(self, path: str) -> bool:
        """See Store. A disk that is gone often leaves an empty folder."""
        try:
            return _holds_any(path)
        except NotADirectoryError:
            return True
        except OSError:
            return False

    def is_reachable(self, path: str) -> bool:
        """See Store. A disk that is gone leaves an empty folder, a link that leads nowhere, or nothing."""
        folder, below = os.path.dirname(os.path.abspath(path)), ""  # noqa: PTH100, PTH120 (text, as all paths)
        while folder != below:
            try:
                # An automounted disk that is gone takes its folder along.
                return _holds_any(folder) and not (below and _OF_DISKS.fullmatch(folder))
            except (FileNotFoundError, NotADirectoryError):
                if os.path.islink(folder):  # noqa: PTH114
                    return False
            except PermissionError:  # files in a folder that cannot be listed may still be readable
                return os.path.exists(folder)  # noqa: PTH110
            except OSError:
                return False
            folder, below = os.path.dirname(folder), folder  # noqa: PTH120
        return False

    def _leaves(self, path: str) -> bool:
        if self._root is None:
            return False
        real = os.path.realpath(path)
        return real != self._root and not real.startswith(self._root.rstrip("/") + "/")

    def _entries(self, entries: list["os.DirEntry[str]"], keep: NameFilter) -> Iterator[Entry]:
        while entries:
            entry = entries.pop()
            try:
                yield self._entry(entry, keep)
            except OSError as error:  # deleted since the folder was listed
                yield Entry(entry.name, False, problem=reason_of(error))

    def _entry(self, entry: "os.DirEntry[str]", keep: NameFilter) -> Entry:
        problem = bad_name(entry.name)
        if entry.is_symlink():
            is_folder = entry.is_dir()
            if not problem and self._leaves(entry.path):
                problem = "symbolic link that leaves the folder"
            if not problem and is_folder:
                problem = "symbolic link to a folder"
            if not problem and not os.path.exists(entry.path):  # noqa: PTH110 (a Path for each is slow)
                problem = "broken symbolic link"
            if problem:
                return Entry(entry.name, is_folder, problem=problem)
        elif entry.is_dir():
            if not problem and os.path.isdir(f"{entry.path}/{JOB_FOLDER}"):  # noqa: PTH112 (a Path for each is slow)
                problem = "the results of a job"
            return Entry(entry.name, True, problem=problem)
        if problem or not keep(entry.name):
            return Entry(entry.name, False, problem=problem)
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            return Entry(entry.name, False, problem="not a regular file")
        return Entry(entry.name, False, status.st_size, str(status.st_mtime_ns))


def _holds_any(folder: str) -> bool:
    with os.scandir(folder) as scan:
        return next(scan, None) is not None
