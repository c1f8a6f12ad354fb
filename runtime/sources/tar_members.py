"""The members of a tar file, by one look at each header; written for files that nobody vouches for.

The standard library's reader holds every member in memory, takes headers of any size, and calls itself for
each header before the last. This one is a loop: memory for one member, limits on every length. It knows
ustar, GNU (long names, sizes over 8 GiB) and pax.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from multisa.runtime.sources.names import printable
from multisa.runtime.sources.storage import Blob

BLOCK = 512
_LONGEST_HEADER = 2**20  # bytes of a long name or of pax records: a path has some hundreds
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: what their size says is not there
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PROBLEMS = {
    b"1": "a link to another member",
    b"2": "symbolic link",
    b"S": "stored with holes (sparse), expected a plain file",
    b"M": "continued from another volume",
}


class TarDamaged(Exception):
    """What follows cannot be read; `offset` is where that begins."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


class Member(NamedTuple):
    """One member that is no folder."""

    name: str  # as it is in the file, "./" before it left out; may hold surrogates
    offset: int  # of its bytes
    size: int
    problem: str = ""  # why it is no file that can be read


@dataclass(frozen=True)
class _Pending:
    """What headers before it say about the next member."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


_NOTHING = _Pending()


def tar_members(blob: Blob) -> Iterator[Member]:
    """Every member in the order of the file; the one it is cut off in is the last, with a problem.

    Raises TarDamaged at a header that is none, and OSError.
    """
    window = Window(blob)
    offset, pending = 0, _NOTHING
    while header := window.read(offset, BLOCK):
        if not header[0] and not header.strip(b"\0"):
            return
        _check(header, offset)
        kind, size = header[156:157], _number(header[124:136], offset)
        start = offset + BLOCK
        if kind in b"LKxg":
            if size > _LONGEST_HEADER:
                raise TarDamaged(offset, f"a header of {size} bytes, expected at most {_LONGEST_HEADER}")
            text = window.read(start, size)
            if len(text) < size:
                raise TarDamaged(offset, "the file ends in a header")
            if kind == b"L":
                pending = replace(pending, name=text.rstrip(b"\0"))
            elif kind == b"x":
                pending = _pax(text, offset, pending)
            offset = start + _blocks(size)
            continue
        if pending.size is not None:
            size = pending.size
        if kind == b"S":
            start = _after_holes(window, header, start)
        if kind in _WITHOUT_DATA:
            size = 0
        name = _name(header) if pending.name is None else pending.name
        if kind != b"5" and not (kind in (b"0", b"\0", b"7") and name.endswith(b"/")):
            yield _member(name, kind, start, size, pending.sparse, blob.size)
        if start + size > blob.size:
            return
        offset, pending = start + _blocks(size), _NOTHING


class Window:
    """Reads a blob in pieces of at least its window, as headers lie close together."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer at the end of the file."""
        if not self._start <= offset <= offset + length <= self._start + len(self._data):
            more = offset < self._blob.size
            self._data = self._blob.read_at(offset, max(length, self._blob.window)) if more else b""
            self._start = offset
        at = offset - self._start
        return self._data[at : at + length]


def _member(name: bytes, kind: bytes, start: int, size: int, sparse: bool, end: int) -> Member:
    problem = "" if kind in (b"0", b"\0", b"7") else _PROBLEMS.get(kind, "not a regular file")
    if sparse:
        problem = _PROBLEMS[b"S"]
    if not problem and start + size > end:
        problem = f"cut off: {max(0, end - start)} of its {size} bytes are in the file"
    text = name.decode(errors="surrogateescape")
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    return Member(text, start, size, problem)


def _check(header: bytes, offset: int) -> None:
    """Raises TarDamaged for what is no header."""
    if len(header) < BLOCK:
        raise TarDamaged(offset, "the file ends in a header")
    if offset == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise TarDamaged(
                    offset, f"compressed by {name}, where no member can be read alone: decompress it first"
                )
    digits = header[148:156].strip(b" \0")
    if not digits or not _is_octal(digits) or not _is_sum(header, int(digits, 8)):
        raise TarDamaged(offset, "a header whose checksum is wrong")


def _is_sum(header: bytes, expected: int) -> bool:
    """Whether the bytes of a header, its sum read as spaces, have the sum `expected`."""
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    if unsigned == expected:
        return True
    # Some old programs summed signed bytes.
    return unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:]) == expected


def _is_octal(digits: bytes) -> bool:
    return not digits.strip(b"01234567")


def _number(field: bytes, offset: int) -> int:
    if field[0] == 0x80:  # GNU, for sizes that 11 octal digits cannot say
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not _is_octal(digits):
        raise TarDamaged(offset, "a header without a size")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(text: bytes, offset: int, pending: _Pending) -> _Pending:
    """Records "LENGTH key=value\\n"; only those that say where and what the member is."""
    at = 0
    while at < len(text) and text[at]:
        space = text.find(b" ", at, at + 20)
        digits = text[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if not space < end <= len(text) or text[end - 1 : end] != b"\n":
            raise TarDamaged(offset, "a pax header that is none")
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        if key == b"path" and equals:
            pending = replace(pending, name=value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise TarDamaged(offset, f"a size of {printable(repr(value[:40]))}")
            pending = replace(pending, size=int(value))
        elif key.startswith(b"GNU.sparse."):
            pending = replace(pending, sparse=True)
        at = end
    return pending


def _after_holes(window: Window, header: bytes, start: int) -> int:
    """Where the data of a sparse member begins: after the blocks that list more of its holes."""
    more = header[482]
    while more:
        block = window.read(start, BLOCK)
        if len(block) < BLOCK:
            raise TarDamaged(start, "the file ends in a header")
        more = block[504]
        start += BLOCK
    return start


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
