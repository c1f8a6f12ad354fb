"""CVAT's XML "CVAT for images 1.1": tags, polygons and masks."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from multisa.runtime.errors import UsageError
from multisa.training.annotations.base import (
    MAX_FILE_BYTES,
    AnnotatedImage,
    Annotations,
    ClassFinder,
    DrawnMask,
    Shape,
    foreground,
    polygons_of,
    runs_of,
)

MEMBER = "annotations.xml"  # of the zip that CVAT exports
WITHOUT_PIXELS = ("box", "ellipse", "polyline", "points", "cuboid", "skeleton")


def read_cvat(path: Path, class_names: tuple[str, ...]) -> Annotations:
    """Read CVAT's XML, or the zip with it.

    Shapes are drawn in their z-order. Every kind of shape, and every tag, is a label of its image. An image has a mask
    if it has polygons or masks, and no shape without pixels, such as a box. Raises UsageError.
    """
    finder = ClassFinder(class_names)
    images: dict[str, AnnotatedImage] = {}
    without_pixels = []
    try:
        for image in _elements(path):
            name, size = image.attrib["name"], (int(image.attrib["height"]), int(image.attrib["width"]))
            if name in images:
                raise ValueError(f"the image {name} more than once")
            labels, shapes, others = [], [], set()
            for entry in image:
                if entry.tag not in ("tag", "polygon", "mask", *WITHOUT_PIXELS):
                    continue
                class_id = finder.find(entry.attrib["label"])
                if class_id is None:
                    continue
                labels.append(class_id)
                shape = _shape(entry.tag, entry.attrib)
                if shape:
                    shapes.append((int(entry.attrib.get("z_order", "0")), class_id, shape))
                elif entry.tag != "tag":
                    others.add(entry.tag)
            ordered = tuple((class_id, shape) for _, class_id, shape in sorted(shapes, key=lambda shape: shape[0]))
            mask = DrawnMask(f"{path}: {name}", size, ordered) if ordered and not others else None
            images[name] = AnnotatedImage(foreground(labels), mask)
            without_pixels += [f"{name} ({', '.join(sorted(others))})"] if others else []
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, zipfile.BadZipFile, LookupError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: got {error}, expected CVAT for images 1.1, {MEMBER} or the zip with it") from error
    notes = {"images have shapes without pixels, so no mask": without_pixels}
    return Annotations(path, class_names, images, finder.notes(notes))


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a document type: it could declare entities, and CVAT writes none."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("a document type")


def _elements(path: Path) -> list[ElementTree.Element]:
    """The images of the file."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    else:
        data = path.read_bytes()
    root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_WithoutDoctype()))
    if root.tag != "annotations" or root.find("track") is not None:
        raise ValueError(f"the root <{root.tag}>, or tracks of a video")
    return root.findall("image")


def _shape(tag: str, values: Mapping[str, str]) -> Shape | None:
    if tag == "polygon":
        return polygons_of([[float(number) for number in values["points"].replace(";", ",").split(",")]])
    if tag == "mask":
        height, width, top, left = (int(values[key]) for key in ("height", "width", "top", "left"))
        return runs_of([int(length) for length in values["rle"].split(",")], (height, width), (top, left))
    return None
