"""The photographs that graphs are calibrated and compared on, and what is compared beside the outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from multisa.export.parity import Outputs
from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import read_image, read_mask, resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores
from multisa.runtime.sources.folders import list_images
from multisa.training.data import Item, read_dataset

UInt8 = npt.NDArray[np.uint8]
Element = TypeVar("Element")

CALIBRATION = 64  # photographs that ranges are taken from
SEGMENTED = 8  # the segmenter is one small graph: compared on this many times as many as the other two


@dataclass(frozen=True)
class Photograph:
    """One photograph, its image-level label and its ground truth, where they are known."""

    image: Path
    classes: tuple[int, ...] | None  # foreground class ids; None when there is no label
    mask: Path | None


@dataclass(frozen=True)
class Photographs:
    """What each part of a conversion sees; none is calibrated on and compared on unless there is no other."""

    calibrated: tuple[Photograph, ...]
    labelled: tuple[Photograph, ...]  # for cam, affinity and the pseudo-masks made of them
    segmented: tuple[Photograph, ...]


def read_photographs(
    root: Path, classes: tuple[str, ...], *, count: int, masks: Path | None, calibrate: bool = True
) -> Photographs:
    """Read a data set in VOC layout, or a folder of photographs.

    VOC layout, which has its own masks: labels compared on `train` (on the weak list without one), the
    segmenter on `val`, calibrated on what else is in the weak list. Otherwise every other photograph is
    calibrated on and the rest compared; all are without `calibrate`. masks: folder with PNG masks named as
    the photographs. Raises UsageError for other classes than the bundle's, and for a folder of masks that has
    none of them or that nothing would be read from.
    """
    if (root / "JPEGImages").is_dir():
        if masks:
            raise UsageError(
                f"--masks {masks}: {root} is a data set in VOC layout, which has masks of its own; leave the "
                "option out, or give the folder of photographs alone"
            )
        dataset = read_dataset(root)
        if dataset.class_names != classes:
            raise UsageError(
                f"{root}: its classes are {', '.join(dataset.class_names)}, expected the bundle's, "
                f"{', '.join(classes)}"
            )
        labelled = spread(dataset.train or dataset.weak, count)
        segmented = spread(dataset.val or dataset.weak, SEGMENTED * count)
        compared_on = {item.image for item in (*labelled, *segmented)}
        others = [item for item in dataset.weak if item.image not in compared_on]
        seen = spread(others or dataset.weak, CALIBRATION if calibrate else 0)
        return Photographs(
            tuple(map(_of_item, seen)), tuple(map(_of_item, labelled)), tuple(map(_of_item, segmented))
        )
    corpus = list_images(root).images
    found = [
        Photograph(image.path, None, _mask(masks / f"{image.name}.png" if masks else None))
        for image in corpus
    ]
    if masks and not any(photograph.mask for photograph in found):
        raise UsageError(f"{masks}: no mask of a photograph in {root}, expected {corpus[0].name}.png")
    calibrated = found[::2] if calibrate else []
    compared = (found[1::2] if calibrate else found) or found
    return Photographs(
        spread(calibrated, CALIBRATION), spread(compared, count), spread(compared, SEGMENTED * count)
    )


def spread(elements: Sequence[Element], count: int) -> tuple[Element, ...]:
    """At most `count` of the elements, evenly over all of them."""
    count = min(count, len(elements))
    return tuple(elements[place * len(elements) // count] for place in range(count))


def working_image(photograph: Photograph, long_side: int) -> UInt8:
    """Read a photograph as the networks see it, uint8 [H, W, 3]."""
    rgb = read_image(photograph.image).rgb
    return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))


def truth_of(mask: Path | None, image: UInt8) -> dict[str, UInt8]:
    """Ground truth of the outputs that are labels, uint8 [H, W] of the size of `image`; none without mask."""
    if mask is None:
        return {}
    truth = resize_mask(read_mask(mask), (image.shape[0], image.shape[1]))
    return {"labels": truth, "pseudo_mask": truth}


def add_pseudo_mask(
    image: UInt8, classes: tuple[int, ...], outputs: Outputs, parameters: LabelParameters
) -> None:
    """Add the pseudo-mask of cam and affinity, and its confidence, 0..255; reduce cam to `classes`.

    The map of a class that is not there is divided by a maximum next to nothing: what rounding makes of it is
    as likely 0 as 1, and nobody reads it.
    """
    if "cam" not in outputs or "affinity" not in outputs:
        return
    present = np.array(classes, np.intp) - 1
    cam = np.asarray(outputs["cam"], np.float32)[0, present]
    affinity = np.asarray(outputs["affinity"], np.float32)[0]
    if np.isfinite(cam).all() and np.isfinite(affinity).all():
        walked = walk_scores(cam, affinity, parameters) if classes else cam
        made = pseudo_mask(image, walked, classes, parameters)
        mask, confidence = made.mask, 255 * made.confidence
    else:
        # The walk refuses such maps. They are counted where they are; of labels there are none that agree.
        size = (image.shape[0], image.shape[1])
        mask, confidence = np.full(size, IGNORE_INDEX, np.uint8), np.zeros(size, np.float32)
    # A NaN among the maps left out is counted all the same.
    finite = bool(np.isfinite(np.asarray(outputs["cam"], np.float32)).all())
    outputs["cam"] = cam[None] if finite else np.full_like(cam[None], np.nan)
    outputs["pseudo_mask"], outputs["pseudo_mask_confidence"] = mask, confidence


def _of_item(item: Item) -> Photograph:
    return Photograph(item.image, item.classes, item.mask)


def _mask(path: Path | None) -> Path | None:
    return path if path is not None and path.is_file() else None
