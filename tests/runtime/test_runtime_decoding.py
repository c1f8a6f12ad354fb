"""Decoding from bytes: the fast way against Pillow's, and smaller than full size."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging import decode as decoding
from multisa.runtime.imaging.decode import SCALED_SIDES, decode_image, resize_image, working_size

DEMO = sorted((Path(__file__).resolve().parents[2] / "runtime" / "demo_images").glob("*.jpg"))
IMAGES = Path(__file__).resolve().parents[3] / "shared/data/voc-animals/JPEGImages"


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def saved(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image(side: int | None = None) -> Image.Image:
    with Image.open(DEMO[0]) as file:
        image = file.convert("RGB")
    return image if side is None else image.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)


def forbid_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that Pillow decodes from now on are an error."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: 1 / 0)


def real_files() -> list[Path]:
    return DEMO + (sorted(IMAGES.glob("*.jpg"))[::40] if IMAGES.exists() else [])


@pytest.mark.parametrize("path", real_files(), ids=lambda path: path.stem)
def test_real_images_have_pillows_pixels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pillow(path.read_bytes())
    forbid_pillows_pixels(monkeypatch)
    decoded = decode_image(path.read_bytes())
    np.testing.assert_array_equal(decoded.rgb, expected)
    assert decoded.size == expected.shape[:2]
    assert decoded.rgb.flags.c_contiguous and decoded.rgb.flags.writeable


@pytest.mark.parametrize(
    "make",
    [
        lambda image: saved(image, progressive=True),
        lambda image: saved(image, optimize=True, restart_marker_blocks=3),
        lambda image: saved(image.convert("L")),
        *(lambda image, s=s: saved(image, subsampling=s) for s in (0, 1, 2)),
        lambda image: saved(image, keep_rgb=True),
        lambda image: saved(image.crop((0, 0, 37, 1))),
        lambda image: saved(image.crop((0, 0, 1, 1)), quality=30),
    ],
    ids=["progressive", "restarts", "grey", "444", "422", "420", "rgb", "row", "pixel"],
)
def test_kinds_of_jpeg_have_pillows_pixels(
    make: Callable[[Image.Image], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(image())
    expected = pillow(data)
    forbid_pillows_pixels(monkeypatch)
    np.testing.assert_array_equal(decode_image(data).rgb, expected)


def test_cmyk_and_small_defects_are_pillows() -> None:
    cmyk = saved(image().convert("CMYK"))
    assert decode_image(cmyk).notes == ("CMYK converted without its colour profile",)
    np.testing.assert_array_equal(decode_image(cmyk).rgb, pillow(cmyk))
    data = bytearray(saved(image()))
    data[len(data) // 2 : len(data) // 2 + 4] = b"\xff\xd3\xff\xd1"  # libjpeg warns and goes on
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(bytes(data))
    np.testing.assert_array_equal(decode_image(bytes(data)).rgb, pillow(bytes(data)))


@pytest.fixture(scope="module")
def large() -> Image.Image:
    return image(4000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_much_larger_than_needed_is_decoded_smaller(
    orientation: int, large: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(large, exif=exif, quality=90)
    forbid_pillows_pixels(monkeypatch)
    whole, scaled = decode_image(data), decode_image(data, long_side=400)
    assert scaled.size == whole.size == whole.rgb.shape[:2]
    assert scaled.size == ((4000, 3000) if orientation >= 5 else (3000, 4000))
    size = working_size(*scaled.size, 400)
    assert scaled.rgb.shape[0] >= SCALED_SIDES * size[0] and scaled.rgb.shape[1] >= SCALED_SIDES * size[1]
    assert scaled.rgb.nbytes < whole.rgb.nbytes / 8
    difference = np.abs(resize_image(scaled.rgb, size).astype(int) - resize_image(whole.rgb, size))
    assert difference.mean() < 2  # grey levels


def test_what_is_not_much_larger_keeps_every_pixel() -> None:
    data = saved(image(799))
    np.testing.assert_array_equal(decode_image(data, long_side=400).rgb, pillow(data))
    png = saved(image(1700), "PNG")
    np.testing.assert_array_equal(decode_image(png, long_side=400).rgb, pillow(png))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000"])
def test_sizes_are_refused_before_pixels_are_decoded(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(image(), format)
    width, height = image().size
    forbid_pillows_pixels(monkeypatch)
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: 1 / 0)
    with pytest.raises(ImageError, match=rf"^{width}x{height} = .* expected at most 1000: .*--max-pixels"):
        decode_image(data, max_pixels=1000)


def test_a_panorama_is_refused_by_the_limit_and_read_with_a_higher_one() -> None:
    data = saved(Image.new("RGB", (30_000, 1_700), (9, 99, 199)), quality=50)
    with pytest.raises(ImageError, match="30000x1700 = 51000000 pixels, expected at most 50000000"):
        decode_image(data, long_side=512)
    decoded = decode_image(data, max_pixels=60_000_000, long_side=512)
    assert decoded.size == (1_700, 30_000)
    assert decoded.rgb.shape[1] < 30_000
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")
