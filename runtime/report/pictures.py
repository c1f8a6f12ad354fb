"""The pictures of the page: images, shrunk, and masks laid over them."""

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

FOLDER, PAGE = "report", "report.html"  # below OUT
LONG_SIDE = 640  # of the pictures on the page
PHOTO, OVERLAY = "photo", "overlay"

_JPEG_QUALITY = 88
_GREY = 128  # behind the mask of an image that is gone
_OURS = re.compile(r"[0-9]{6,20}\.[a-z]+\.jpg")


def picture_path(index: int, kind: str) -> str:
    """Path below OUT of one picture of image `index`; kind: a plain word, PHOTO or OVERLAY for a run's."""
    return f"{FOLDER}/{index:06d}.{kind}.jpg"


def write_image(out: Path, index: int, rgb: UInt8, kind: str = PHOTO) -> None:
    """Write an image, uint8 [H, W, 3], shrunk to 640 pixels, as JPEG."""
    size = working_size(rgb.shape[0], rgb.shape[1], LONG_SIDE)
    _write_jpeg(out / picture_path(index, kind), resize_image(rgb, size))


def write_overlay(
    out: Path, index: int, rgb: UInt8 | None, mask: UInt8, manifest: Manifest, kind: str = OVERLAY
) -> None:
    """Write a mask over its image, shrunk to 640 pixels, as JPEG; over grey where that is gone.

    rgb: uint8 [H, W, 3] or None; mask: uint8 [H, W] of the same size.
    """
    size = working_size(mask.shape[0], mask.shape[1], LONG_SIDE)
    under = np.full((*size, 3), _GREY, np.uint8) if rgb is None else resize_image(rgb, size)
    _write_jpeg(
        out / picture_path(index, kind), overlay_mask(under, resize_mask(mask, size), manifest.mask_palette())
    )


def clear_pictures(out: Path) -> None:
    """Remove the pictures of earlier reports: every file in OUT/report that is named as ours.

    Raises UsageError where OUT/report is a link or no folder: the pictures would land elsewhere.
    """
    folder = out / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: is a link or no folder, expected the report's own: remove it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if _OURS.fullmatch(path.name):
            path.unlink()


def _write_jpeg(path: Path, rgb: UInt8) -> None:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    write_bytes_atomically(path, buffer.getvalue())
