"""Writers: the formats in which a run stores its results.

CONTRIBUTING.md lists the steps to add a format.

The images alone determine every byte: no timestamps, no random names, no order that depends on threads. An
interrupted and resumed run therefore writes the same files as an uninterrupted one.
"""

import hashlib
import heapq
import io
import json
import re
import struct
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import encode_rle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.imaging.png import IGNORE_INDEX, PNG_SIGNATURE, png_chunk, voc_palette
from multisa.runtime.predict.prediction import ClassProbabilities

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One finished image, as writers receive it."""

    index: int  # position in the run, from 0; the same in every run over the same source
    id: str  # of its SourceItem
    name: str  # path of its results without extension, unique in the run; "a/b" for the id "a/b.jpg"
    mask: UInt8  # [H, W] class ids, at the size of the upright image
    png: bytes  # the mask as a palette PNG
    confidence: UInt8  # [H, W] of the most probable class, 0..255 for 0..1; also where `mask` has absorbed its part
    record: Mapping[str, Any]  # its line of labels.jsonl
    probabilities: ClassProbabilities  # that mask and confidence are made from


class ShardFiles(Protocol):
    """Collects the files of one shard; they appear at their paths when the shard is committed."""

    def write(self, relative: str, data: bytes) -> None:
        """Add the file with the posix path `relative` below the output folder."""

    def write_part(self, writer: str, data: bytes) -> None:
        """Keep data of this shard for `Writer.finalize`; it is not a result."""


class RunFolder(Protocol):
    """The output folder of a run whose shards are all committed."""

    def parts(self, writer: str) -> Iterator[bytes]:
        """Yield the data passed to `write_part`, one shard at a time, in the order of the shards."""

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below the output folder piece by piece; it appears when it is complete."""


@dataclass(frozen=True)
class WriterContext:
    """The facts about a run that its writers use."""

    out: Path
    command: str  # "label" or "segment"
    manifest: Manifest  # classes, palette, the bundle's name
    bundle_sha256: str


class Writer(ABC):
    """One format. Several threads may call `encode` at once; the other methods run in one thread."""

    def __init__(self, context: WriterContext) -> None:
        self.context = context

    @abstractmethod
    def encode(self, image: LabelledImage) -> Any:
        """Return everything that the shard needs of one image, kept small: encoded masks, no arrays.

        Raises ImageError when the format cannot hold the image.
        """

    @abstractmethod
    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[Any]) -> None:
        """Write the files of one shard; `payloads` are in the order of the images, without failed ones."""

    def finalize(self, folder: RunFolder, shards: int) -> None:  # noqa: B027 (many formats need none)
        """Write the files that cover the whole run; after a retry, write them again from all parts.

        The shards of a retry follow the others: sort by the index of the image where order matters.
        """

    def results(self, name: str) -> Sequence[str]:
        """Return the paths below the output folder that belong only to the image `name`."""
        return ()


def shard_path(folder: str, shard: int, ending: str) -> str:
    """Return the path of a shard's file below the output folder."""
    return f"{folder}/{shard:06d}.{ending}"


# Each format percent-encodes the names that it cannot hold.

# WebDataset ends a key at the first dot of its last part, and skips members like "__MACOSX__/a".
_TAR = re.compile(r"\.(?=[^/]*$)|^__|[\0-\x1f\x7f]")
# Datumaro and CVAT strip the lines of their lists and treat "#" as the start of a comment.
_LINE = re.compile(r"^#|^\s|\s$|[\0-\x1f\x7f\x85\u2028\u2029]")
_LABEL = re.compile(f"{_LINE.pattern}|:")  # colons separate the fields of labelmap.txt
# Datumaro keeps all masks in one folder. "%~" marks a name that was cut.
_FILE = re.compile(r"[/\\\0-\x1f\x7f]|%~")

_MAX_FILE_NAME = 255 - len(".png")  # bytes, on every common file system
_DIGEST = 32  # hexadecimal digits


def tar_key(name: str) -> str:
    """Escape the key of a sample in a tar shard, which must have no dot in its last part."""
    return _escaped(name, _TAR)


def line_name(name: str) -> str:
    """Escape a name for a list with one name per line."""
    return _escaped(name, _LINE)


def label_name(name: str) -> str:
    """Escape the name of a class for CVAT's labelmap.txt."""
    return _escaped(name, _LABEL)


def file_name(name: str) -> str:
    """Turn a name into one file name without folders and extension.

    A name that is too long for a file system is cut and ends with "%~" and a digest.
    """
    escaped = _escaped(name, _FILE)
    if len(escaped.encode()) <= _MAX_FILE_NAME:
        return escaped
    ending = "%~" + hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    return escaped.encode()[: _MAX_FILE_NAME - len(ending)].decode(errors="ignore") + ending


def unescape_name(escaped: str) -> str:
    """Invert any of the functions above, unless the name was cut."""
    return unquote(escaped)


def _escaped(name: str, unsafe: re.Pattern[str]) -> str:
    if not unsafe.search(name) and unquote(name) == name:
        return name
    return unsafe.sub(lambda match: _percent(match[0]), name.replace("%", "%25"))


def _percent(text: str) -> str:
    # `quote` leaves dots, tildes and underscores alone.
    return "".join(quoted if (quoted := quote(c, safe="")) != c else f"%{ord(c):02X}" for c in text)


Row = tuple[int, list[bytes]]  # the index of an image, and fields without tabs and line ends


