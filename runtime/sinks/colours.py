"""Colours and a name for every value of a mask, for formats that tell classes apart by their colour."""

import numpy as np
import numpy.typing as npt

from multisa.runtime.manifest import Manifest
from multisa.runtime.palette import IGNORE_INDEX, voc_palette

UInt8 = npt.NDArray[np.uint8]


def distinct_colours(manifest: Manifest) -> UInt8:
    """Colours uint8 [256, 3], the bundle's where no class before has it, and no colour twice."""
    wanted = manifest.mask_palette()
    spare = [tuple(colour) for colour in voc_palette().tolist()]
    used: set[tuple[int, ...]] = set()
    colours = np.zeros_like(wanted)
    for value in (*range(len(manifest.classes)), IGNORE_INDEX, *range(len(manifest.classes), IGNORE_INDEX)):
        colour = tuple(wanted[value].tolist())
        if colour in used:
            colour = next(other for other in spare if other not in used)
        used.add(colour)
        colours[value] = colour
    return colours


def ignore_name(manifest: Manifest) -> str:
    """What the value of pixels without a label is called: "ignore", or another name if a class has that."""
    name = "ignore"
    while name in manifest.classes:
        name += "_"
    return name
