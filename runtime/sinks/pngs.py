"""A palette PNG with another palette, or as grey; the compressed pixels are taken over where they can be."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

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
