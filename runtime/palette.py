"""The PASCAL VOC colour map, used for every mask that is written."""

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = 255


def voc_palette() -> npt.NDArray[np.uint8]:
    """Return the VOC devkit's colours, uint8 [256, 3]: the bits of the index spread over R, G and B."""
    index = np.arange(256, dtype=np.uint8)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = (index >> 3).astype(np.uint8)
    return colours
