"""The pictures of the report: shrunk images, and masks drawn over them, as JPEG."""

import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import overlay_mask

UInt8 = npt.NDArray[np.uint8]

FOLDER = "report"  # below OUT
PAGE = "report.html"  # below OUT
LONG_SIDE = 640  # pixels of a picture
PHOTO = "photo"  # kind of a picture: the image
OVERLAY = "overlay"  # kind of a picture: the mask over the image

_JPEG_QUALITY = 88
_GREY = 128  # background of a mask whose image is gone
_PICTURE_NAME = re.compile(r"[0-9]{6,20}\.[a-z]+\.jpg")


def picture_path(index: int, kind: str) -> str:
    """Path below OUT of a picture of image `index`. kind: a lower-case word; runs use PHOTO and OVERLAY."""
    return f"{FOLDER}/{index:06d}.{kind}.jpg"


def write_image(out: Path, index: int, rgb: UInt8, kind: str = PHOTO) -> None:
    """Write an image, uint8 [H, W, 3], shrunk to LONG_SIDE, as JPEG."""
    size = working_size(rgb.shape[0], rgb.shape[1], LONG_SIDE)
    write_jpeg(out / picture_path(index, kind), Image.fromarray(resize_image(rgb, size)))


def write_overlay(
    out: Path, index: int, rgb: UInt8 | None, mask: UInt8, manifest: Manifest, kind: str = OVERLAY
) -> None:
    """Write a mask drawn over its image, or over grey without one, shrunk to LONG_SIDE, as JPEG.

    rgb: uint8 [H, W, 3] or None; mask: uint8 [H, W] of the same size.
    """
    size = working_size(mask.shape[0], mask.shape[1], LONG_SIDE)
    under = np.full((*size, 3), _GREY, np.uint8) if rgb is None else resize_image(rgb, size)
    drawn = overlay_mask(under, resize_mask(mask, size), manifest.mask_palette())
    write_jpeg(out / picture_path(index, kind), Image.fromarray(drawn))


def clear_pictures(out: Path) -> None:
    """Remove the pictures of earlier reports: every file in OUT/report with the name of a picture.

    Raises UsageError if OUT/report is a link or not a folder, where pictures would be written elsewhere.
    """
    folder = out / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: is a link or not a folder, expected the report's own folder: remove it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PICTURE_NAME.fullmatch(path.name):
            path.unlink()


def write_jpeg(path: Path, image: Image.Image, quality: int = _JPEG_QUALITY) -> None:
    """Write a picture as JPEG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    write_bytes_atomically(path, buffer.getvalue())
