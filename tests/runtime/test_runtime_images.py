"""Every kind of image a corpus may hold, made here with Pillow."""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging.decode import (
    MINIMUM_SIDE,
    decode_mask,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    working_size,
    write_mask,
)
from multisa.runtime.imaging.png import voc_palette

GREY = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
RGB = np.dstack([GREY, 255 - GREY, GREY // 2])
SIXTEEN = GREY.astype(np.uint16) * 257


def palette_image() -> Image.Image:
    image = Image.fromarray((GREY // 128).astype(np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


def transparent_palette() -> Image.Image:
    image = palette_image()
    image.info["transparency"] = 0
    return image


def alpha(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([RGB, values.astype(np.uint8)]))


ON_WHITE = np.where((GREY < 100)[..., None], 255, RGB)
PALETTE_RGB = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)[GREY // 128]
ROWS: list[tuple[str, Callable[[], Image.Image], np.ndarray, str]] = [
    ("rgb.png", lambda: Image.fromarray(RGB), RGB, ""),
    ("grey.png", lambda: Image.fromarray(GREY), np.dstack([GREY] * 3), ""),
    ("grey.bmp", lambda: Image.fromarray(GREY), np.dstack([GREY] * 3), ""),
    ("sixteen.png", lambda: Image.fromarray(SIXTEEN), np.dstack([GREY] * 3), "16-bit"),
    ("sixteen.tif", lambda: Image.fromarray(SIXTEEN), np.dstack([GREY] * 3), "16-bit"),
    ("integer.tif", lambda: Image.fromarray(SIXTEEN.astype(np.int32)), np.dstack([GREY] * 3), "16-bit"),
    ("palette.png", palette_image, PALETTE_RGB, ""),
    ("hole.png", transparent_palette, np.where((GREY < 128)[..., None], 255, PALETTE_RGB), "transparency"),
    ("alpha.png", lambda: alpha(np.where(GREY < 100, 0, 255)), ON_WHITE, "transparency"),
    ("alpha.tif", lambda: alpha(np.where(GREY < 100, 0, 255)), ON_WHITE, "transparency"),
    ("bits.png", lambda: Image.fromarray(GREY > 100), np.dstack([(GREY > 100) * 255] * 3), ""),
    (
        "cmyk.tif",
        lambda: Image.fromarray(RGB).convert("CMYK"),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
        "CMYK",
    ),
]


@pytest.mark.parametrize(("name", "make", "expected", "note"), ROWS, ids=[row[0] for row in ROWS])
def test_read_image_modes(
    tmp_path: Path, name: str, make: Callable[[], Image.Image], expected: np.ndarray, note: str
) -> None:
    make().save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.rgb.dtype == np.uint8
    assert image.rgb.flags.c_contiguous and image.rgb.flags.writeable
    np.testing.assert_array_equal(image.rgb, expected)
    assert image.orientation == 1
    assert (note in " ".join(image.notes)) if note else image.notes == ()


def test_read_image_cmyk_jpeg_has_the_right_polarity(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK").save(tmp_path / "red.jpg", quality=95)
    red = read_image(tmp_path / "red.jpg").rgb.reshape(-1, 3).mean(axis=0)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_read_image_takes_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "moving.gif")
    assert image.rgb[0, 0].tolist() == [255, 0, 0]
    assert image.notes[0] == "first of 3 frames"


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_applies_orientation_once(tmp_path: Path, extension: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = (250, 250, 250)  # only the top left is bright
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    image = read_image(path)
    assert image.orientation == orientation
    assert image.rgb.shape == upright.shape
    assert np.abs(image.rgb.astype(int) - upright).mean() < 4


def test_read_image_ignores_an_impossible_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(RGB).save(tmp_path / "odd.png", exif=exif)
    assert read_image(tmp_path / "odd.png").orientation == 1


def broken_files(folder: Path) -> dict[str, Path]:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png", "cut.tif", "cut.webp"):
        Image.fromarray(noise).save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("hello")
    Image.fromarray(GREY.astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(GREY.astype(np.int32) * 100000).save(folder / "deep.tif")
    (folder / "folder.jpg").mkdir()
    return {path.name: path for path in folder.iterdir()} | {"absent.jpg": folder / "absent.jpg"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.jpg", "truncated"),
        ("cut.png", "cannot be decoded"),
        ("cut.tif", "cannot be decoded"),
        ("cut.webp", ""),
        ("empty.jpg", "empty"),
        ("text.jpg", "not an image"),
        ("float.tif", "floating-point"),
        ("deep.tif", "32-bit"),
        ("folder.jpg", "is not a regular file, expected an image file"),
        ("absent.jpg", "No such file"),
    ],
)
@pytest.mark.filterwarnings("default")  # Pillow warns of what it finds in broken TIFF files
def test_read_image_errors(tmp_path: Path, name: str, reason: str) -> None:
    path = broken_files(tmp_path)[name]
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason.lower() in str(caught.value).lower()


def box(brand: bytes) -> bytes:
    return struct.pack(">I4s4sI4s4s", 24, b"ftyp", brand, 0, brand, b"miaf") + bytes(range(64))


def tiff(*tags: tuple[int, int]) -> bytes:
    """A TIFF of one byte that is a pixel, with more tags of one number each."""
    common = [(256, 1), (257, 1), (258, 8), (262, 1), (273, 0), (279, 1)]
    numbers = sorted(dict([*common, *tags]).items())
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in numbers)
    return b"II*\0" + struct.pack("<LH", 8, len(numbers)) + entries + bytes(4)


OTHERS = [
    (box(b"heic"), "HEIC", "`heif-convert "),
    (box(b"mif1"), "HEIC", "`heif-convert "),
    (box(b"mif1").replace(b"miaf", b"avif"), "AVIF", "`avifdec "),
    (box(b"avif"), "AVIF", "`avifdec "),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "`djxl "),
    (b"\xff\x0a\xfa\x7f", "JPEG XL", "`djxl "),
    (b"II\xbc\x01\x20\0\0\0", "JPEG XR", "`JxrDecApp "),
    (tiff((50706, 4)), "a camera's raw file", "`darktable-cli "),
    (tiff((254, 1), (330, 8)), "a camera's raw file", "`darktable-cli "),
    (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file", "`darktable-cli "),
    (box(b"crx "), "a camera's raw file", "`darktable-cli "),
    (b"FUJIFILMCCD-RAW 0201", "a camera's raw file", "`darktable-cli "),
    (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg width="1">', "SVG", "`rsvg-convert "),
    (b"<svg/>", "SVG", "`rsvg-convert "),
    (b"%PDF-1.7", "PDF", "`pdftoppm "),
    (b"8BPS\0\1", "a Photoshop document", "`magick "),
    (b"\x76\x2f\x31\x01\2", "OpenEXR", "`magick "),
    (bytes(128) + b"DICM\2", "DICOM", "`dcmj2pnm "),
    (b"\n<!DOCTYPE html><title>404", "an HTML page", "download or copy it again"),
    (b"<html lang=en>", "an HTML page", "download or copy it again"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML", "download or copy it again"),
    (b'{"error": 404}', "JSON", "download or copy it again"),
    (b"\x1f\x8b\x08\0", "a gzip file", "`gunzip`"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer", "`git lfs pull`"),
    (box(b"isom"), "a video", "`ffmpeg "),
    (box(b"qt  "), "a video", "`ffmpeg "),
    (b"hello", "text", "download or copy it again"),
    (bytes(5000), "nothing but zero bytes", "download or copy it again"),
    (b"\x8b\x01\xfe", "an unknown or damaged file", "leave it out"),
    (tiff((258, 64), (339, 3)), "a TIFF with 1 64-bit floating-point samples", "`gdal_translate "),
    (tiff((258, 32), (339, 1), (277, 3), (262, 2)), "a TIFF with 3 32-bit unsigned integer", "`gdal_translate "),
    (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "a damaged TIFF", "download or copy it again"),
]


@pytest.mark.parametrize(("data", "what", "remedy"), OTHERS, ids=[f"{i}-{row[1]}" for i, row in enumerate(OTHERS)])
def test_what_is_no_image_is_named_with_what_helps(tmp_path: Path, data: bytes, what: str, remedy: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "a.jpg")
    found, _, advice = str(caught.value).removeprefix(f"{tmp_path / 'a.jpg'}: ").partition(", expected JPEG, ")
    assert found.startswith(f"not an image of a supported format, got {what}")
    assert remedy in advice.partition(": ")[2] and "\n" not in advice
    with pytest.raises(ImageError, match=r"^not an image of a supported format, got .*, expected PNG: "):
        decode_mask(data)


def test_pixels_without_a_range_are_refused_with_what_helps(tmp_path: Path) -> None:
    for values in (GREY.astype(np.float32), GREY.astype(np.int32) * 100000, GREY.astype(np.int32) - 1):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ImageError, match=r"have no defined range, expected 8 or 16 bits: .*`gdal_translate "):
            read_image(tmp_path / "a.tif")


def test_read_image_limit_is_ours_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow would raise at 9 pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png", max_pixels=48).rgb.shape == (6, 8, 3)
        with pytest.raises(ImageError, match="8x6 = 48 pixels, expected at most 47"):
            read_image(tmp_path / "a.png", max_pixels=47)
    assert Image.MAX_IMAGE_PIXELS == 4


def test_files_are_refused_by_their_size_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr("multisa.runtime.imaging.decode.MAX_FILE_BYTES", size)
    assert read_image(tmp_path / "a.png").size == (6, 8)
    monkeypatch.setattr("multisa.runtime.imaging.decode.MAX_FILE_BYTES", size - 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it is read"))
    with pytest.raises(ImageError, match=f"a.png: {size} bytes, expected at most {size - 1}"):
        read_image(tmp_path / "a.png")


def test_mask_round_trip_is_deterministic(tmp_path: Path) -> None:
    mask = np.random.default_rng(1).integers(0, 256, (31, 17), dtype=np.uint8)
    for name in ("one.png", "two.png"):
        write_mask(tmp_path / name, mask, voc_palette())
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    np.testing.assert_array_equal(read_mask(tmp_path / "one.png"), mask)
    with Image.open(tmp_path / "one.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()


def test_read_mask_takes_grey(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "grey.png"), GREY)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rgb.png", lambda: Image.fromarray(RGB)),
        ("bits.png", lambda: Image.fromarray(GREY > 100)),
        ("sixteen.png", lambda: Image.fromarray(SIXTEEN)),
        ("grey.jpg", lambda: Image.fromarray(GREY)),
    ],
)
def test_read_mask_errors(tmp_path: Path, name: str, make: Callable[[], Image.Image]) -> None:
    make().save(tmp_path / name)
    with pytest.raises(ImageError, match="expected"):
        read_mask(tmp_path / name)


def test_read_mask_refuses_a_bomb_before_it_is_decoded(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", np.zeros((6, 8), np.uint8), voc_palette())
    assert read_mask(tmp_path / "a.png", max_pixels=48).shape == (6, 8)
    with pytest.raises(ImageError, match="8x6 = 48 pixels, expected at most 47"):
        read_mask(tmp_path / "a.png", max_pixels=47)


def test_write_mask_needs_all_colours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"palette: got shape \[3, 3\], expected \[256, 3\]"):
        write_mask(tmp_path / "a.png", np.full((2, 2), 2, np.uint8), voc_palette()[:3])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (400, 600, (200, 300)),
        (600, 400, (300, 200)),
        (200, 150, (300, 225)),
        (100, 70, (200, 140)),  # enlarged at most twice
        (300, 300, (300, 300)),
        (10, 20, (MINIMUM_SIDE, MINIMUM_SIDE)),  # but for the smallest side
        (5000, 20, (300, MINIMUM_SIDE)),
        (1, 1, (MINIMUM_SIDE, MINIMUM_SIDE)),
    ],
)
def test_working_size(height: int, width: int, expected: tuple[int, int]) -> None:
    assert working_size(height, width, 300) == expected


def test_a_working_size_without_enlarging() -> None:
    assert working_size(100, 70, 300, enlarge=1) == (100, 70)
    assert working_size(400, 600, 300, enlarge=1) == (200, 300)


def test_working_size_error() -> None:
    with pytest.raises(ValueError, match="at least"):
        working_size(10, 10, MINIMUM_SIDE - 1)


def test_resize() -> None:
    assert resize_image(RGB, (6, 8)) is RGB
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    shrunk = resize_image(stripes, (16, 16))
    assert shrunk.shape == (16, 16, 3)
    assert abs(int(shrunk[8, 8, 0]) - 127) < 8  # averaged, not sampled
    mask = np.array([[0, 7], [9, 255]], np.uint8)
    enlarged = resize_mask(mask, (4, 6))
    np.testing.assert_array_equal(enlarged, mask.repeat(2, 0).repeat(3, 1))
