"""Files swollen with metadata: refused before a decoder goes through it, whatever the machine's speed."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging import decode as decoding
from multisa.runtime.imaging.decode import decode_image
from multisa.runtime.imaging.guards import MOST_FRAMES, check_metadata, count_frames

IMAGE = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3))


def saved(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    IMAGE.save(buffer, format, **options)
    return buffer.getvalue()


def with_segments(segment: bytes, count: int) -> bytes:
    data = saved("JPEG")
    return data[:2] + segment * count + data[2:]


def with_scans(scan: bytes, count: int) -> bytes:
    """More in the picture of a JPEG, before its end."""
    return saved("JPEG", progressive=True)[:-2] + scan * count + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def with_chunks(chunks: bytes) -> bytes:
    data = saved("PNG")
    return data[:33] + chunks + data[33:]


def tiff_of_claims() -> bytes:
    """Each of 500 tags says that the whole file is its content."""
    entries = b"".join(struct.pack("<HHLL", 1000 + i, 7, 7000, 0) for i in range(500))
    return b"II*\0" + struct.pack("<LH", 8, 500) + entries + bytes(4 + 1000)


def jpeg2000(boxes: bytes) -> bytes:
    return b"\0\0\0\x0cjP  \r\n\x87\n" + boxes


def bitmap_of_moves(count: int) -> bytes:
    """A BMP of run lengths that moves by nothing again and again."""
    head = struct.pack("<LllHHLLllLL", 40, 64, 48, 1, 8, 1, 0, 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<LHHL", start, 0, 0, start) + head + bytes(1024) + b"\0\2\0\0" * count


GIF = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0)
EXIF = b"\xff\xe1\xff\xffExif\0\0" + bytes(0xFFFF - 8)
ROWS: list[tuple[str, Callable[[], bytes], str]] = [
    ("exif", lambda: with_segments(EXIF, 300), "segments"),
    ("segments", lambda: with_segments(b"\xff\xe5\0\2", 20_000), "segments"),
    ("junk", lambda: with_segments(bytes(1000), 100), "bytes between segments"),
    ("padding", lambda: with_segments(b"\xff" * 1000, 100), "bytes between segments"),
    ("scans", lambda: with_scans(b"\xff\xda\0\2", 70), "scans"),
    ("scans after an end in a comment", lambda: with_scans(b"\xff\xfe\0\4\xff\xd9\xff\xda\0\2", 70), "scans"),
    ("segments in scans", lambda: with_scans(b"\xff\xfe\0\4\xff\xda", 20_000), "segments"),
    ("chunks", lambda: with_chunks(chunk(b"tEXt", b"a\0b") * 20_000), "chunks"),
    ("pieces", lambda: with_chunks(chunk(b"IDAT", b"") * 600_000), "chunks"),
    ("text bomb", lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "too large"),
    ("comments", lambda: GIF + b"!\xfe" + b"\1a" * 5000 + b"\0", "blocks before the first frame"),
    ("claims", tiff_of_claims, "its tags claim 3500000 bytes"),
    ("boxes", lambda: jpeg2000(b"\0\0\0\x08free" * 20_000), "boxes"),
    ("inner boxes", lambda: jpeg2000(b"\0\xff\0\0jp2h" + b"\0\0\0\x08free" * 20_000), "boxes"),
    ("markers", lambda: b"\xff\x4f\xff\x51\0\2" + b"\xff\x64\0\2" * 20_000, "markers"),
    ("no length", lambda: b"\xff\x4f\xff\x51\0\2" + bytes(100_000), "no length"),
    ("plain comments", lambda: b"P3\n2 2 255\n" + b"#\n" * 100_000, "comments"),
    ("header comment", lambda: b"P6\n" + b"#\n" * 100_000, "bytes of header"),
    ("endless comment", lambda: b"P6\n#" + b"a" * 100_000, "bytes of header"),
    ("moves", lambda: bitmap_of_moves(2**19), r"bytes of run lengths for 64x48 pixels"),
    ("spaces", lambda: b"P6\n" + b" " * 100_000, "bytes of header"),
]


@pytest.mark.parametrize(("name", "make", "reason"), ROWS, ids=[row[0] for row in ROWS])
def test_metadata_bombs(name: str, make: Callable[[], bytes], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    if name != "text bomb":  # Pillow has a limit for these
        monkeypatch.setattr(decoding, "open_image", lambda *_: 1 / 0)
        with pytest.raises(ImageError, match=reason):
            decode_image(data)
        return
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=reason):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20  # of the 95 MiB that it would unpack to
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("big", [False, True])
def test_frames_of_tiff(big: bool) -> None:
    frames = [IMAGE.resize((8, 8)) for _ in range(5)]
    data = saved("TIFF", save_all=True, append_images=frames, big_tiff=big)
    assert count_frames(data) == 6
    assert decode_image(data).notes == ("first of 6 frames",)


def test_directories_in_a_circle_and_without_end() -> None:
    directory = struct.pack("<HHHLL", 1, 256, 4, 1, 8)  # one tag, then the place of the next
    circle = b"II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", 8)
    assert count_frames(circle) == 1
    places = [8 + 18 * (i + 1) for i in range(MOST_FRAMES + 10)]
    endless = b"II*\0" + struct.pack("<L", 8) + b"".join(directory + struct.pack("<L", p) for p in places)
    assert count_frames(endless) == MOST_FRAMES


def test_frames_of_gif_are_counted_to_a_limit() -> None:
    frame = b",\0\0\0\0\4\0\4\0\0\2\2\x84\x51\0"
    for count, note in ((3, "first of 3 frames"), (MOST_FRAMES + 5, f"first of at least {MOST_FRAMES} frames")):
        moving = io.BytesIO()
        IMAGE.convert("P").save(moving, "GIF")
        data = moving.getvalue()[:-1] + frame * (count - 1) + b";"
        assert decode_image(data).notes == (note,)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000"])
def test_usual_metadata_is_let_pass(format: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "words " * 5000
    options = {} if format in ("GIF", "BMP", "PPM", "JPEG2000") else {"exif": exif}
    if format in ("JPEG", "PNG", "TIFF"):
        options["icc_profile"] = bytes(500_000)
    assert decode_image(saved(format, **options)).size == (48, 64)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_film_behind_a_image_is_let_pass(progressive: bool) -> None:
    data = saved("JPEG", progressive=progressive)
    film = bytes([0xFF, 0xDA, 0, 2]) * 500 + np.random.default_rng(0).bytes(2**23)  # phones put it there
    whole = decode_image(data + film)
    assert np.array_equal(whole.rgb, decode_image(data).rgb)
    # What looks like scans in a segment, or in a thumbnail, is none.
    comment = b"\xff\xfe\1\x92" + b"\xff\xda\0\2" * 100
    assert np.array_equal(decode_image(data[:-2] + comment + data[-2:] + film).rgb, whole.rgb)


def test_demo_images_pass() -> None:
    folder = Path(__file__).resolve().parents[2] / "runtime" / "demo_images"
    for path in folder.glob("*.jpg"):
        check_metadata(path.read_bytes())
