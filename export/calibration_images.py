"""Which images graphs are calibrated on, and which they are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import UInt8, read_image, resize_image, working_size
from multisa.runtime.sources.folders import list_images
from multisa.training.data import read_dataset

Element = TypeVar("Element")

CALIBRATION_IMAGES = 64  # to take the ranges of values from; more hardly widen a range
# The segmenter is one small graph, compared on this many times as many images as cam and affinity.
SEGMENTER_FACTOR = 8


@dataclass(frozen=True)
class LabelledImage:
    """One image file, with its image-level labels and ground truth where they are known."""

    path: Path
    classes: tuple[int, ...] | None  # foreground class ids; None if the image has no labels
    mask: Path | None


@dataclass(frozen=True)
class ImageSets:
    """The images for each step; calibration shares none with the others unless there are no more."""

    calibration: tuple[LabelledImage, ...]
    labelled: tuple[LabelledImage, ...]  # for cam, affinity and the pseudo-masks made from them
    segmenter: tuple[LabelledImage, ...]


def read_image_sets(
    root: str | Path, classes: tuple[str, ...], *, num_images: int, masks: Path | None, calibrate: bool = True
) -> ImageSets:
    """Read a data set in VOC layout, or a folder of images.

    VOC layout (has its own masks): cam and affinity are compared on `train` (or the weak list if there is no
    `train`), the segmenter on `val`; the rest of the weak list is for calibration. Folder: every other image
    is for calibration, the rest for comparison; without `calibrate`, all are for comparison.
    classes: the bundle's. num_images: most images for cam and affinity. masks: folder of PNG masks with the
    names of the images in a plain folder. Raises UsageError for classes other than the bundle's, for `masks`
    with VOC layout, and for a folder of masks with no mask of any image.
    """
    root = Path(root)
    if (root / "JPEGImages").is_dir():
        if masks:
            raise UsageError(
                f"--masks {masks}: {root} is a data set in VOC layout, which has masks of its own; leave the "
                "option out, or give the folder of images alone"
            )
        dataset = read_dataset(root)
        if dataset.class_names != classes:
            raise UsageError(
                f"{root}: its classes are {', '.join(dataset.class_names)}, expected the bundle's, "
                f"{', '.join(classes)}"
            )
        labelled = spread(dataset.train or dataset.train_images, num_images)
        segmenter = spread(dataset.val or dataset.train_images, SEGMENTER_FACTOR * num_images)
        compared = {item.image for item in (*labelled, *segmenter)}
        others = [item for item in dataset.train_images if item.image not in compared]
        calibration = spread(others or dataset.train_images, CALIBRATION_IMAGES if calibrate else 0)
        sets = (calibration, labelled, segmenter)
        return ImageSets(*(tuple(LabelledImage(i.image, i.classes, i.mask) for i in items) for items in sets))
    corpus = list_images(root).images
    found = []
    for image in corpus:
        mask = masks / f"{image.name}.png" if masks else None
        found.append(LabelledImage(image.path, None, mask if mask and mask.is_file() else None))
    if masks and not any(image.mask for image in found):
        raise UsageError(f"{masks}: no mask of an image in {root}, expected {corpus[0].name}.png")
    calibration_half = found[::2] if calibrate else []
    compared_half = (found[1::2] if calibrate else found) or found
    return ImageSets(
        spread(calibration_half, CALIBRATION_IMAGES),
        spread(compared_half, num_images),
        spread(compared_half, SEGMENTER_FACTOR * num_images),
    )


def spread(elements: Sequence[Element], count: int) -> tuple[Element, ...]:
    """At most `count` of the elements, evenly spaced."""
    count = min(count, len(elements))
    return tuple(elements[place * len(elements) // count] for place in range(count))


def working_image(path: Path, long_side: int) -> UInt8:
    """Read an image as the networks see it: uint8 [H, W, 3] RGB, long side at most `long_side` pixels."""
    rgb = read_image(path).rgb
    return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))
