"""COCO's JSON of instances: annotations/instances_train2014.json, or what the writer `coco` makes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import normal_name
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.annotations.base import (
    MAX_CLASSES,
    AnnotatedImage,
    Annotations,
    ClassFinder,
    DrawnMask,
    Shape,
    Size,
    foreground,
    polygons_of,
    runs_of_coco,
)

_KEYS = ("images", "annotations", "categories")


def is_coco(value: object) -> bool:
    """Whether a JSON value is COCO's."""
    return isinstance(value, dict) and value.keys() >= set(_KEYS)


def read_coco(path: Path, value: Mapping[str, Any], class_names: tuple[str, ...]) -> Annotations:
    """Read COCO's instances from a parsed JSON file.

    class_names: background first; without any, the classes are "background" and the categories in the order of their
    ids. Images without annotations are images of background. Smaller objects are drawn over larger ones. The pixels of
    a crowd are ignored where no object covers them, as in COCO's own evaluation, but its class is a label of the
    image. An image with an object that has no segmentation has no mask. Raises UsageError.
    """
    images, annotations, entries = (_objects(path, key, value[key]) for key in _KEYS)
    categories = {key: normal_name(entry["name"]) for key, entry in sorted(entries.items())}
    names = class_names or ("background", *categories.values())
    if len(names) > MAX_CLASSES or len(set(names)) < len(names):
        raise UsageError(f"{path}: got {len(names) - 1} categories, expected up to {MAX_CLASSES - 1}, each once")
    finder = ClassFinder(names)
    labels: dict[int, list[int]] = defaultdict(list)
    shapes: dict[int, list[tuple[float, int, Shape]]] = defaultdict(list)
    strays, boxes, annotated = [], set(), set()
    for key, entry in annotations.items():
        image_id, category = entry["image_id"], entry["category_id"]
        if category not in categories:
            raise UsageError(f"{path}, annotation {key}: got the category {category}, expected one in the file")
        if image_id not in images:
            strays.append(f"annotation {key}")
            continue
        annotated.add(image_id)
        class_id = finder.find(categories[category])
        if class_id is None:
            continue
        labels[image_id].append(class_id)
        image = images[image_id]
        shape = _shape(f"{path}, annotation {key}", entry.get("segmentation"), (image["height"], image["width"]))
        if shape is None:
            boxes.add(image_id)
            continue
        area, is_crowd = entry.get("area", 0), bool(entry.get("iscrowd"))
        area = inf if is_crowd else float(area) if isinstance(area, int | float) else 0.0
        shapes[image_id].append((area, IGNORE_INDEX if is_crowd else class_id, shape))
    found = {}
    for key, image in images.items():
        ordered = tuple((class_id, s) for _, class_id, s in sorted(shapes[key], key=lambda shape: -shape[0]))
        mask = DrawnMask(f"{path}: {image['file_name']}", (image["height"], image["width"]), ordered)
        found[image["file_name"]] = AnnotatedImage(foreground(labels[key]), None if key in boxes else mask)
    if len(found) < len(images):
        raise UsageError(f"{path}: got a file_name more than once, expected each image once: remove the others")
    notes = {
        "images without any annotation are images of background": (
            image["file_name"] for key, image in images.items() if key not in annotated
        ),
        "images have objects without a segmentation, so no mask": (images[key]["file_name"] for key in boxes),
        "annotations are about no image of the file": strays,
    }
    return Annotations(path, names, found, finder.notes(notes))


_FIELDS: dict[str, dict[str, type]] = {
    "images": {"file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"name": str},
}


def _objects(path: Path, key: str, value: object) -> dict[int, Mapping[str, Any]]:
    """The objects of a list by their ids, with the fields that are needed."""
    fields = {"id": int, **_FIELDS[key]}
    found: dict[int, Mapping[str, Any]] = {}
    for number, entry in enumerate(value if isinstance(value, list) else [None]):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in fields.items()):
            raise UsageError(f"{path}, {key}[{number}]: got {entry!r:.80}, expected an object with {', '.join(fields)}")
        if found.setdefault(entry["id"], entry) is not entry:
            raise UsageError(f"{path}, {key}[{number}]: got the id {entry['id']} a second time, expected it once")
    return found


def _shape(where: str, value: Any, size: Size) -> Shape | None:
    """The pixels of one object; None if it has none."""
    try:
        if not isinstance(value, dict):
            return polygons_of(value or ())
        if not isinstance(value.get("size"), Sequence) or tuple(value["size"]) != size:
            raise ValueError(f"of size {value.get('size')}, not {list(size)}")
        return runs_of_coco(value.get("counts"), size)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{where}: got a segmentation that is {error}, expected polygons or run lengths") from error
