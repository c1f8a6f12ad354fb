"""A palette PNG with another palette, or as grey; the compressed pixels are taken over where they can be."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import encode_rle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.imaging.png import IGNORE_INDEX, voc_palette

UInt8 = npt.NDArray[np.uint8]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE_CHUNKS = (b"PLTE", b"tRNS")
_GREY, _INDEXED = 0, 3  # colour types
_COMPRESSION = 1


def with_palette(png: bytes, palette: UInt8) -> bytes:
    """Give a palette PNG the colours uint8 [256, 3]; as many as its bit depth has."""
    pieces = [_SIGNATURE]
    for kind, data in _chunks(png):
        if kind == b"PLTE":
            data = palette.tobytes()[: len(data)]
        if kind != b"tRNS":
            pieces.append(_chunk(kind, data))
    return b"".join(pieces)


def grey_png(mask: UInt8, png: bytes) -> bytes:
    """Class ids uint8 [H, W] as an 8-bit grey PNG. png: the same mask as a palette PNG."""
    chunks = list(_chunks(png))
    header = bytearray(chunks[0][1])  # width, height, bit depth, colour type, ...
    if tuple(header[8:10]) != (8, _INDEXED):
        return encode_grey(mask)
    header[9] = _GREY
    kept = [(kind, data) for kind, data in chunks[1:] if kind not in _PALETTE_CHUNKS]
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in [(b"IHDR", bytes(header)), *kept])


def encode_grey(mask: UInt8) -> bytes:
    """Encode class ids uint8 [H, W] as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(buffer, "PNG", compress_level=_COMPRESSION)
    return buffer.getvalue()


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_SIGNATURE)
    while place < len(png):
        (size,) = struct.unpack_from(">I", png, place)
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        place += size + 12  # the length, the kind, the data, the checksum


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def distinct_colours(manifest: Manifest) -> UInt8:
    """Colours uint8 [256, 3], the bundle's where no class before has it, and no colour twice."""
    wanted = manifest.mask_palette()
    spare = [tuple(colour) for colour in voc_palette().tolist()]
    used: set[tuple[int, ...]] = set()
    colours = np.zeros_like(wanted)
    for value in (*range(len(manifest.classes)), IGNORE_INDEX, *range(len(manifest.classes), IGNORE_INDEX)):
        colour = tuple(wanted[value].tolist())
        if colour in used:
            colour = next(other for other in spare if other not in used)
        used.add(colour)
        colours[value] = colour
    return colours


def ignore_name(manifest: Manifest) -> str:
    """What the value of pixels without a label is called: "ignore", or another name if a class has that."""
    name = "ignore"
    while name in manifest.classes:
        name += "_"
    return name


Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CocoMask:
    """The mask of one class as COCO's tools read it."""

    class_id: int
    counts: str  # compressed run lengths, down the columns
    area: int  # pixels
    box: tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True, eq=False)
class FlatRuns:
    """Where one class is in a mask laid out flat: from each of `starts` up to each of `ends`."""

    class_id: int
    starts: Int64
    ends: Int64


def coco_masks(mask: UInt8) -> tuple[CocoMask, ...]:
    """Encode every class id in uint8 [H, W], by id. The same strings as pycocotools' encoder."""
    return tuple(
        CocoMask(runs.class_id, runs.compressed.decode("ascii"), runs.area, runs.box)
        for runs in encode_rle(mask)
    )


def row_runs(mask: UInt8) -> tuple[FlatRuns, ...]:
    """Find the runs of every class id in uint8 [H, W], by id; a run goes on into the next row."""
    found = []
    for runs in encode_rle(mask):
        bounds = np.cumsum(runs.rows, dtype=np.int64)  # outside, inside, outside, ...
        ends = bounds[1::2]
        found.append(FlatRuns(runs.class_id, bounds[: 2 * len(ends) : 2], ends))
    return tuple(found)


_MODE = 0o644
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can name

Members = Iterable[tuple[str, bytes]]


def tar_bytes(members: Members) -> bytes:
    """Pack (name, data) into a tar, in the order given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), _MODE, 0
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members: Members, *, level: int = 0) -> bytes:
    """Pack (name, data) into a zip, in the order given; deflated from level 1 to 9, stored at 0."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            entry = zipfile.ZipInfo(name, _FIRST_DAY)
            entry.create_system, entry.external_attr = 3, _MODE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED
            archive.writestr(entry, data, compresslevel=level or None)
    return buffer.getvalue()
