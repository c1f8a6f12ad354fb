"""Masks as PNGs of class ids: a folder of them, or the output folder of `multisa label` and `multisa segment`."""

import json
from pathlib import Path

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.files import read_json_object, read_user_text
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.jobs.finalize import FINALIZED, LABELS_FILE
from multisa.runtime.sources.folders import inside, list_images
from multisa.training.annotations.base import AnnotatedImage, Annotations, ClassFinder, MaskFile, foreground


def read_masks(folder: Path, class_names: tuple[str, ...]) -> Annotations:
    """Read a folder of masks, named by their paths below it without extension. Raises UsageError.

    In the output folder of a job, images have the ids and labels of labels.jsonl, and the ids in the masks are those of
    the bundle's classes of the same names.
    """
    if (folder / LABELS_FILE).is_file():
        return _read_job(folder, class_names)
    found = list_images(folder)
    masks = [image for image in found.images if image.path.suffix.lower() == ".png"]
    others = [image.relative for image in found.images if image.path.suffix.lower() != ".png"]
    skipped = [f"{entry.id} ({entry.reason})" for entry in found.skipped]
    notes = {"entries other than masks (PNG) are not used": [*others, *found.others, *skipped]}
    images = {mask.relative[:-4]: AnnotatedImage(None, MaskFile(mask.path)) for mask in masks}
    return Annotations(folder, class_names, images, ClassFinder(class_names).notes(notes))


def _read_job(folder: Path, class_names: tuple[str, ...]) -> Annotations:
    classes = read_json_object(folder / FINALIZED).get("images_per_class")
    if not isinstance(classes, dict):
        raise UsageError(f"{folder}: got a job that has not finished, expected a finished one: run its command again")
    finder = ClassFinder(class_names)
    found = [class_id or 0 for class_id in map(finder.find, classes)]  # 0 for classes that are left out
    ids = bytes([0, *found]).ljust(IGNORE_INDEX, b"\0") + bytes([IGNORE_INDEX])
    images, without = {}, []
    for number, line in enumerate(read_user_text(folder / LABELS_FILE).splitlines(), 1):
        try:
            record = json.loads(line)
            mask = folder / inside(record.get("mask", ""))
            labels = [class_id for name in record["classes"] if (class_id := finder.find(name)) is not None]
            images[record["image"]] = AnnotatedImage(
                foreground(labels), MaskFile(mask, ids) if mask.is_file() else None
            )
        except (ValueError, KeyError, TypeError, AttributeError, ImageError) as error:
            raise UsageError(f"{folder / LABELS_FILE}, line {number}: got {error!r}, expected a record") from error
        without += [] if mask.is_file() else [record["image"]]
    notes = {"images have no mask in masks/ (the writer `masks`)": without}
    return Annotations(folder, class_names, images, finder.notes(notes))
