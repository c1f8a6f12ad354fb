"""CVAT's XML "CVAT for images 1.1": tags, polygons and masks."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn
from xml.etree import ElementTree

from multisa.runtime.errors import UsageError
from multisa.training.annotations.base import (
    MAX_FILE_BYTES,
    AnnotatedImage,
    Annotations,
    ClassFinder,
    DrawnMask,
    Shape,
    Size,
    foreground,
    polygons_of,
    runs_of,
)

MEMBER = "annotations.xml"  # of the zip that CVAT exports
WITHOUT_PIXELS = ("box", "ellipse", "polyline", "points", "cuboid", "skeleton")
_PIECE = 2**20  # bytes of XML that are parsed at once


def read_cvat(path: Path, class_names: tuple[str, ...]) -> Annotations:
    """Read CVAT's XML, or the zip with it.

    Shapes are drawn in their z-order. Every kind of shape, and every tag, is a label of its image. An image has a mask
    if it has polygons or masks, and no shape without pixels, such as a box. Raises UsageError.
    """
    reader = _Reader(path, class_names)
    parser = ElementTree.XMLParser(target=reader)
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as file:
                _feed(parser, file)
        else:
            with path.open("rb") as file:
                _feed(parser, file)
        parser.close()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, zipfile.BadZipFile, LookupError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: got {error}, expected CVAT for images 1.1, {MEMBER} or the zip with it") from error
    notes = {"images have shapes without pixels, so no mask": reader.without_pixels}
    return Annotations(path, class_names, reader.images, reader.finder.notes(notes))


def _feed(parser: ElementTree.XMLParser, file: IO[bytes]) -> None:
    total = 0
    while piece := file.read(_PIECE):
        total += len(piece)
        if total > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        parser.feed(piece)


class _Reader:
    """Receives the elements of the file one by one, so that memory holds only what is kept. Raises ValueError."""

    def __init__(self, path: Path, class_names: tuple[str, ...]) -> None:
        self.path = path
        self.finder = ClassFinder(class_names)
        self.images: dict[str, AnnotatedImage] = {}
        self.without_pixels: list[str] = []
        self._root = ""
        self._image: Mapping[str, str] = {}  # attributes of the current image
        self._labels: list[int] = []
        self._shapes: list[tuple[int, int, Shape]] = []  # z-order, class id, shape
        self._others: list[str] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        """Refuse a document type: it could declare entities, and CVAT writes none."""
        raise ValueError("a document type")

    def start(self, tag: str, values: Mapping[str, str]) -> None:
        """An element begins."""
        self._root = self._root or tag
        if self._root != "annotations":
            raise ValueError(f"the root <{tag}>")
        if tag == "image":
            if values["name"] in self.images:
                raise ValueError(f"the image {values['name']} more than once")
            self._image, self._labels, self._shapes, self._others = values, [], [], []
        elif tag in ("polygon", "mask", "tag", *WITHOUT_PIXELS):
            if not self._image:
                raise ValueError(f"a {tag} outside an image (of a video)")
            class_id = self.finder.find(values["label"])
            if class_id is None:
                return
            self._labels.append(class_id)
            shape = _shape(tag, values)
            if shape:
                self._shapes.append((int(values.get("z_order", "0")), class_id, shape))
            elif tag != "tag":
                self._others.append(tag)

    def end(self, tag: str) -> None:
        """An element ends."""
        if tag == "image":
            name = self._image["name"]
            size: Size = int(self._image["height"]), int(self._image["width"])
            shapes = tuple((class_id, s) for _, class_id, s in sorted(self._shapes, key=lambda shape: shape[0]))
            mask = DrawnMask(f"{self.path}: {name}", size, shapes) if shapes and not self._others else None
            self.images[name] = AnnotatedImage(foreground(self._labels), mask)
            self.without_pixels += [f"{name} ({', '.join(sorted(set(self._others)))})"] if self._others else []
            self._image = {}


def _shape(tag: str, values: Mapping[str, str]) -> Shape | None:
    if tag == "polygon":
        return polygons_of([[float(number) for number in values["points"].replace(";", ",").split(",")]])
    if tag == "mask":
        height, width, top, left = (int(values[key]) for key in ("height", "width", "top", "left"))
        return runs_of([int(length) for length in values["rle"].split(",")], (height, width), (top, left))
    return None
