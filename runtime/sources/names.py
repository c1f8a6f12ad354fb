"""Names in sources: image extensions, safety below the output folder, duplicates."""

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
    """Return whether a name has the extension of an image."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and f"{dot}{ending}".lower() in EXTENSIONS


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
    return unsafe_path(name) or problem or too_large


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
