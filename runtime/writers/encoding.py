"""Encodings that several formats share: PNGs with other palettes, run lengths, and archives.

Where possible, palettes are replaced without decompressing the pixels.
"""

import io
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import encode_rle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.imaging.png import IGNORE_INDEX, PNG_SIGNATURE, png_chunk, voc_palette

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Members = Iterable[tuple[str, bytes]]  # name and data

_PALETTE_CHUNKS = (b"PLTE", b"tRNS")
_GREY, _INDEXED = 0, 3  # colour types
_COMPRESSION = 1  # of zlib; more effort gains little, and confidences are noise to it
_MODE = 0o644  # of the members of archives
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip member


def with_palette(png: bytes, palette: UInt8) -> bytes:
    """Replace the palette of a PNG by the first colours of uint8 [256, 3], as many as it has."""
    pieces = [PNG_SIGNATURE]
    for kind, data in _chunks(png):
        if kind == b"PLTE":
            data = palette.tobytes()[: len(data)]
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
