"""Label Studio's JSON export: choices are image-level labels, brush masks and polygons are masks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import MAX_PIXELS, UInt8
from multisa.training.annotations.base import (
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

_CHANNELS = 4  # a brush mask is RGBA with four equal channels
_HALF = 127  # a pixel belongs to a brush mask if it is more than half opaque
_UPLOAD = re.compile(r"^/data/upload/(?:.*/)?[0-9a-f]{8}-")  # what Label Studio puts before the name of an upload


def is_label_studio(value: object) -> bool:
    """Whether a JSON value is a list of tasks."""
    return isinstance(value, list) and all(isinstance(task, dict) and "data" in task for task in value)


def read_label_studio(path: Path, tasks: Sequence[Any], class_names: tuple[str, ...]) -> Annotations:
    """Read a parsed JSON export.

    Of several annotations of a task, the last one that was not cancelled counts. Tasks without one are not images of
    background: they are left out and noted. Every kind of region is a label of its image. An image has a mask if it
    has brush masks or polygons, and no region without pixels, such as a box. Later regions are drawn over earlier
    ones. Raises UsageError.
    """
    finder = ClassFinder(class_names)
    images: dict[str, AnnotatedImage] = {}
    waiting, several, boxes = [], [], []
    for number, task in enumerate(tasks):
        try:
            name = _name(task)
            annotations = [entry for entry in task.get("annotations") or () if not entry.get("was_cancelled")]
            if not annotations:
                waiting.append(name)
                continue
            labels, shapes, size, others = _read_results(annotations[-1].get("result") or (), finder)
        except (TypeError, ValueError, LookupError, OverflowError, AttributeError) as error:
            raise UsageError(f"{path}, task {number}: got {error!r}, expected Label Studio's JSON export") from error
        if name in images:
            raise UsageError(f"{path}, task {number}: got {name} a second time, expected each image once")
        several += [name] if len(annotations) > 1 else []
        boxes += [f"{name} ({', '.join(sorted(others))})"] if others else []
        mask = DrawnMask(f"{path}: {name}", size, tuple(shapes)) if shapes and not others else None
        images[name] = AnnotatedImage(foreground(labels), mask)
    if not images:
        raise UsageError(
            f"{path}: got {len(tasks)} tasks without an annotation (predictions are none), expected some: submit them"
        )
    notes = {
        "tasks are not annotated yet (predictions do not count)": waiting,
        "tasks have several annotations, of which the last one counts": several,
        "images have regions without pixels, so no mask": boxes,
    }
    return Annotations(path, class_names, images, finder.notes(notes))


def _name(task: Mapping[str, Any]) -> str:
    """Path or name of an image: the id that our writer stores, or its place without what Label Studio adds."""
    own = (task.get("meta") or {}).get("id")
    place: Any = own or task["data"].get("image") or next(iter(task["data"].values()), None)
    if own or not re.match(r"/data/|\w+://", place):
        return str(place)
    url = urlsplit(place)
    local = parse_qs(url.query).get("d")  # /data/local-files/?d=photos/a.jpg
    return local[0] if local else unquote(_UPLOAD.sub("", url.path)).lstrip("/")


def _read_results(
    results: Sequence[Mapping[str, Any]], finder: ClassFinder
) -> tuple[list[int], list[tuple[int, Shape]], Size, set[str]]:
    """Class ids, shapes with theirs, the size of the image, and the kinds of regions without pixels."""
    labels: list[int] = []
    shapes: list[tuple[int, Shape]] = []
    sizes: set[Size] = set()
    others: set[str] = set()
    for result in results:
        kind, value = result["type"], result["value"]
        names = value.get(kind) or value.get("labels") or ()
        class_ids = [class_id for name in names if (class_id := finder.find(name)) is not None]
        labels += class_ids
        if kind == "choices" or not class_ids:
            continue
        size = int(result["original_height"]), int(result["original_width"])
        shape = None if result.get("image_rotation") else _shape(value, size)
        if shape is None:
            others.add(kind)
            continue
        sizes.add(size)
        shapes += [(class_id, shape) for class_id in class_ids]
    if len(sizes) > 1:
        raise ValueError(f"several sizes of an image, {sorted(sizes)}")
    return labels, shapes, sizes.pop() if sizes else (0, 0), others


def _shape(value: Mapping[str, Any], size: Size) -> Shape | None:
    if value.get("format") == "rle":
        if not isinstance(value["rle"], list):  # bytes(10**11) would allocate as many zeros
            raise ValueError(f"rle: got {type(value['rle']).__name__}, expected a list of bytes")
        return decode_brush(bytes(value["rle"]), size)
    if "points" in value:  # in percent of the image
        points = np.asarray(value["points"], np.float64) * (size[1] / 100, size[0] / 100)
        return polygons_of([points.ravel()])
    return None


def decode_brush(code: bytes, size: Size) -> Shape:
    """Decode a brush mask: values as runs, or one by one (label-studio-sdk, converter/brush.py: decode_rle).

    Raises ValueError for code that is damaged, or of another size.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"a brush mask of {size[1]} x {size[0]} pixels")
    values = np.concatenate([np.zeros(0, np.uint8), *_stretches(code, size[0] * size[1] * _CHANNELS)])
    inside = values[_CHANNELS - 1 :: _CHANNELS] > _HALF
    changes = np.flatnonzero(np.diff(inside, prepend=False))
    return runs_of(np.diff(changes, prepend=0, append=len(inside)), size)


def _stretches(code: bytes, expected: int) -> Iterator[UInt8]:
    bits = np.unpackbits(np.frombuffer(code, np.uint8))
    text = (bits + 48).tobytes().decode()
    position = 0

    def read(width: int) -> int:
        nonlocal position
        position += width
        return int(text[position - width : position], 2)  # ValueError at the end

    count, word = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    if count != expected or word != 8:
        raise ValueError(f"a brush mask of {count} values with {word} bits, not {expected} with 8")
    while count > 0:
        is_run, width = read(1), widths[read(2)]
        length = read(width) + 1
        count -= length
        if count < 0:
            raise ValueError("a brush mask that is too long")
        if is_run:
            yield np.full(length, read(word), np.uint8)
        else:
            position += word * length
            if position > len(bits):
                raise ValueError("a brush mask that is too short")
            yield np.packbits(bits[position - word * length : position])
