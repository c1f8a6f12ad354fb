"""Files read and written as everyone does, by Pillow: the plain loops of all contenders and recipes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.imaging.decode import read_image, resize_image, working_size
from multisa.runtime.imaging.png import voc_palette

UInt8 = npt.NDArray[np.uint8]


def read_plainly(path: Path, long_side: int) -> tuple[UInt8, tuple[int, int]]:
    """A photograph reduced to `long_side`, uint8 [h, w, 3], and its own height and width."""
    rgb = read_image(path).rgb
    height, width = rgb.shape[:2]
    return resize_image(rgb, working_size(height, width, long_side)), (height, width)


def write_plainly(labels: UInt8, size: tuple[int, int], path: Path) -> None:
    """Labels uint8 [h, w], enlarged to `size` (height, width), as a palette PNG at Pillow's compression."""
    mask = Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST)
    mask.putpalette(voc_palette().tobytes())
    mask.save(path, "PNG")
