"""Palette PNGs of masks, the colour map of PASCAL VOC, and overlays."""

import struct
import zlib

import numpy as np
import numpy.typing as npt

from multisa.kernels import deflate_mask

UInt8 = npt.NDArray[np.uint8]

IGNORE_INDEX = 255
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# One byte per pixel: some readers stretch or refuse the smaller depths of PNG, and compression does not gain
# from them.
_BIT_DEPTH = 8
_PALETTE_COLOURS = 3
_ENCODER = "multisa 1"  # the version changes whenever the bytes of any mask change


def voc_palette() -> UInt8:
    """Return the colours of the VOC devkit, uint8 [256, 3]: the bits of the index spread over R, G and B."""
    index = np.arange(256, dtype=np.uint8)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = (index >> 3).astype(np.uint8)
    return colours


def encode_palette_png(mask: UInt8, palette: UInt8) -> bytes:
    """Encode class ids as a palette PNG (PNG 3rd edition: IHDR, PLTE, IDAT, IEND).

    The bytes are the same on every machine. mask: uint8 [H, W], H, W >= 1. palette: uint8 [n, 3] RGB,
    1 <= n <= 256. Raises TypeError for another dtype, ValueError for another shape or an id without a colour.
    """
    if palette.dtype != np.uint8:
        raise TypeError(f"palette: got {palette.dtype}, expected uint8")
    if palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= 256:
        raise ValueError(f"palette: got shape {list(palette.shape)}, expected [1..256, 3]")
    data = deflate_mask(mask)
    if len(palette) < 256 and int(mask.max()) >= len(palette):
        raise ValueError(f"mask holds id {int(mask.max())}, the palette has {len(palette)} colours")
    height, width = mask.shape
    head = struct.pack(">IIBBBBB", width, height, _BIT_DEPTH, _PALETTE_COLOURS, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", data), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def png_encoder() -> str:
    """Return name and version of the encoder. The same version writes the same bytes for the same mask."""
    return _ENCODER


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG: length, kind, content, checksum."""
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def overlay_mask(rgb: UInt8, mask: UInt8, palette: UInt8, *, opacity: float = 0.5) -> UInt8:
    """Blend the colours of a mask into an image and draw the outline of each region in a lighter tone.

    rgb: uint8 [H, W, 3]. mask: class ids, uint8 [H, W]; the background (0) stays unchanged. palette: uint8
    [n, 3] RGB. opacity: 0..1. Returns uint8 [H, W, 3].
    """
    colours = palette[mask].astype(np.float32)
    region = (mask > 0)[..., np.newaxis]
    blended = np.where(region, rgb * (1 - opacity) + colours * opacity, rgb)
    edge = (_edges(mask) & (mask > 0))[..., np.newaxis]
    return np.asarray(np.where(edge, (colours + 255) / 2, blended).round(), dtype=np.uint8)


def _edges(mask: UInt8) -> npt.NDArray[np.bool_]:
    """Mark the pixels whose upper, lower, left or right neighbour has another class."""
    edges = np.zeros(mask.shape, np.bool_)
    rows = mask[1:] != mask[:-1]
    columns = mask[:, 1:] != mask[:, :-1]
    edges[1:] |= rows
    edges[:-1] |= rows
    edges[:, 1:] |= columns
    edges[:, :-1] |= columns
    return edges