def json_bytes(value: Any) -> bytes:
    """Encode JSON on one line with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def encode_rows(rows: Iterable[tuple[int, Sequence[bytes]]]) -> bytes:
    """Encode the rows of one shard, in the order of the images, as a part for `ordered_rows`."""
    return b"".join(b"\t".join((b"%d" % index, *fields)) + b"\n" for index, fields in rows)


def ordered_rows(folder: RunFolder, writer: str) -> Iterator[Row]:
    """Yield the rows of all shards sorted by index; holds one shard per retry of the run in memory.

    The shards of a run are sorted, and so are those of each retry: this merges sorted lists.
    """
    bounds = list(_sorted_lists(folder, writer))
    lists = (_rows(islice(folder.parts(writer), start, end)) for start, end in bounds)
    return heapq.merge(*lists, key=lambda row: row[0])


def _sorted_lists(folder: RunFolder, writer: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of parts in which the index only increases."""
    start, count, last = 0, 0, -1
    for number, part in enumerate(folder.parts(writer)):
        count = number + 1
        if not part:
            continue
        if _index(part) < last:
            yield start, number
            start = number
        last = _index(part[part.rfind(b"\n", 0, -1) + 1 :])
    if count > start:
        yield start, count


def _rows(parts: Iterable[bytes]) -> Iterator[Row]:
    for part in parts:
        for line in part.split(b"\n")[:-1]:
            index, *fields = line.split(b"\t")
            yield int(index), fields


def _index(line: bytes) -> int:
    return int(line[: line.find(b"\t")])


Int64 = npt.NDArray[np.int64]
Members = Iterable[tuple[str, bytes]]  # name and data

_PALETTE_CHUNKS = (b"PLTE", b"tRNS")
_GREY, _INDEXED = 0, 3  # colour types
_COMPRESSION = 1  # of zlib; more effort gains little, and confidences are noise to it
_MODE = 0o644  # of the members of archives
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip member


def with_palette(png: bytes, palette: UInt8) -> bytes:
    """Replace the palette of a PNG by uint8 [256, 3]."""
    pieces = [PNG_SIGNATURE]
    for kind, data in _chunks(png):
        if kind == b"PLTE":
            data = palette.tobytes()
        if kind != b"tRNS":
            pieces.append(png_chunk(kind, data))
    return b"".join(pieces)


def grey_png(mask: UInt8, png: bytes) -> bytes:
    """Encode class ids uint8 [H, W] as an 8-bit grey PNG. png: the same mask as a palette PNG."""
    chunks = list(_chunks(png))
    header = bytearray(chunks[0][1])  # width, height, bit depth, colour type, ...
    if tuple(header[8:10]) != (8, _INDEXED):
        return encode_grey(mask)
    header[9] = _GREY
    kept = [(kind, data) for kind, data in chunks[1:] if kind not in _PALETTE_CHUNKS]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in [(b"IHDR", bytes(header)), *kept])


def encode_grey(values: UInt8) -> bytes:
    """Encode uint8 [H, W] as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(buffer, "PNG", compress_level=_COMPRESSION)
    return buffer.getvalue()


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    offset = len(PNG_SIGNATURE)
    while offset < len(png):
        (size,) = struct.unpack_from(">I", png, offset)
        yield png[offset + 4 : offset + 8], png[offset + 8 : offset + 8 + size]
        offset += size + 12  # length, kind, data, checksum


def distinct_colours(manifest: Manifest) -> UInt8:
    """Return the bundle's colours uint8 [256, 3]; a class whose colour is taken gets an unused one."""
    preferred = manifest.mask_palette()
    spare = [tuple(colour) for colour in voc_palette().tolist()]
    used: set[tuple[int, ...]] = set()
    colours = np.zeros_like(preferred)
    for value in (*range(len(manifest.classes)), IGNORE_INDEX, *range(len(manifest.classes), IGNORE_INDEX)):
        colour = tuple(preferred[value].tolist())
        if colour in used:
            colour = next(other for other in spare if other not in used)
        used.add(colour)
        colours[value] = colour
    return colours


def ignore_name(manifest: Manifest) -> str:
    """Return the name of unlabelled pixels: "ignore", with underscores if a class has that name."""
    name = "ignore"
    while name in manifest.classes:
        name += "_"
    return name


@dataclass(frozen=True, eq=False)
class RowRuns:
    """The pixels of one class in a flattened mask: from each of `starts` up to each of `ends`."""

    class_id: int
    starts: Int64
    ends: Int64


def row_runs(mask: UInt8) -> Iterator[RowRuns]:
    """Yield the runs of every class id in uint8 [H, W], in the order of ids; runs continue across rows."""
    for runs in encode_rle(mask):
        bounds = np.cumsum(runs.rows, dtype=np.int64)  # outside, inside, outside, ...
        ends = bounds[1::2]
        yield RowRuns(runs.class_id, bounds[: 2 * len(ends) : 2], ends)


def tar_bytes(members: Members) -> bytes:
    """Pack members into a tar in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), _MODE, 0
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members: Members, *, level: int = 0) -> bytes:
    """Pack members into a zip in their order; level 0 stores, 1 to 9 deflate."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            entry = zipfile.ZipInfo(name, _FIRST_DAY)
            entry.create_system, entry.external_attr = 3, _MODE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED
            archive.writestr(entry, data, compresslevel=level or None)
    return buffer.getvalue()
