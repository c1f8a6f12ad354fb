"""Palette PNGs as other readers see them."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.imaging.decode import decode_mask
from multisa.runtime.imaging.png import display_palette, encode_palette_png, png_encoder, voc_palette

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
    with Image.open(io.BytesIO(encode_palette_png(MASK, voc_palette()))) as image:
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
    assert (png_encoder(), checksum) == ("multisa 2", 1939173506)


def test_an_editor_that_saves_the_mask_again_keeps_255() -> None:
    """Pillow, like other editors, saves a palette image with fewer bits where its palette is shorter."""
    mask = np.array([[0, 1], [255, 2]], np.uint8)
    saved = io.BytesIO()
    with Image.open(io.BytesIO(encode_palette_png(mask, voc_palette()))) as image:
        image.save(saved, "PNG")
    np.testing.assert_array_equal(decode_mask(saved.getvalue()), mask)


def test_display_colours_are_bright_and_differ() -> None:
    most = display_palette(255)
    assert most.shape == (255, 3) and most.dtype == np.uint8 and not most[0].any()
    assert len(np.unique(most, axis=0)) == 255
    # On black: WCAG asks for a contrast of 3 for graphics.
    linear = np.where(most <= 10, most / 255 / 12.92, ((most / 255 + 0.055) / 1.055) ** 2.4)
    contrast = (linear @ (0.2126, 0.7152, 0.0722) + 0.05) / 0.05
    assert contrast[1:].min() >= 3
    for n_classes in (1, 2, 7, 21):
        np.testing.assert_array_equal(display_palette(n_classes), most[:n_classes])


def test_display_colours_differ_for_colour_blind_people() -> None:
    """Who cannot tell red from green is left with brightness and blue."""
    colours = display_palette(8)[1:].astype(float)
    seen = np.stack([colours @ (0.2126, 0.7152, 0.0722), colours[:, 2]], axis=1)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=2)[np.triu_indices(7, 1)]
    assert apart.min() > 20


def test_smaller_than_pillow_where_masks_are_flat() -> None:
    y, x = np.indices((480, 640))
    mask = ((y - 240) ** 2 + (x - 320) ** 2 < 150**2).astype(np.uint8) * 5
    usual = io.BytesIO()
    Image.fromarray(mask).save(usual, "PNG")
    assert len(encode_palette_png(mask, voc_palette())) < len(usual.getvalue()) + 3 * 256


@pytest.mark.parametrize(
    ("mask", "palette", "error", "message"),
    [
        (MASK, voc_palette()[:21], ValueError, r"palette: got shape \[21, 3\], expected \[256, 3\]"),
        (MASK, voc_palette().astype(float), TypeError, "palette: got float64"),
        (MASK, np.zeros((256, 4), np.uint8), ValueError, r"palette: got shape \[256, 4\]"),
        (MASK.astype(int), voc_palette(), TypeError, "mask: got int64"),
        (np.zeros((0, 4), np.uint8), voc_palette(), ValueError, r"mask: got shape \[0, 4\]"),
    ],
)
def test_errors(mask: Any, palette: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_palette_png(mask, palette)
