"""The image data of palette PNGs: what `zlib.compress` would do to a filtered mask, made for masks.

For example:

    idat = deflate_mask(mask)   # of a 2 and the row minus the one above, row by row
"""

import numpy as np
import numpy.typing as npt

from multisa.kernels.native import native
from multisa.kernels.rle import checked_mask

UInt8 = npt.NDArray[np.uint8]
_MOST_COLUMNS = 2**31 - 1  # PNG's own limit


def deflate_mask(mask: UInt8) -> bytes:
    """Filter a mask with PNG's Up and deflate it into a zlib stream, the same bytes on every machine.

    mask: uint8 [H, W], H, W >= 1. Runs of one byte are all that is looked for: a filtered mask is zero but
    where an outline moves, and Huffman codes of its own make it smaller than a general search does. Any mask
    is encoded rightly; noise grows by less than one percent. Raises TypeError for another dtype, ValueError
    for another shape.
    """
    mask = checked_mask(mask)
    if max(mask.shape) > _MOST_COLUMNS:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected sides of at most {_MOST_COLUMNS}")
    return native.deflate_mask(mask)
