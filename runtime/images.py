"""Image files: photographs to RGB arrays, masks to and from palette PNG; and their sizes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.decoding import (
    DECODER_ERRORS,
    MAX_PIXELS,
    MINIMUM_SIDE,
    Photograph,
    check_size,
    decode_image,
    open_image,
    reason_of,
    working_size,
)
from multisa.runtime.errors import ImageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.headers import check_metadata
from multisa.runtime.png import encode_palette_png
from multisa.runtime.sources.contract import MAX_FILE_BYTES

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "MINIMUM_SIDE",
    "Photograph",
    "decode_image",
    "decode_mask",
    "read_image",
    "read_mask",
    "resize_image",
    "resize_mask",
    "working_size",
    "write_mask",
]

UInt8 = npt.NDArray[np.uint8]

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


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Photograph:
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
