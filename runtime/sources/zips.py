"""Images in a zip file; a read takes the bytes of one member and its header alone."""

import zlib
from collections.abc import Iterator

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.contract import MAX_FILE_BYTES, Listed, OtherFiles, PassedOver, SourceItem
from multisa.runtime.sources.folders import SourceBase
from multisa.runtime.sources.names import Seen, is_image, printable, unsafe_path
from multisa.runtime.sources.storage import CHANGED, Store, why
from multisa.runtime.sources.zip_members import (
    LOCAL_HEADER,
    LOCAL_MAGIC,
    STORED,
    ZipDamaged,
    ZipMember,
    zip_members,
)

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
                        yield PassedOver(printable(member.name), problem)
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

    def is_there(self, item: SourceItem) -> bool:
        """See Source."""
        return self._store.is_there(self._path)


def _item(member: ZipMember) -> SourceItem:
    place = f"{member.header}:{member.compressed}:{member.method}"
    return SourceItem(member.name, place, member.size, f"{member.crc:08x}")


def _inflate(data: bytes, size: int) -> bytes:
    """At most `size` + 1 bytes, whatever the data would become."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ImageError(f"cannot be inflated ({error}): the zip file is damaged") from error
