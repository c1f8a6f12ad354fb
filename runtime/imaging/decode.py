"""Images from bytes: the one way that images are decoded, whatever they come from.

    image = decode_image(data, long_side=512)      # image.rgb, image.size

JPEGs go through libjpeg-turbo, whose pixels are Pillow's; everything else, and what is odd, through Pillow.
"""

import errno
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from multisa.runtime.errors import ImageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.guards import MOST_FRAMES, check_metadata, check_tiff, count_frames
from multisa.runtime.imaging.png import encode_palette_png

UInt8 = npt.NDArray[np.uint8]

MAX_FILE_BYTES = 512 * 2**20  # of one image; no camera writes more, and a worker holds one in memory
MAX_PIXELS = 50_000_000
MINIMUM_SIDE = 64  # the exported graphs take no smaller side
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# A JPEG that is decoded smaller keeps this many times the side that the networks see. Of the labels of 13
# images, enlarged to 12 megapixels, 0.5 % change so (benchmarks/encoding.py; 0.2 % of its 12); 0.8 % do
# when what the networks see is saved as a JPEG of quality 95.
SCALED_SIDES = 2

# Everything Pillow's decoders raise for broken files.
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, ArithmeticError),
    *(AttributeError, AssertionError, NotImplementedError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
_guard = threading.Lock()


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One upright image and what was done to it."""

    rgb: UInt8  # [h, w, 3], contiguous; smaller than `size` only where `long_side` was given
    orientation: int  # EXIF orientation as found, 1..8 (1 when absent); `rgb` is upright already
    notes: tuple[str, ...]  # conversions that lose something, in words
    size: tuple[int, int]  # (H, W) of the upright image itself: masks are written in it


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, long_side: int | None = None) -> DecodedImage:
    """Decode one image file as upright RGB; every mode Pillow knows with a defined 8-bit meaning is accepted.

    Grey is repeated, 16-bit grey is scaled to 8 bits, transparency is laid on white, of an animation the
    first frame is taken. Where `long_side` says what will be resized to (see `working_size`), a JPEG that is
    much larger is decoded at one or more eighths of its size, never below SCALED_SIDES times that one.
    Raises ImageError (the reason) for what is empty, truncated, not an image, larger than `max_pixels`, of a
    mode without a defined range (float, 32-bit integer), or swollen with metadata; sizes are looked at before
    a pixel is decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        check_metadata(data)
        with open_image(data, FORMATS) as image:
            check_size(image, max_pixels)
            notes = _frame_notes(data, image)
            found = _orientation(image)
            rgb = _decode_jpeg(data, image, long_side)
            size = image.size
            if rgb is None:
                image.load()
                rgb = np.array(_to_rgb(image, notes), dtype=np.uint8, order="C")
                size = image.size  # a TIFF turns itself upright while loading
            # It also drops the tag then, so what is left to do is asked again.
            remaining = _orientation(image)
    except DECODER_ERRORS as error:
        raise ImageError(reason_of(error)) from error
    width, height = size if remaining < 5 else size[::-1]
    return DecodedImage(_upright(rgb, remaining), found, tuple(notes), (height, width))


def working_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Size (height, width) the networks see: the long side at most `long_side`, no side below MINIMUM_SIDE.

    Nothing is enlarged except a side shorter than that. Raises ValueError for long_side < MINIMUM_SIDE.
    """
    if long_side < MINIMUM_SIDE:
        raise ValueError(f"long_side is {long_side}, expected at least {MINIMUM_SIDE}")
    scale = min(1.0, long_side / max(height, width))
    return max(MINIMUM_SIDE, round(height * scale)), max(MINIMUM_SIDE, round(width * scale))


@contextmanager
def open_image(data: bytes, formats: tuple[str, ...]) -> Iterator[ImageFile.ImageFile]:
    """Open an image with Pillow: its header is read, its pixels are not. Raises any of DECODER_ERRORS."""
    # Pillow's own size guard is a module-wide number that warns or raises before the size can be compared
    # with the caller's limit; it is lifted while the header is read, and no pixel is decoded in that time.
    with _guard:
        # What Pillow finds odd in a file that it can read is not for those who label a million of them. The
        # filter stays: taking filters back is not safe while other threads decode.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError when an image that was opened has more than `max_pixels`."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            f"{image.width}x{image.height} = {pixels} pixels, expected at most {max_pixels}: "
            "shrink it or raise the limit (--max-pixels)"
        )


def reason_of(error: BaseException, formats: tuple[str, ...] = FORMATS) -> str:
    """Say in words why an image could not be opened or decoded."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a format that can be read here, expected {', '.join(formats)}"
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        return f"{reason}: check the path" if error.errno == errno.ENOENT else reason
    return f"cannot be decoded: {str(error) or type(error).__name__}"


def _frame_notes(data: bytes, image: ImageFile.ImageFile) -> list[str]:
    # Pillow counts the frames of these formats by going through each of them.
    pluralize = count_frames(data)
    frames = int(getattr(image, "n_frames", 1)) if pluralize is None else pluralize
    if frames <= 1:
        return []
    return [f"first of {'at least ' if pluralize == MOST_FRAMES else ''}{frames} frames"]


def _orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        check_tiff(exif.removeprefix(b"Exif\0\0"))
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_jpeg(data: bytes, image: ImageFile.ImageFile, long_side: int | None) -> UInt8 | None:
    """Decode a grey or colour JPEG without defects to [h, w, 3]; None leaves any other to Pillow.

    Its pixels are Pillow's at full size: both use libjpeg-turbo's accurate DCT and smooth upsampling.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    least = (0, 0)
    if long_side is not None:
        height, width = working_size(image.height, image.width, long_side)
        least = (SCALED_SIDES * height, SCALED_SIDES * width)
    try:
        rgb: UInt8 = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None  # Pillow reads what has small defects, and has the words for the others
    # The two headers are read by different programs; a file that they read differently is not plain.
    scaled = long_side is not None and rgb.shape[0] >= least[0] and rgb.shape[1] >= least[1]
    return rgb if scaled or rgb.shape[:2] == (image.height, image.width) else None


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range, expected 8 or 16 bits: convert first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        notes.append("16-bit grey scaled to 8 bits")
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        notes.append("transparency laid on white")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "CMYK":
        notes.append("CMYK converted without its colour profile")
    return image.convert("RGB")


def _eight_bits(grey: npt.NDArray[np.integer]) -> UInt8:
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit integer pixels have no defined range, expected 8 or 16 bits: convert first")
    # 65535 = 255 * 257, so this is the exact rounded quotient.
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _upright(rgb: UInt8, orientation: int) -> UInt8:
    """Turn a picture stored with this EXIF orientation so that it stands upright; contiguous."""
    if orientation >= 5:  # stored with rows and columns exchanged
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


MASK_FORMATS = ("PNG",)
EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jp2",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    )
)


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Read one image file as upright RGB of its full size, as `decode_image` does.

    Raises ImageError (`PATH: reason`) for a file that is missing, or that cannot be decoded.
    """
    try:
        return decode_image(_read(path), max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Decode class ids uint8 [H, W] from the bytes of a palette or 8-bit grey PNG of at most `max_pixels`.

    Raises ImageError (the reason) for anything else: a mask of colours or of another depth has no ids.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        check_metadata(data)
        with open_image(data, MASK_FORMATS) as image:
            check_size(image, max_pixels)
            mode = image.mode
            # Pillow stretches grey of 1, 2 or 4 bits to 0..255, which would change the ids.
            raw_mode = str(image.tile[0].args)
            ids = np.array(image) if mode == "P" or (mode == "L" and raw_mode == "L") else None
    except DECODER_ERRORS as error:
        raise ImageError(reason_of(error, MASK_FORMATS)) from error
    if ids is None:
        raise ImageError(
            f"got a mask of mode {raw_mode}, expected a palette or 8-bit grey PNG whose values are "
            "class ids: map each colour to its id and save it so"
        )
    return ids.astype(np.uint8, copy=False)


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Read class ids uint8 [H, W] as `decode_mask` does. Raises ImageError (`PATH: reason`)."""
    try:
        return decode_mask(_read(path), max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def write_mask(path: Path, mask: UInt8, palette: UInt8) -> None:
    """Write class ids uint8 [H, W] atomically, encoded as `encode_palette_png` does, which raises, too."""
    write_bytes_atomically(path, encode_palette_png(mask, palette))


def resize_image(rgb: UInt8, size: tuple[int, int]) -> UInt8:
    """Resize uint8 [H, W, 3] to [*size, 3] bilinearly, averaging over the source area when shrinking."""
    return _resize(rgb, size, Image.Resampling.BILINEAR)


def resize_mask(mask: UInt8, size: tuple[int, int]) -> UInt8:
    """Resize class ids uint8 [H, W] to `size` by nearest neighbour."""
    return _resize(mask, size, Image.Resampling.NEAREST)


def _resize(array: UInt8, size: tuple[int, int], kernel: Image.Resampling) -> UInt8:
    if array.shape[:2] == size:
        return array
    height, width = size
    return np.array(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), kernel))


def _read(path: Path) -> bytes:
    try:
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(
                f"{path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}: save it smaller"
            )
        return path.read_bytes()
    except OSError as error:
        raise ImageError(reason_of(error)) from error


@dataclass(frozen=True, eq=False)
class WorkingImage:
    """An upright image at its working size; its own pixels are gone."""

    rgb: UInt8  # [h, w, 3]
    height: int  # of the image itself, upright
    width: int
    orientation: int  # EXIF, as found
    notes: tuple[str, ...]


def decode_working_image(data: bytes, *, max_pixels: int, long_side: int) -> WorkingImage:
    """Decode and shrink to the bundle's long side. Raises ImageError."""
    image = decode_image(data, max_pixels=max_pixels, long_side=long_side)
    height, width = image.size
    rgb = resize_image(image.rgb, working_size(height, width, long_side))
    return WorkingImage(rgb, height, width, image.orientation, image.notes)
