"""The only image input and output of multisa: photographs to RGB arrays, masks to and from palette PNG."""

import errno
import io
import os
import struct
import threading
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

UInt8 = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
MINIMUM_SIDE = 64  # the exported graphs take no smaller side
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
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

_PNG_COMPRESSION = 1  # flat areas compress well at any level; 1 is several times faster than the default 6
# What a picture stored with this EXIF orientation needs to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Everything Pillow's decoders raise for broken files.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, ArithmeticError),
    *(AttributeError, NotImplementedError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
_guard = threading.Lock()


@dataclass(frozen=True, eq=False)
class Photograph:
    """One upright image and what was done to it."""

    rgb: UInt8  # [H, W, 3], contiguous
    orientation: int  # EXIF orientation as found, 1..8 (1 when absent); `rgb` is upright already
    notes: tuple[str, ...]  # conversions that lose something, in words


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Photograph:
    """Read one image as upright RGB; every mode Pillow knows with a defined 8-bit meaning is accepted.

    Grey is repeated, 16-bit grey is scaled to 8 bits, transparency is laid on white, of an animation the
    first frame is taken. Raises ImageError (`PATH: reason`) for a file that is missing, empty, truncated,
    not an image, larger than `max_pixels`, or of a mode without a defined range (float, 32-bit integer).
    """
    try:
        with _open(path, FORMATS) as image:
            _check_size(path, image, max_pixels)
            notes = []
            frames = int(getattr(image, "n_frames", 1))
            if frames > 1:
                notes.append(f"first of {frames} frames")
            found = _orientation(image)
            image.load()
            # TIFF turns itself upright while loading and drops the tag, so what is left to do is asked again.
            remaining = _orientation(image)
            rgb = _to_rgb(image, notes)
    except _DECODER_ERRORS as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    if remaining in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[remaining])
    return Photograph(np.array(rgb, dtype=np.uint8, order="C"), found, tuple(notes))


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Read class ids uint8 [H, W] from a palette or 8-bit grey PNG of at most `max_pixels`.

    Raises ImageError for anything else: a mask of colours or of another depth has no ids to read.
    """
    try:
        with _open(path, MASK_FORMATS) as image:
            _check_size(path, image, max_pixels)
            mode = image.mode
            # Pillow stretches grey of 1, 2 or 4 bits to 0..255, which would change the ids.
            raw_mode = str(image.tile[0].args)
            ids = np.array(image) if mode == "P" or (mode == "L" and raw_mode == "L") else None
    except _DECODER_ERRORS as error:
        raise ImageError(f"{path}: {_reason(error, MASK_FORMATS)}") from error
    if ids is None:
        raise ImageError(
            f"{path}: got a mask of mode {raw_mode}, expected a palette or 8-bit grey PNG whose values are "
            "class ids: map each colour to its id and save it so"
        )
    return ids.astype(np.uint8, copy=False)


def write_mask(path: Path, mask: UInt8, palette: UInt8) -> None:
    """Write class ids uint8 [H, W] as a palette PNG, atomically; the same mask gives the same bytes.

    palette: uint8 [n, 3] with n > every id, n <= 256. Raises ValueError when an id has no colour.
    """
    if mask.size and int(mask.max()) >= len(palette):
        raise ValueError(f"mask holds id {int(mask.max())}, the palette has {len(palette)} colours")
    image = Image.fromarray(np.ascontiguousarray(mask))
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
    write_bytes_atomically(path, buffer.getvalue())


def working_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Size (height, width) the networks see: the long side at most `long_side`, no side below MINIMUM_SIDE.

    Nothing is enlarged except a side shorter than that. Raises ValueError for long_side < MINIMUM_SIDE.
    """
    if long_side < MINIMUM_SIDE:
        raise ValueError(f"long_side is {long_side}, expected at least {MINIMUM_SIDE}")
    scale = min(1.0, long_side / max(height, width))
    return max(MINIMUM_SIDE, round(height * scale)), max(MINIMUM_SIDE, round(width * scale))


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


@contextmanager
def _open(path: Path, formats: tuple[str, ...]) -> Iterator[ImageFile.ImageFile]:
    if path.is_file() and path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty")
    # Pillow's own size guard is a module-wide number that warns or raises before the size can be compared
    # with the caller's limit; it is lifted while the header is read, and no pixel is decoded in that time.
    with _guard:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            f"{path}: {image.width}x{image.height} = {pixels} pixels, expected at most {max_pixels}: "
            "shrink it or raise the limit (--max-pixels)"
        )


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels have no defined range, expected 8 or 16 bits: convert first")
    # 65535 = 255 * 257, so this is the exact rounded quotient.
    return ((values + 128) // 257).astype(np.uint8)


def _reason(error: BaseException, formats: tuple[str, ...] = FORMATS) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a format that can be read here, expected {', '.join(formats)}"
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        return f"{reason}: check the path" if error.errno == errno.ENOENT else reason
    return f"cannot be decoded: {str(error) or type(error).__name__}"
