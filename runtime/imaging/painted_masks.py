"""Read masks that other programs saved by colour: RGB by a palette, and 16-bit grey."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.imaging.decode import DECODER_ERRORS, MASK_FORMATS, decode_mask, open_image, read_file, reason_of
from multisa.runtime.imaging.guards import check_metadata
from multisa.runtime.imaging.png import IGNORE_INDEX, PNG_SIGNATURE, UInt8, voc_palette
from multisa.runtime.progress import pluralize

ClassColours = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int16]]

# Bit depth and colour type in the header of a PNG (PNG 3rd edition, IHDR).
_RGB, _RGBA, _GREY_16 = b"\x08\x02", b"\x08\x06", b"\x10\x00"


def class_colours(palette: UInt8, n_classes: int) -> ClassColours:
    """Return the colours of the classes and of 255, packed and sorted, and their ids; -1 for more than one."""
    if palette.dtype != np.uint8 or palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= 256:
        raise UsageError(f"palette: got {palette.dtype} {list(palette.shape)}, expected uint8 [1..256, 3]")
    rgb = voc_palette()
    rgb[: len(palette)] = palette
    ids = np.array([*range(n_classes), IGNORE_INDEX])
    rgba = np.insert(rgb[ids], 3, 255, axis=1)  # opaque
    keys, first, uses = np.unique(rgba.view(np.uint32), return_index=True, return_counts=True)
    return keys, np.where(uses == 1, ids[first], -1).astype(np.int16)


def read_ids(path: Path, colours: ClassColours, max_pixels: int) -> UInt8:
    """Read class ids uint8 [H, W] as `read_mask` does, and from RGB and 16-bit grey. Raises ImageError.

    colours: those of the classes, by which RGB is read.
    """
    try:
        data = read_file(path)
        kind = data[24:26] if data.startswith(PNG_SIGNATURE) else b""
        if kind not in (_RGB, _RGBA, _GREY_16):
            return decode_mask(data, max_pixels=max_pixels)
        check_metadata(data)
        with open_image(data, MASK_FORMATS, max_pixels) as image:
            pixels = np.array(image if kind == _GREY_16 else image.convert("RGBA"))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except DECODER_ERRORS as error:
        raise ImageError(f"{path}: {reason_of(error, MASK_FORMATS)}") from error
    if kind != _GREY_16:
        return _ids_of_colours(pixels, colours, path)
    if pixels.max() > IGNORE_INDEX:
        raise ImageError(f"{path}: got 16-bit grey with the value {pixels.max()}, expected class ids up to 255")
    return pixels.astype(np.uint8)


def _ids_of_colours(rgba: UInt8, colours: ClassColours, path: Path) -> UInt8:
    keys, ids = colours
    pixels = rgba.view(np.uint32)[..., 0]
    places = np.searchsorted(keys, pixels).clip(max=len(keys) - 1)
    unknown = (keys[places] != pixels) | (ids[places] < 0)
    if unknown.any():
        row, column = divmod(int(unknown.argmax()), unknown.shape[1])
        count = pluralize(int((pixels == pixels[row, column]).sum()), "pixel")
        raise ImageError(
            f"{path}: got the colour RGBA {tuple(rgba[row, column].tolist())} in {count}, first in row {row}, column "
            f"{column}, expected the colours of the classes, each of one class: save class ids, and do not resize or "
            "compress colours"
        )
    return np.asarray(ids[places], np.uint8)
