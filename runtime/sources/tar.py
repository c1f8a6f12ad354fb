"""Images in tar shards, with the labels that lie beside them, as webdataset writes them.

    0001.jpg  0001.json {"labels": ["cat"]}  or  0001.cls  or  0001.txt

One look at every header lists a shard; a read then takes the image's bytes alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.imaging.decode import MAX_FILE_BYTES
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.folders import Pattern, SourceBase, inside, walk
from multisa.runtime.sources.lists import CellReader
from multisa.runtime.sources.names import (
    LONGEST_PATH,
    Seen,
    is_image,
    is_tar,
    printable,
    safe_id,
    unsafe_path,
)
from multisa.runtime.sources.storage import Blob, Entry, Store, join, why

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


MOST_SHARDS = 1_000_000
_LARGEST_SIDECAR = 2**20  # bytes of a file of labels
_LARGEST_SAMPLE = 256  # members of one key that are looked at together
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")


def has_range(spec: str) -> bool:
    """Whether `spec` has a range like {000000..000123}."""
    return bool(_RANGE.search(spec))


def expand_range(spec: str) -> Iterator[str]:
    """The paths of `spec` with {000000..000123} counted up.

    Raises UsageError for more than one range, or too large a one.
    """
    first, *more = _RANGE.finditer(spec)
    if more:
        raise UsageError(f"{spec}: got several ranges, expected one like {{000000..000123}}")
    low, high = int(first[1]), int(first[2])
    if not low <= high < low + MOST_SHARDS:
        raise UsageError(
            f"{spec}: got a range of {high - low + 1} files, expected 1 to {MOST_SHARDS}, the smaller "
            "number first"
        )
    width = len(first[1])
    return (f"{spec[: first.start()]}{i:0{width}}{spec[first.end() :]}" for i in range(low, high + 1))


def found_shards(store: Store, root: str, pattern: Pattern) -> Iterator[Entry]:
    """The tar files below `root` that a pattern takes. Raises UsageError where there is none."""
    count = 0
    try:
        for entry in walk(store, root, is_tar, pattern):
            if isinstance(entry, Entry):
                count += not entry.problem
                yield entry
    except OSError as error:
        raise UsageError(f"{printable(root)}: cannot be listed ({why(error)})") from error
    if not count:
        raise UsageError(f"{printable(join(root, pattern.text))}: no file of this name, expected tar files")


class TarSource(SourceBase):
    """Tar files below `root`; ids are "shard/member", places "shard.tar#offset"."""

    def __init__(
        self,
        root: str,
        store: Store,
        shards: Callable[[], Iterable[Entry]],
        description: str,
        cells: CellReader,
    ) -> None:
        self._root = root
        self._store = store
        self._shards = shards
        self._cells = cells
        self._description = description

    @property
    def description(self) -> str:
        """See Source."""
        return self._description

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        seen, stems = Seen(), Seen()
        others = 0
        for shard in self._shards():
            if shard.problem:
                yield Skipped(printable(shard.name), shard.problem)
                continue
            if not stems.add(shard.name[:-4]):
                raise UsageError(
                    f"{printable(shard.name)}: another tar file differs in upper and lower case of .tar alone"
                )
            for listed in self._shard(shard.name, seen):
                if isinstance(listed, OtherFiles):
                    others += listed.count
                else:
                    yield listed
        if others:
            yield OtherFiles(others)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        path, _, offset = item.place.rpartition("#")
        if item.size > MAX_FILE_BYTES or item.size < 0:
            raise ImageError(f"got {item.size} bytes, expected at most {MAX_FILE_BYTES}")
        try:
            path = join(self._root, inside(path))
            data = self._store.read_range(path, int(offset), item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error
        if len(data) != item.size:
            raise ImageError(f"the tar file ends after {len(data)} of the image's {item.size} bytes")
        return data

    def exists(self, item: SourceItem) -> bool:
        """See Source; it is about the item's tar file."""
        return self._store.exists(join(self._root, item.place.rpartition("#")[0]))

    def _shard(self, name: str, seen: Seen) -> Iterator[Listed]:
        shown = printable(join(self._root, name))
        prefix = safe_id(name[:-4])
        any_member = False
        try:
            with self._store.open(join(self._root, name)) as blob:
                if not blob.size:
                    yield Skipped(printable(name), "is empty")
                for sample in _samples(tar_members(blob)):
                    any_member = True
                    yield from self._sample((name, prefix), sample, blob, seen)
        except TarDamaged as error:
            if not any_member:
                raise UsageError(f"{shown}: cannot be read as a tar file: {error}") from error
            reason = f"damaged at byte {error.offset}: {error}; what follows is not read"
            yield Skipped(printable(name), reason)
        except OSError as error:
            raise UsageError(f"{shown}: cannot be read ({why(error)}), expected a tar file") from error

    def _sample(
        self, shard: tuple[str, str], members: list[Member], blob: Blob, seen: Seen
    ) -> Iterator[Listed]:
        """The entries of one sample of a shard, which is given as its path and what its ids begin with."""
        path, prefix = shard
        images = [member for member in members if is_image(member.name)]
        sidecars = {
            member.name.rpartition(".")[2].lower(): member
            for member in members
            if len(members) > 1
            and images
            and member.name[len(_key(member.name)) :].lower() in (".json", ".cls", ".txt")
        }
        labels = None
        if images:
            labels, problems = self._labels(sidecars, blob)
            yield from (Skipped(printable(f"{prefix}/{name}"), why_not) for name, why_not in problems)
        for member in images:
            made = f"{prefix}/{member.name}"
            problem = _problem(member, made)
            if not problem and not seen.add(made):
                problem = "another member has the same name: the first is taken"
            if problem:
                yield Skipped(printable(made), problem)
            else:
                yield SourceItem(made, f"{path}#{member.offset}", member.size, blob.version, labels)
        if others := len(members) - len(images) - len(sidecars):
            yield OtherFiles(others)

    def _labels(
        self, sidecars: dict[str, Member], blob: Blob
    ) -> tuple[tuple[str, ...] | None, list[tuple[str, str]]]:
        """What the files beside an image say, and those that cannot be read, with the reason."""
        problems: list[tuple[str, str]] = []
        for kind in ("json", "cls", "txt"):
            member = sidecars.get(kind)
            if member is None:
                continue
            problem = member.problem
            if not problem and member.size > _LARGEST_SIDECAR:
                problem = f"got {member.size} bytes of labels, expected at most {_LARGEST_SIDECAR}"
            try:
                if not problem:
                    found = self._cells.from_file(kind, blob.read_at(member.offset, member.size))
                    if found is not None:
                        return found, problems
            except ValueError as error:
                problem = str(error)
            if problem:
                problems.append((member.name, problem))
        return None, problems


def _samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members of one key that follow each other; those before damage come before its exception."""
    sample: list[Member] = []
    key = ""
    try:
        for member in members:
            its = _key(member.name)
            if sample and (its != key or len(sample) == _LARGEST_SAMPLE):
                yield sample
                sample = []
            key = its
            sample.append(member)
    except TarDamaged:
        if sample:
            yield sample
        raise
    if sample:
        yield sample


def _problem(member: Member, made: str) -> str:
    """Why a member is not taken under the id `made`, or ""."""
    problem = unsafe_path(member.name) or member.problem
    if not problem and member.size > MAX_FILE_BYTES:
        problem = f"got {member.size} bytes, expected at most {MAX_FILE_BYTES}"
    return problem or ("its name is too long" if len(made.encode()) > LONGEST_PATH else "")


def _key(name: str) -> str:
    """What the members of one sample share: the path up to the first dot in the name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
