"""The bytes of an image to what the networks see of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.runtime.decoding import decode_image, working_size
from multisa.runtime.images import resize_image

UInt8 = npt.NDArray[np.uint8]


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
    photograph = decode_image(data, max_pixels=max_pixels, long_side=long_side)
    height, width = photograph.size
    rgb = resize_image(photograph.rgb, working_size(height, width, long_side))
    return WorkingImage(rgb, height, width, photograph.orientation, photograph.notes)
