"""Palette PNGs of masks, the colour map of PASCAL VOC, overlays and their colours."""

import struct
import zlib
from functools import cache

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
_ENCODER = "multisa 2"  # the version changes whenever the bytes of any mask change

# Linear RGB as people without red or green cones see it (Machado et al. 2009, severity 1).
_COLOUR_BLIND = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)
# From linear RGB to the colour space Oklab (Ottosson 2020), where distances are those that people see: before and
# after a cube root.
_OKLAB = (
    ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
     (0.0883024619, 0.2817188376, 0.6299787005)),
    ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
     (0.0259040371, 0.7827717662, -0.8086757660)),
)  # fmt: skip
_LEAST_LIGHTNESS = 0.62  # of a display colour in Oklab, to be seen on a dark image
_LEAST_CHROMA = 0.12  # to differ from grey
_FIRST_COLOUR = (255, 0, 191)  # rare in photos


def voc_palette() -> UInt8:
    """Return the colours of the VOC devkit, uint8 [256, 3]: the bits of the index spread over R, G and B."""
    index = np.arange(256, dtype=np.uint8)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = (index >> 3).astype(np.uint8)
    return colours


@cache
def display_palette(n_classes: int) -> UInt8:
    """Return bright colours for overlays, uint8 [n_classes, 3]; black for the background.

    Each colour is the one farthest from all before it, for the worst of normal vision and two kinds of colour
    blindness, so the first ones differ most. n_classes: 1..255.
    """
    levels = np.linspace(0, 255, 9).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = np.where(colours <= 10, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)  # sRGB
    lightness, *chroma = _oklab(linear).T
    bright = (lightness >= _LEAST_LIGHTNESS) & (np.hypot(*chroma) >= _LEAST_CHROMA)
    colours, linear = colours[bright], linear[bright]
    seen = np.stack([_oklab(linear @ np.transpose(vision)) for vision in (np.eye(3), *_COLOUR_BLIND)])
    chosen = [int(np.abs(colours - _FIRST_COLOUR).sum(axis=1).argmin())]
    distances = np.full(len(colours), np.inf)
    for _ in range(n_classes - 2):
        to_last = np.linalg.norm(seen - seen[:, chosen[-1:]], axis=2).min(axis=0)
        distances = np.minimum(distances, to_last)
        chosen.append(int(distances.argmax()))
    palette = np.zeros((n_classes, 3), np.uint8)
    palette[1:] = colours[chosen[: n_classes - 1]]
    palette.flags.writeable = False  # callers share it
    return palette


def _oklab(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert linear RGB [n, 3] to Oklab [n, 3]: lightness and two axes of colour."""
    first, second = (np.transpose(matrix) for matrix in _OKLAB)
    return np.asarray(np.cbrt((linear.clip(0, 1)) @ first) @ second)


def encode_palette_png(mask: UInt8, palette: UInt8) -> bytes:
    """Encode class ids as a palette PNG (PNG 3rd edition: IHDR, PLTE, IDAT, IEND).

    The bytes are the same on every machine. mask: uint8 [H, W], H, W >= 1. palette: uint8 [256, 3] RGB; editors
    save a mask with fewer colours at fewer bits, which loses the ids above. Raises TypeError for another dtype,
    ValueError for another shape.
    """
    if palette.dtype != np.uint8:
        raise TypeError(f"palette: got {palette.dtype}, expected uint8")
    if palette.shape != (256, 3):
        raise ValueError(f"palette: got shape {list(palette.shape)}, expected [256, 3]: begin with voc_palette()")
    data = deflate_mask(mask)
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
    [n, 3] RGB, see `display_palette`; ids without a colour, such as 255, stay unchanged too. opacity: 0..1.
    Returns uint8 [H, W, 3].
    """
    colours = palette.take(mask, axis=0, mode="clip").astype(np.float32)
    region = (mask > 0) & (mask < len(palette))
    blended = np.where(region[..., np.newaxis], rgb * (1 - opacity) + colours * opacity, rgb)
    edge = (_edges(mask) & region)[..., np.newaxis]
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
