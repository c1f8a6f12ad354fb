"""Palette PNGs as other readers see them."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.imaging.decode import decode_mask
from multisa.runtime.imaging.png import encode_palette_png, png_encoder, voc_palette

MASK = np.random.default_rng(0).integers(0, 21, (37, 53), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 53), (480, 640)])
@pytest.mark.parametrize("ids", [1, 2, 21, 256])
def test_pillow_reads_it(size: tuple[int, int], ids: int) -> None:
    mask = np.random.default_rng(ids).integers(0, ids, size, dtype=np.uint8)
    data = encode_palette_png(mask, voc_palette())
    with Image.open(io.BytesIO(data)) as image:
        image.verify()  # every checksum
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()
        np.testing.assert_array_equal(np.array(image), mask)
    np.testing.assert_array_equal(decode_mask(data), mask)


def test_colours_are_what_readers_of_colours_get() -> None:
    with Image.open(io.BytesIO(encode_palette_png(MASK, voc_palette()[:21]))) as image:
        np.testing.assert_array_equal(np.array(image.convert("RGB")), voc_palette()[MASK])


def test_the_file_is_four_chunks_and_one_stream() -> None:
    data, at, kinds = encode_palette_png(MASK, voc_palette()), 8, []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.append(kind)
        if kind == b"IDAT":
            assert len(zlib.decompress(data[at + 8 : at + 8 + length])) == MASK.size + MASK.shape[0]
        at += 12 + length
    assert kinds == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]


def test_the_same_mask_gives_the_same_bytes() -> None:
    assert encode_palette_png(MASK, voc_palette()) == encode_palette_png(MASK.copy(), voc_palette())
    # These are the bytes of this encoder; others need another name, or runs mix two kinds of files.
    checksum = zlib.crc32(encode_palette_png((np.indices((40, 60)).sum(0) // 7).astype(np.uint8), voc_palette()))
    assert (png_encoder(), checksum) == ("multisa 1", 1939173506)


def test_smaller_than_pillow_where_masks_are_flat() -> None:
    y, x = np.indices((480, 640))
    mask = ((y - 240) ** 2 + (x - 320) ** 2 < 150**2).astype(np.uint8) * 5
    usual = io.BytesIO()
    Image.fromarray(mask).save(usual, "PNG")
    assert len(encode_palette_png(mask, voc_palette())) < len(usual.getvalue()) + 3 * 256


@pytest.mark.parametrize(
    ("mask", "palette", "error", "message"),
    [
        (MASK, voc_palette()[:20], ValueError, "id 20, the palette has 20 colours"),
        (MASK, voc_palette().astype(float), TypeError, "palette: got float64"),
        (MASK, np.zeros((0, 3), np.uint8), ValueError, r"palette: got shape \[0, 3\]"),
        (MASK, np.zeros((300, 3), np.uint8), ValueError, r"palette: got shape \[300, 3\]"),
        (MASK.astype(int), voc_palette(), TypeError, "mask: got int64"),
        (np.zeros((0, 4), np.uint8), voc_palette(), ValueError, r"mask: got shape \[0, 4\]"),
    ],
)
def test_errors(mask: Any, palette: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_palette_png(mask, palette)
