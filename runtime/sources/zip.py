"""Images in a zip file; a read takes the bytes of one member and its header alone."""

import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.imaging.decode import MAX_FILE_BYTES
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.folders import SourceBase
from multisa.runtime.sources.names import Seen, is_image, printable, unsafe_path
from multisa.runtime.sources.storage import CHANGED, Blob, Store, why
from multisa.runtime.sources.tar import Window

STORED, DEFLATED = 0, 8
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_MAGIC = b"PK\x03\x04"

_END = struct.Struct("<4s4H2IH")
_END64_PLACE = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LONGEST_COMMENT = 65535
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "look in the zip64 field"
_ENCRYPTED, _UTF8 = 0x0001, 0x0800
_UNIX = 3
_LINK, _REGULAR, _FOLDER = 0o120000, 0o100000, 0o040000
# Images hardly deflate, flat pictures up to a thousandfold, which is let pass while they are small.
_RATIO, _RATIO_FROM = 200, 2**20


class ZipDamaged(Exception):
    """It is no zip file that can be read."""


@dataclass(frozen=True)
class ZipMember:
    """One member that is no folder."""

    name: str  # may hold surrogates
    header: int  # offset of its local header
    compressed: int  # bytes
    size: int
    crc: int
    method: int
    problem: str = ""


@dataclass(frozen=True)
class _Directory:
    offset: int
    size: int
    shift: int  # of all offsets: how much was put before the archive


def zip_members(blob: Blob) -> Iterator[ZipMember]:
    """Every member in the order of the directory. Raises ZipDamaged and OSError."""
    directory = _find_directory(blob)
    spans = array("Q")
    for member in _entries(blob, directory):
        span = member.header, member.header + LOCAL_HEADER.size + member.compressed
        # What is not in the file anyhow is no reason to refuse others.
        spans.extend(span if span[1] <= directory.offset else (directory.offset, directory.offset))
    overlapping = _overlapping(np.asarray(spans, np.uint64).reshape(-1, 2))
    for i, member in enumerate(_entries(blob, directory)):
        problem = member.problem
        if not problem and member.header + LOCAL_HEADER.size + member.compressed > directory.offset:
            problem = "lies outside the file"
        if not problem and overlapping[i]:
            problem = "overlaps another member, as in a zip bomb"
        if not member.name.endswith("/"):
            yield replace(member, problem=problem)


def _find_directory(blob: Blob) -> _Directory:
    if blob.size < _END.size:
        raise ZipDamaged("too short for a zip file")
    start = max(0, blob.size - _END.size - _LONGEST_COMMENT)
    tail = blob.read_at(start, blob.size - start)
    at = len(tail) - _END.size
    while (at := tail.rfind(b"PK\5\6", 0, at + 4)) >= 0:
        _, disk, first_disk, here, total, size, offset, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment <= len(tail):
            break
        at -= 1
    if at < 0:
        raise ZipDamaged("no directory at its end: it is cut off, or no zip file")
    end = start + at
    if _FULL16 in (here, total) or _FULL32 in (size, offset):
        end, disk, first_disk, here, total, size, offset = _find_directory64(blob, end)
    if disk or first_disk or here != total:
        raise ZipDamaged("one part of several: join them first")
    shift = end - size - offset
    if shift < 0:
        raise ZipDamaged("its directory is not where its end says")
    return _Directory(end - size, size, shift)


def _find_directory64(blob: Blob, end: int) -> tuple[int, int, int, int, int, int, int]:
    place = blob.read_at(max(0, end - _END64_PLACE.size), _END64_PLACE.size)
    # What is put before an archive moves its end, too; the record lies right before the place that tells it.
    at = end - _END64_PLACE.size - _END64.size
    record = blob.read_at(at, _END64.size) if at >= 0 else b""
    if not place.startswith(b"PK\6\7") or not record.startswith(b"PK\6\6") or len(record) < _END64.size:
        raise ZipDamaged("a zip64 file without its own end")
    _, _, _, _, disk, first_disk, here, total, size, offset = _END64.unpack(record)
    return at, disk, first_disk, here, total, size, offset


def _entries(blob: Blob, directory: _Directory) -> Iterator[ZipMember]:
    window = Window(blob)
    at, end = directory.offset, directory.offset + directory.size
    while at < end:
        fixed = window.read(at, _CENTRAL.size)
        if len(fixed) < _CENTRAL.size or not fixed.startswith(b"PK\1\2"):
            raise ZipDamaged(f"its directory is damaged at byte {at}")
        fields = _CENTRAL.unpack(fixed)
        lengths = fields[10:13]
        rest = window.read(at + _CENTRAL.size, lengths[0] + lengths[1])
        at += _CENTRAL.size + sum(lengths)
        if at > end:
            raise ZipDamaged(f"its directory ends in the entry before byte {at}")
        yield _member(fields, rest[: lengths[0]], rest[lengths[0] :], directory.shift)


