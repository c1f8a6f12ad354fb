"""Images in a zip file. `zipfile` lists the members; a read requests the bytes of one member alone."""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.imaging.decode import MAX_FILE_BYTES
from multisa.runtime.sources.base import Listed, OtherFileCounter, Skipped, Source, SourceItem
from multisa.runtime.sources.storage import (
    CHANGED,
    Blob,
    BlobFile,
    SeenHashes,
    Store,
    is_image,
    member_problem,
    printable,
    reason_of,
    relative_member_name,
    unread_format,
)

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_END_RECORD = struct.Struct("<4s2H14x")
_END_MAGIC = b"PK\x05\x06"
_ENCRYPTED = 0x0001  # bits of a member's flags
_UTF8 = 0x0800
_UNICODE_NAME = 0x7075  # the field of `extra` with the name in UTF-8
_UNIX = 3  # the system whose file types are in the upper half of `external_attr`
_FILE_TYPE, _LINK, _REGULAR, _FOLDER = 0o170000, 0o120000, 0o100000, 0o040000
_IN_ZIP64_FIELD = 0xFFFFFFFF  # a size that the zip64 field should have replaced
_WHOLE = (0, 0xFFFF)  # numbers of the only disk; the second one refers to the zip64 record
_NAME_AND_EXTRA = 512  # bytes that the name and extra field of a local header rarely exceed
# Photos hardly deflate. Flat images deflate a thousandfold, which is harmless while they are small.
_MAX_RATIO = 200
_RATIO_FROM = 2**20  # bytes; smaller members may have any ratio
# Errors of `zipfile` for damaged or hostile directories.
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error)


class ZipSource(Source):
    """One zip file; ids are member names, URIs "header offset:compressed size:method", versions CRCs."""

    def __init__(self, path: str, store: Store) -> None:
        self._path = path
        self._store = store
        self.description = f"zip file {printable(path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        seen = SeenHashes()
        others = OtherFileCounter()
        try:
            with self._store.open(self._path) as blob:
                first = blob.size
                is_zip = blob.read_at(0, len(_LOCAL_MAGIC)) == _LOCAL_MAGIC
                for member, problem in list_members(blob):
                    first = min(first, member.header_offset)
                    name = _name(member)
                    if not is_image(name):
                        if unread := unread_format(name):
                            yield Skipped(printable(name), unread)
                        elif not name.endswith("/"):
                            others.add(name)
                        continue
                    problem = member_problem(name, member.file_size, problem)
                    if not problem and not seen.add(name):
                        problem = "another member has the same name: the first is used"
                    yield Skipped(printable(name), problem) if problem else _item(member)
                if is_zip and 0 < first < blob.size:
                    name = printable(self._path.partition("?")[0].rpartition("/")[2])
                    yield Skipped(name, f"{first} bytes before its first member, as of another zip file, are not read")
        except _BROKEN as error:
            raise UsageError(f"{self.description}: cannot be read as a zip file: {error}") from error
        except OSError as error:
            raise UsageError(f"{self.description}: cannot be read ({reason_of(error)})") from error
        yield from others.total()

    def _read(self, item: SourceItem) -> bytes:
        header, compressed, method = (int(number) for number in item.uri.split(":"))
        if not 0 <= item.size <= MAX_FILE_BYTES or not 0 <= compressed <= 2 * MAX_FILE_BYTES:
            raise ImageError(f"got {item.size} bytes, expected at most {MAX_FILE_BYTES}")
        data = self._read_compressed(header, compressed, method)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, item.size)
        if len(data) != item.size:
            raise ImageError(f"got {len(data)} bytes, expected {item.size}: the zip file is damaged")
        if f"{zlib.crc32(data):08x}" != item.version:
            raise ImageError("its CRC is wrong: the zip file is damaged, or changed since it was listed")
        return data

    def exists(self, item: SourceItem) -> bool:
        return self._store.exists(self._path)

    def _read_compressed(self, header: int, compressed: int, method: int) -> bytes:
        """Read a member as stored, with one request unless its local header is unusually long.

        `zipfile` would read the whole directory first, in every process and on every machine of a run.
        """
        length = _LOCAL_HEADER.size + _NAME_AND_EXTRA + compressed
        block = self._store.read_range(self._path, header, length, "")
        if len(block) < _LOCAL_HEADER.size or not block.startswith(_LOCAL_MAGIC):
            raise ImageError(f"its header is missing: the zip file {CHANGED}")
        fields = _LOCAL_HEADER.unpack_from(block)
        if fields[3] != method:
            raise ImageError(f"another member is in its place: the zip file {CHANGED}")
        start = _LOCAL_HEADER.size + fields[9] + fields[10]
        data = block[start : start + compressed]
        if len(data) < compressed:
            data = self._store.read_range(self._path, header + start, compressed, "")
        return data


