"""Names in sources: which are images, which are safe below the output folder, which occurred before."""

import hashlib
import re
from array import array
from pathlib import PurePosixPath

from multisa.runtime.imaging.decode import EXTENSIONS, MAX_FILE_BYTES

LONGEST_NAME = 255  # bytes of one file or folder name, on every usual file system
LONGEST_PATH = 2000  # bytes; half of what Linux allows, because the output folder needs some

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_PORTABLE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
# Fast path: nearly all paths match.
_PLAIN = re.compile(r"[\w-][\w. -]*(?:/[\w-][\w. -]*)*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")


def is_image(name: str) -> bool:
    """Whether a name has the extension of an image."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and f"{dot}{ending}".lower() in EXTENSIONS


def is_tar(name: str) -> bool:
    """Whether a name has the extension of an uncompressed tar file."""
    return name.lower().endswith(".tar")


def printable(name: str) -> str:
    """`name` with escapes for what is not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def bad_name(name: str) -> str:
    """Why a name in a folder is skipped, or ""."""
    if name.startswith("."):
        return "hidden"
    return "" if _is_utf8(name) else "its name is not UTF-8"


def unsafe_path(path: str) -> str:
    """Why a path from an archive or a bucket is not safe below the output folder, or ""."""
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
    """The name of an archive's member without the "./" that some programs put before it."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def size_problem(size: int) -> str:
    """Why a member of this many bytes is skipped, or ""."""
    return f"got {size} bytes, expected at most {MAX_FILE_BYTES}" if size > MAX_FILE_BYTES else ""


def safe_id(path: str) -> str:
    """A relative path that `unsafe_path` accepts, made from any path.

    A safe path is its own id. Other paths can share one: see `unique_id`.
    """
    if path and not unsafe_path(path):
        return path
    parts = [_safe_part(part) for part in path.split("/") if part not in ("", ".", "..")]
    made = "/".join(parts) or "_"
    if len(made.encode()) <= LONGEST_PATH:
        return made
    return f"{_digest(path)}-{parts[-1]}" if len(parts[-1].encode()) < LONGEST_NAME - 20 else _digest(path)


def unique_id(wanted: str, uri: str, attempt: int = 0) -> str:
    """Another id for `uri` when the id `wanted` is taken; a different one for every attempt."""
    path = PurePosixPath(wanted)
    suffix = path.suffix if len(path.suffix.encode()) <= 16 else ""
    stem = path.name.removesuffix(suffix).encode()[: LONGEST_NAME - 40].decode(errors="ignore")
    mark = _digest(f"{attempt}:{uri}")
    made = str(path.with_name(f"{stem}~{mark}{suffix}"))
    return made if len(made.encode()) <= LONGEST_PATH else mark + suffix


class SeenHashes:
    """A set of texts that only grows, with 12 to 24 bytes per text (a `set` needs 100).

    It stores 64 bits of a digest: among n texts, two are confused with a probability of n^2 / 2^65 (one in
    370,000 for ten million).
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, text: str) -> bool:
        """Add `text`; False if it was added before."""
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
    suffix = PurePosixPath(part).suffix
    suffix = suffix if len(suffix.encode()) <= 16 else ""
    return part.encode()[: LONGEST_NAME - 40].decode(errors="ignore") + "~" + _digest(part) + suffix


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
