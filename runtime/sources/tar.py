"""Images in tar shards with labels beside them, in the layout of WebDataset.

    0001.jpg  0001.json {"labels": ["cat"]}  or  0001.cls  or  0001.txt

Labels need not stand beside their image in tar files of up to HELD_MEMBERS members. Listing a shard reads its
headers; each read then requests the bytes of one image.
"""

import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.image_labels import without_suffix
from multisa.runtime.imaging.decode import MAX_FILE_BYTES
from multisa.runtime.sources.base import Listed, OtherFileCounter, Skipped, Source, SourceItem
from multisa.runtime.sources.folders import inside
from multisa.runtime.sources.lists import LabelReader
from multisa.runtime.sources.storage import (
    LONGEST_PATH,
    Blob,
    BlobFile,
    Entry,
    SeenHashes,
    Store,
    is_image,
    join,
    member_problem,
    printable,
    reason_of,
    relative_member_name,
    safe_id,
    unread_format,
)

_LONGEST_HEADER = 2**20  # bytes of a long name or of pax records: a path has some hundreds
_LARGEST_SIDECAR = 2**20  # bytes of a file of labels
_LARGEST_SAMPLE = 256  # members of one key that form a sample
HELD_MEMBERS = 200_000  # of a tar file that memory holds, to find labels apart from their image: some 50 MB
_LABEL_ENDINGS = (".json", ".cls", ".txt")
_BLOCK = tarfile.BLOCKSIZE
_ZEROS_AT_ONCE = 2**16  # bytes
_MOST_ZEROS = 2**26  # bytes after an end mark; programs pad a file to some kilobytes
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
# Members without data, whatever the size in their header.
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_SPARSE = "stored with holes (sparse), expected a plain file"
_PROBLEMS = {
    tarfile.LNKTYPE: "a link to another member",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.GNUTYPE_SPARSE: _SPARSE,
    b"M": "continued from another volume",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")  # "LENGTH KEY=VALUE\n"
_PAX_SIZE = re.compile(rb"\d{1,20}")


class TarDamaged(Exception):
    """The tar file is unreadable from byte `offset` on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


class Member(NamedTuple):
    """One member that is not a folder."""

    name: str  # as in the file, without a leading "./"; may hold surrogates
    offset: int  # of its bytes
    size: int
    problem: str = ""  # why it cannot be read


@dataclass
class _Extension:
    """The contents of the extension headers before a member's own header."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False

    def update(self, kind: bytes, text: bytes, offset: int) -> None:
        """Apply a header of `_EXTENDED` at `offset`. Raises TarDamaged."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.name = text.rstrip(b"\0")
        for key, value in _pax_records(text, offset) if kind == tarfile.XHDTYPE else ():
            if key == b"path":
                self.name = value
            elif key == b"size":
                if not _PAX_SIZE.fullmatch(value):
                    raise TarDamaged(offset, f"a size of {printable(repr(value[:40]))}")
                self.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.is_sparse = True


def tar_members(blob: Blob) -> Iterator[Member]:
    """Yield every member in the order of the file; a truncated member comes last and has a problem.

    `tarfile` would recurse into chains of long names, read headers of any length, treat a damaged header as
    the end, and take twice as long. Raises TarDamaged and OSError.
    """
    file = io.BufferedReader(BlobFile(blob), blob.window)
    offset, extension = 0, _Extension()
    while header := _read_at(file, offset, _BLOCK):
        if not header[0] and not header.strip(b"\0"):
            offset = _after_zeros(file, offset, blob.size)  # files that were joined have an end mark each
            continue
        kind, size = _type_and_size(header, offset)
        start = offset + _BLOCK
        if kind in _EXTENDED:
            if size > _LONGEST_HEADER:
                raise TarDamaged(offset, f"a header of {size} bytes, expected at most {_LONGEST_HEADER}")
            text = _read_at(file, start, size)
            if len(text) < size:
                raise TarDamaged(offset, "the file ends in a header")
            extension.update(kind, text, offset)
            offset = start + _padded(size)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:
            start = _after_holes(file, header, start)
        size = extension.size if extension.size is not None else size
        size = 0 if kind in _WITHOUT_DATA else size
        name = _name(header) if extension.name is None else extension.name
        if kind != tarfile.DIRTYPE and not (kind in _REGULAR and name.endswith(b"/")):
            problem = "" if kind in _REGULAR else _PROBLEMS.get(kind, "not a regular file")
            problem = _SPARSE if extension.is_sparse else problem
            if not problem and start + size > blob.size:
                problem = f"truncated: {max(0, blob.size - start)} of its {size} bytes are in the file"
            text_name = relative_member_name(name.decode(errors="surrogateescape"))
            yield Member(text_name, start, size, problem)
        if start + size > blob.size:
            return
        offset, extension = start + _padded(size), _Extension()


def _after_zeros(file: BinaryIO, offset: int, size: int) -> int:
    """Return where the zeros from `offset` on end: the next block with another byte, or the end of the file."""
    end = min(size, offset + _MOST_ZEROS)
    while offset < end:
        piece = _read_at(file, offset, min(_ZEROS_AT_ONCE, size - offset))
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return offset + zeros // _BLOCK * _BLOCK
        offset += len(piece)
    if offset < size:
        raise TarDamaged(offset, f"{_MOST_ZEROS} zeros, and more behind them")
    return size


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _type_and_size(header: bytes, offset: int) -> tuple[bytes, int]:
    """Return the type and the size in a header. Raises TarDamaged for anything else."""
    for magic, program in _COMPRESSED.items():
        if offset == 0 and header.startswith(magic):
            reason = f"compressed by {program}, which prevents reading one member alone: decompress it first"
            raise TarDamaged(offset, reason)
    if len(header) < _BLOCK:
        raise TarDamaged(offset, "the file ends in a header")
    # The sum of all bytes, with spaces in place of the checksum itself.
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    expected = _number(header[148:156])
    if expected != checksum:
        # Some old programs summed signed bytes.
        checksum -= 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if expected != checksum:
        raise TarDamaged(offset, "a header whose checksum is wrong")
    size = _number(header[124:136])
    if size is None:
        raise TarDamaged(offset, "a header without a size")
    return header[156:157], size


def _number(field: bytes) -> int | None:
    """Parse octal digits, or binary after a byte 0x80; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    # GNU headers have times where POSIX has the prefix.
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(text: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(text) and text[at]:
        match = _PAX_RECORD.match(text, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            raise TarDamaged(offset, "a malformed pax header")
        yield match[2], text[match.end() : end - 1]
        at = end


def _after_holes(file: BinaryIO, header: bytes, start: int) -> int:
    """Return where the data of a sparse member begins: after the blocks that list more of its holes."""
    more = header[482]
    while more:
        block = _read_at(file, start, _BLOCK)
        if len(block) < _BLOCK:
            raise TarDamaged(start, "the file ends in a header")
        more = block[504]
        start += _BLOCK
    return start


def _padded(size: int) -> int:
    """Round `size` up to whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


@dataclass
class _OpenShard:
    """A tar file that is being listed, and the files with labels in it that stand apart from their image."""

    name: str
    blob: Blob
    seen: SeenHashes  # ids of the images so far, in all tar files
    others: OtherFileCounter
    loose: dict[str, list[Member]]  # files with labels, by the key of their sample
    used: set[str] = field(default_factory=set)  # keys of `loose` that belong to an image

    def labels_apart(self, key: str) -> list[Member]:
        """Return the files with labels of one sample that stand apart from its image."""
        if key in self.loose:
            self.used.add(key)
        return self.loose.get(key, [])

    def without_image(self, members: list[Member], *, is_held: bool) -> Iterator[Listed]:
        """Yield the members of a sample without an image; is_held: whether `loose` has its labels."""
        label_files = _label_files(members)
        for member in members:
            if member not in label_files:
                yield from self.other(member)
        if not is_held:
            advice = f"sort its members by name, as it has more than {HELD_MEMBERS}"
            yield from self.skip(label_files, f"does not stand beside an image in the tar file: {advice}")

    def other(self, member: Member) -> Iterator[Listed]:
        """Yield a member in a format that is not read; count any other."""
        if reason := unread_format(member.name):
            yield Skipped(self.id_of(member), reason)
        else:
            self.others.add(member.name)

    def unused_labels(self) -> Iterator[Listed]:
        """Yield the files with labels of no image."""
        for key, files in self.loose.items():
            if key not in self.used:
                yield from self.skip(files, "belongs to no image")

    def skip(self, files: list[Member], reason: str) -> Iterator[Listed]:
        """Yield files with labels as skipped; text files are counted."""
        for member in files:
            if member.name.lower().endswith(".txt"):  # a caption, or a readme
                self.others.add(member.name)
            else:
                yield Skipped(self.id_of(member), reason)

    def id_of(self, member: Member) -> str:
        return printable(f"{safe_id(self.name[:-4])}/{member.name}")


class TarSource(Source):
    """Tar files below `root`; ids are "shard/member", URIs "shard.tar#offset"."""

    def __init__(
        self, root: str, store: Store, shards: Callable[[], Iterable[Entry]], description: str, labels: LabelReader
    ) -> None:
        self._root = root
        self._store = store
        self._shards = shards
        self._reader = labels
        self.description = description

    def listing(self) -> Iterator[Listed]:
        seen, stems = SeenHashes(), SeenHashes()
        others = OtherFileCounter()
        for shard in self._shards():
            if shard.problem:
                yield Skipped(printable(shard.name), shard.problem)
                continue
            if not stems.add(shard.name[:-4]):
                raise UsageError(
                    f"{printable(shard.name)}: the name of another tar file differs in the case of .tar alone"
                )
            yield from self._shard(shard.name, seen, others)
        yield from others.total()

    def _read(self, item: SourceItem) -> bytes:
        path, _, offset = item.uri.rpartition("#")
        if not 0 <= item.size <= MAX_FILE_BYTES:
            raise ImageError(f"got {item.size} bytes, expected at most {MAX_FILE_BYTES}")
        path = join(self._root, inside(path))
        data = self._store.read_range(path, int(offset), item.size, item.version)
        if len(data) != item.size:
            raise ImageError(f"the tar file ends after {len(data)} of the image's {item.size} bytes")
        return data

    def exists(self, item: SourceItem) -> bool:
        """See Source. Checks the item's tar file."""
        return self._store.exists(join(self._root, item.uri.rpartition("#")[0]))

    def _shard(self, name: str, seen: SeenHashes, other_files: OtherFileCounter) -> Iterator[Listed]:
        path = printable(join(self._root, name))
        has_members = False
        try:
            with self._store.open(join(self._root, name)) as blob:
                if not blob.size:
                    yield Skipped(printable(name), "is empty")
                held, others = _hold(tar_members(blob))
                shard = _OpenShard(name, blob, seen, other_files, _loose_labels(held))
                n_members = 0
                for sample in _samples(itertools.chain(held, others)):
                    has_members = True
                    n_members += len(sample)
                    if any(is_image(member.name) for member in sample):
                        yield from self._sample(shard, sample)
                    else:
                        yield from shard.without_image(sample, is_held=n_members <= len(held))
                yield from shard.unused_labels()
        except TarDamaged as error:
            if not has_members:
                raise UsageError(f"{path}: cannot be read as a tar file: {error}") from error
            reason = f"damaged at byte {error.offset}: {error}; the rest is not read"
            yield Skipped(printable(name), reason)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({reason_of(error)}), expected a tar file") from error

    def _sample(self, shard: _OpenShard, members: list[Member]) -> Iterator[Listed]:
        """Yield the images of one sample, and what cannot be read of it. Raises UsageError for contrary labels."""
        key = _key(members[0].name)
        images = [member for member in members if is_image(member.name)]
        beside = _label_files(members)
        label_files = [*beside, *shard.labels_apart(key)]
        for_all = [file for file in label_files if _ending(file.name) == _suffix(file.name)]
        labels, unread = self._labels(for_all, shard)
        yield from unread
        own_files: list[Member] = []
        for member in images:
            names = (member.name, without_suffix(member.name))
            own = [file for file in label_files if file not in for_all and without_suffix(file.name) in names]
            own_files += own
            own_labels, unread = self._labels([*for_all, *own], shard) if own else (labels, [])
            yield from unread
            yield self._image(shard, member, own_labels)
        for member in members:
            if member not in images and member not in beside:
                yield from shard.other(member)
        others = [file for file in label_files if file not in for_all and file not in own_files]
        yield from shard.skip(others, "belongs to no image")

    def _image(self, shard: _OpenShard, member: Member, labels: tuple[str, ...] | None) -> Listed:
        id_ = f"{safe_id(shard.name[:-4])}/{member.name}"
        problem = member_problem(member.name, member.size, member.problem)
        if not problem and len(id_.encode()) > LONGEST_PATH:
            problem = "its name is too long"
        if not problem and not shard.seen.add(id_):
            problem = "another member has the same name: the first is used"
        if problem:
            return Skipped(printable(id_), problem)
        return SourceItem(id_, f"{shard.name}#{member.offset}", member.size, shard.blob.version, labels)

    def _labels(self, files: list[Member], shard: _OpenShard) -> tuple[tuple[str, ...] | None, list[Skipped]]:
        """Return the labels of an image from the files of its sample, and the unreadable files with their reasons.

        Raises UsageError for two files with different labels.
        """
        unread: list[Skipped] = []
        if self._reader.ignore:
            for member in files:
                shard.others.add(member.name)
            return None, unread
        found: dict[frozenset[str | None], tuple[Member, tuple[str, ...]]] = {}
        for member in sorted(files, key=lambda file: file.name.lower().endswith(".txt")):
            kind = _suffix(member.name)[1:]
            if kind == "txt" and found:  # next to labels, it is a caption
                shard.others.add(member.name)
                continue
            problem = member.problem
            if not problem and member.size > _LARGEST_SIDECAR:
                problem = f"got {member.size} bytes of labels, expected at most {_LARGEST_SIDECAR}"
            try:
                if not problem:
                    labels = self._reader.from_file(kind, shard.blob.read_at(member.offset, member.size))
                    if labels is not None:
                        names = frozenset(self._reader.classes.find(name) or name for name in labels)
                        found.setdefault(names, (member, labels))
                    else:
                        shard.others.add(member.name)  # a caption, or facts about the image
            except ValueError as error:
                problem = str(error)
            if problem:
                unread.append(Skipped(shard.id_of(member), problem))
        if len(found) > 1:
            (one, names_of_one), (other, names_of_other), *_ = found.values()
            raise UsageError(
                f"{shard.id_of(one)}: got the labels {list(names_of_one)}, but {list(names_of_other)} in "
                f"{printable(other.name)}, expected the same in both: remove one of them"
            )
        return next((labels for _, labels in found.values()), None), unread


def _hold(members: Iterator[Member]) -> tuple[list[Member], Iterator[Member]]:
    """Return the first HELD_MEMBERS members, and an iterator over the others that raises what this one met."""
    held: list[Member] = []
    try:
        for member in itertools.islice(members, HELD_MEMBERS):
            held.append(member)  # one by one: what comes before damage is kept
    except TarDamaged as error:
        return held, _raise(error)
    return held, members


def _raise(error: TarDamaged) -> Iterator[Member]:
    raise error
    yield  # makes it a generator, which raises when it is read


def _loose_labels(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Return the files with labels that do not stand beside an image, by the key of their sample."""
    loose: dict[str, list[Member]] = {}
    for sample in _samples(members):
        if not any(is_image(member.name) for member in sample):
            for member in _label_files(sample):
                loose.setdefault(_key(member.name), []).append(member)
    return loose


def _label_files(members: Iterable[Member]) -> list[Member]:
    return [member for member in members if _suffix(member.name) in _LABEL_ENDINGS]


def _ending(name: str) -> str:
    """Return what follows the key of a sample, in lower case: .json, .2.json."""
    return name.removeprefix(_key(name)).lower()


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"


def _samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Group consecutive members of one key; yield the members before damage, then raise."""
    sample: list[Member] = []
    try:
        for member in members:
            if sample and (_key(member.name) != _key(sample[0].name) or len(sample) == _LARGEST_SAMPLE):
                yield sample
                sample = []
            sample.append(member)
    except TarDamaged:
        if sample:
            yield sample
        raise
    if sample:
        yield sample


def _key(name: str) -> str:
    """Return the key that the members of a sample share: the path up to the first dot of the name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
