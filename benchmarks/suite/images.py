"""The images of a data set that are measured, and how they are read."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.evaluation import confusion_matrix
from multisa.runtime.imaging.decode import read_image, read_mask, resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import UInt8, voc_palette


@dataclass(frozen=True)
class LabelledImage:
    """One image of the data set: its file, its ground-truth mask and its image-level labels."""

    id: str
    path: Path
    mask: Path
    classes: tuple[str, ...] = ()


def read_working(path: Path, long_side: int) -> UInt8:
    """An image as uint8 [1, h, w, 3], at the working size of the bundle."""
    return read_plainly(path, long_side)[0][np.newaxis]


def scaled_to(path: Path, long_side: int) -> UInt8:
    """An image as uint8 [1, h, w, 3] whose long side is `long_side`, enlarged if need be."""
    rgb = read_image(path).rgb
    factor = long_side / max(rgb.shape[:2])
    size = (max(round(rgb.shape[0] * factor), 1), max(round(rgb.shape[1] * factor), 1))
    return np.ascontiguousarray(resize_image(rgb, size))[np.newaxis]


def count_confusion(labels: UInt8, mask: Path, n_classes: int) -> npt.NDArray[np.int64]:
    """Confusion matrix int64 [n, n] at the size of the ground truth, to which labels uint8 [H, W] are resized."""
    truth = read_mask(mask)
    return confusion_matrix(resize_mask(labels, (truth.shape[0], truth.shape[1])), truth, n_classes)


def copy_images(images: Sequence[LabelledImage], folder: Path) -> Path:
    """Copy the files to a new folder as ID.suffix, for a command to run on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for image in images:
        shutil.copyfile(image.path, folder / f"{image.id}{image.path.suffix}")
    return folder


def read_plainly(path: Path, long_side: int) -> tuple[UInt8, tuple[int, int]]:
    """An image as Pillow reads it, at its working size: uint8 [h, w, 3], and its own height and width."""
    rgb = read_image(path).rgb
    size = (rgb.shape[0], rgb.shape[1])
    return np.ascontiguousarray(resize_image(rgb, working_size(*size, long_side))), size


def write_plainly(labels: UInt8, path: Path) -> None:
    """Labels uint8 [H, W] as a palette PNG at Pillow's compression."""
    mask = Image.fromarray(labels)
    mask.putpalette(voc_palette().tobytes())
    mask.save(path, "PNG")