def _member(fields: tuple[int, ...], name: bytes, extra: bytes, shift: int) -> ZipMember:
    made_by, flags, method, crc, compressed, size = (fields[i] for i in (1, 3, 4, 7, 8, 9))
    sizes = _wide(extra, [size, compressed, fields[16]])
    encoding = "utf-8" if flags & _UTF8 or name.isascii() else "cp437"
    text = name.decode(encoding, "surrogateescape")
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    kind = (fields[15] >> 16) & 0o170000 if made_by >> 8 == _UNIX else 0
    problem = ""
    if flags & _ENCRYPTED:
        problem = "encrypted"
    elif kind == _LINK:
        problem = "symbolic link"
    elif kind not in (0, _REGULAR, _FOLDER):
        problem = "not a regular file"
    elif method not in (STORED, DEFLATED):
        problem = f"compressed by method {method}, expected stored or deflated"
    elif sizes is None:
        problem = "its zip64 field is damaged"
    size, compressed, header = sizes or [0, 0, 0]
    if not problem and method == STORED and size != compressed:
        problem = "stored, but of two sizes"
    if not problem and size > _RATIO_FROM and size > _RATIO * max(compressed, 1):
        problem = f"inflates from {compressed} to {size} bytes, expected at most {_RATIO} times as much"
    return ZipMember(text, header + shift, compressed, size, crc, method, problem)


def _wide(extra: bytes, values: list[int]) -> list[int] | None:
    """Size, compressed size and offset, each from the zip64 field where it says so; None if damaged."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if tag == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            if len(wide) < values.count(_FULL32):
                return None
            return [wide.pop(0) if value == _FULL32 else value for value in values]
        at += 4 + length
    return None


def _overlapping(spans: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the spans (n, 2) of bytes have bytes in common with another."""
    order = np.lexsort((spans[:, 1], spans[:, 0]))
    starts, ends = spans[order, 0], spans[order, 1]
    reach = np.maximum.accumulate(ends)
    behind = np.zeros(len(spans), bool)
    behind[1:] = starts[1:] < reach[:-1]
    # The one that is overlapped: the next begins before it ends.
    before = np.zeros(len(spans), bool)
    before[:-1] = starts[1:] < ends[:-1]
    found = np.zeros(len(spans), bool)
    found[order] = behind | before
    return found


_NAME_AND_EXTRA = 512  # bytes that a local header usually has no more of than that


class ZipSource(SourceBase):
    """One zip file; ids are its members, places "offset:compressed size:method", versions their CRC."""

    def __init__(self, path: str, store: Store) -> None:
        self._path = path
        self._store = store

    @property
    def description(self) -> str:
        """See Source."""
        return f"zip file {printable(self._path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        seen = Seen()
        others = 0
        try:
            with self._store.open(self._path) as blob:
                for member in zip_members(blob):
                    if not is_image(member.name):
                        others += 1
                        continue
                    problem = unsafe_path(member.name) or member.problem
                    if not problem and member.size > MAX_FILE_BYTES:
                        problem = f"got {member.size} bytes, expected at most {MAX_FILE_BYTES}"
                    if not problem and not seen.add(member.name):
                        problem = "another member has the same name: the first is taken"
                    if problem:
                        yield Skipped(printable(member.name), problem)
                    else:
                        yield _item(member)
        except ZipDamaged as error:
            raise UsageError(f"{self.description}: cannot be read: {error}") from error
        except OSError as error:
            raise UsageError(f"{self.description}: cannot be read ({why(error)})") from error
        if others:
            yield OtherFiles(others)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        header, compressed, method = (int(number) for number in item.place.split(":"))
        if not 0 <= item.size <= MAX_FILE_BYTES or not 0 <= compressed <= 2 * MAX_FILE_BYTES:
            raise ImageError(f"got {item.size} bytes, expected at most {MAX_FILE_BYTES}")
        try:
            found = self._store.read_range(
                self._path, header, LOCAL_HEADER.size + _NAME_AND_EXTRA + compressed, ""
            )
            if len(found) < LOCAL_HEADER.size or not found.startswith(LOCAL_MAGIC):
                raise ImageError(f"no member where one was: the zip file {CHANGED}")
            fields = LOCAL_HEADER.unpack_from(found)
            if fields[3] != method:
                raise ImageError(f"another member where this one was: the zip file {CHANGED}")
            start = LOCAL_HEADER.size + fields[9] + fields[10]
            data = found[start : start + compressed]
            if len(data) < compressed:
                data = self._store.read_range(self._path, header + start, compressed, "")
        except OSError as error:
            raise ImageError(why(error)) from error
        data = data if method == STORED else _inflate(data, item.size)
        if len(data) != item.size:
            raise ImageError(f"got {len(data)} bytes, expected {item.size}: the zip file is damaged")
        if f"{zlib.crc32(data):08x}" != item.version:
            raise ImageError("its CRC is wrong: the zip file is damaged, or changed since it was listed")
        return data

    def exists(self, item: SourceItem) -> bool:
        """See Source."""
        return self._store.exists(self._path)


def _item(member: ZipMember) -> SourceItem:
    place = f"{member.header}:{member.compressed}:{member.method}"
    return SourceItem(member.name, place, member.size, f"{member.crc:08x}")


def _inflate(data: bytes, size: int) -> bytes:
    """At most `size` + 1 bytes, whatever the data would become."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ImageError(f"cannot be inflated ({error}): the zip file is damaged") from error