def list_members(blob: Blob) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """Yield every member in the order of the directory, with the reason why it is skipped, or "".

    Memory holds the directory, 0.7 kB per member. Raises OSError and the errors in `_BROKEN`.
    """
    with zipfile.ZipFile(BlobFile(blob)) as archive:
        members: list[zipfile.ZipInfo] = archive.infolist()
        end = archive.start_dir
        record = blob.read_at(blob.size - _END_RECORD.size - len(archive.comment), _END_RECORD.size)
    if record.startswith(_END_MAGIC) and not all(disk in _WHOLE for disk in _END_RECORD.unpack(record)[1:]):
        raise zipfile.BadZipFile("one part of several: join them first")
    if any(member.header_offset < 0 for member in members):
        raise zipfile.BadZipFile("its directory is not where its end record says")
    overlapping = _overlapping([member for member in members if _end(member) <= end])
    for member in members:
        yield member, _problem(member, end, member in overlapping)


def _problem(member: zipfile.ZipInfo, end: int, is_overlapping: bool) -> str:
    """Return why a member is skipped, or ""; the directory begins at `end`."""
    kind = (member.external_attr >> 16) & _FILE_TYPE if member.create_system == _UNIX else 0
    method, size, compressed = member.compress_type, member.file_size, member.compress_size
    if member.flag_bits & _ENCRYPTED:
        return "encrypted"
    if kind == _LINK:
        return "symbolic link"
    if kind not in (0, _REGULAR, _FOLDER):
        return "not a regular file"
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {method}, expected stored or deflated"
    if _IN_ZIP64_FIELD in (size, compressed):
        return "its zip64 field is damaged"
    if method == zipfile.ZIP_STORED and size != compressed:
        return "stored, but of two sizes"
    if size > _RATIO_FROM and size > _MAX_RATIO * max(compressed, 1):
        return f"inflates from {compressed} to {size} bytes, expected at most {_MAX_RATIO} times as much"
    if _end(member) > end:
        return "lies outside the file"
    return "overlaps another member, as in a zip bomb" if is_overlapping else ""


def _overlapping(members: list[zipfile.ZipInfo]) -> set[zipfile.ZipInfo]:
    """Return the members that share bytes with another one."""
    overlapping: set[zipfile.ZipInfo] = set()
    last: zipfile.ZipInfo | None = None  # the one that reaches furthest so far
    for member in sorted(members, key=lambda member: member.header_offset):
        if last and member.header_offset < _end(last):
            overlapping |= {member, last}
        if last is None or _end(member) > _end(last):
            last = member
    return overlapping


def _end(member: zipfile.ZipInfo) -> int:
    """Return the earliest end of a member."""
    return member.header_offset + _LOCAL_HEADER.size + member.compress_size


def _name(member: zipfile.ZipInfo) -> str:
    """Return the name of a member, in Unicode where the file has it.

    Without the flag for UTF-8, `zipfile` takes names for code page 437. Info-ZIP writes a field with the name in
    UTF-8 beside them (APPNOTE 4.6.9); zip(1) on Linux and macOS's Finder write UTF-8 and no flag.
    """
    name = member.orig_filename  # `filename` is cut at a NUL
    if not member.flag_bits & _UTF8 and not name.isascii():
        raw = name.encode("cp437")
        for text in (_unicode_field(member.extra, raw), raw):
            with contextlib.suppress(UnicodeDecodeError):
                name = text.decode() or name
                break
    return relative_member_name(name)


def _unicode_field(extra: bytes, raw: bytes) -> bytes:
    """Return the name in the Unicode field of `extra`, or `raw` without one that belongs to this name."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + size]
        if kind == _UNICODE_NAME and len(field) > 5 and struct.unpack_from("<BL", field) == (1, zlib.crc32(raw)):
            return field[5:]
        at += 4 + size
    return raw


def _item(member: zipfile.ZipInfo) -> SourceItem:
    uri = f"{member.header_offset}:{member.compress_size}:{member.compress_type}"
    return SourceItem(_name(member), uri, member.file_size, f"{member.CRC:08x}")


def _inflate(data: bytes, size: int) -> bytes:
    """Inflate to at most `size` + 1 bytes, whatever the data would become."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ImageError(f"cannot be inflated ({error}): the zip file is damaged") from error
