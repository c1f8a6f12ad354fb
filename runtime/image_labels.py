"""Image-level labels from a file: CSV (`image,labels`) or JSON ({image: [classes]}).

In CSV, spaces separate classes, or semicolons if names contain spaces:

    image,labels
    farm/001.jpg,cow horse
    kitchen.jpg,dining table;chair
"""

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text

HEADER = ["image", "labels"]

Labels = tuple[str, ...]


def labels_from_scores(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> Labels:
    """Return the classes whose score reaches its threshold, in the order of `scores`."""
    return tuple(name for name, score in scores.items() if score >= thresholds[name])


@dataclass(frozen=True)
class ImageLabels:
    """The rows of a label file, by the key that names the image: a path or a file name."""

    path: Path
    rows: Mapping[str, Labels]  # classes in the order of the bundle

    def matcher(self, relatives: Iterable[str] = ()) -> "LabelMatcher":
        """Return a matcher that finds the rows of images one by one.

        relatives: all images, if they are known; read once. A row that names one of them by its path then
        never matches another one by its file name. Otherwise that is an error if the other one comes first.
        """
        return LabelMatcher(self, relatives)


class LabelMatcher:
    """Finds the rows of images one by one; memory grows with the rows, not with the images."""

    def __init__(self, labels: ImageLabels, relatives: Iterable[str] = ()) -> None:
        self._labels = labels
        self._taken = {key for relative in relatives for key in self._exact_keys(relative)}
        self._users: dict[str, str] = {}  # key -> the image that it matched

    def find(self, relative: str) -> Labels | None:
        """Return the classes of an image, by its posix path below the images' folder, or None without a row.

        Rows match by relative path, with or without extension; else by file name, if they do not name another
        image by its path. Raises UsageError when several rows with different labels match, or when a row has
        matched another image before.
        """
        exact = self._exact_keys(relative)
        keys = exact or [key for key in self._named_keys(relative) if key not in self._taken]
        if not keys:
            return None
        rows = self._labels.rows
        if len({rows[key] for key in keys}) > 1:
            raise UsageError(
                f"{self._labels.path}: {relative} matches several rows with different labels "
                f"({', '.join(keys)}), expected one: write its path relative to the images' folder"
            )
        self._taken.update(exact)
        for key in keys:
            other = self._users.setdefault(key, relative)
            if other != relative:
                raise UsageError(
                    f"{self._labels.path}: row {key!r} matches several images ({other}, {relative}), "
                    "expected one: write their paths relative to the images' folder"
                )
        return rows[keys[0]]

    def unused(self) -> tuple[str, ...]:
        """Return the keys of the rows that have matched no image, sorted."""
        return tuple(sorted(set(self._labels.rows) - self._users.keys()))

    def _exact_keys(self, relative: str) -> list[str]:
        """Return the keys that name an image by its path, with or without extension."""
        spellings = dict.fromkeys((relative, PurePosixPath(relative).with_suffix("").as_posix()))
        return [key for key in spellings if key in self._labels.rows]

    def _named_keys(self, relative: str) -> list[str]:
        path = PurePosixPath(relative)
        names = dict.fromkeys((path.name, path.stem))
        return [key for name in names for key in self._by_file_name.get(name, [])]

    @cached_property
    def _by_file_name(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        for key in self._labels.rows:
            index.setdefault(PurePosixPath(key).name, []).append(key)
        return index


def read_image_labels(path: Path, classes: Collection[str]) -> ImageLabels:
    """Read a label file (.csv or .json); `classes` are the allowed names, in the order of their ids.

    An empty list means that the image shows none of the classes. Raises UsageError with the line (CSV) or the
    key (JSON) for a missing header, a malformed row, an unknown class, or an image with two different rows.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: got a file ending in {path.suffix!r}, expected .csv or .json")
    text = read_user_text(path)
    rows: dict[str, Labels] = {}
    positions: dict[str, str] = {}
    for position, image, names in reader(path, text, classes):
        key = PurePosixPath(image.strip().replace("\\", "/")).as_posix()
        if not image.strip():
            raise UsageError(f"{path}, {position}: got no image, expected its path or file name")
        unknown = [name for name in names if name not in classes]
        if unknown:
            valid = ", ".join(classes)
            raise UsageError(f"{path}, {position}: unknown class {unknown[0]!r}, expected {valid}")
        labels = tuple(name for name in classes if name in names)
        if rows.setdefault(key, labels) != labels:
            raise UsageError(
                f"{path}, {position}: {key} has the labels {list(labels)}, but {list(rows[key])} at "
                f"{positions[key]}: keep one of them"
            )
        positions.setdefault(key, position)
    if not rows:
        raise UsageError(f"{path}: has no row, expected at least one image")
    return ImageLabels(path, rows)


def _csv_rows(path: Path, text: str, classes: Collection[str]) -> Iterator[tuple[str, str, list[str]]]:
    lines = csv.reader(text.splitlines(), strict=True)
    try:
        header = next(lines, [])
        if [cell.strip() for cell in header] != HEADER:
            got = ",".join(header)
            raise UsageError(f"{path}, line 1: got {got!r}, expected the header 'image,labels'")
        for cells in lines:
            position = f"line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(HEADER):
                raise UsageError(
                    f"{path}, {position}: got {len(cells)} columns, expected 2 (image,labels): separate "
                    "classes by spaces or semicolons"
                )
            yield position, cells[0], split_classes(cells[1], classes)
    except csv.Error as error:
        raise UsageError(f"{path}, line {lines.line_num}: not CSV: {error}") from error


def split_classes(cell: str, classes: Collection[str]) -> list[str]:
    """Split a cell into names: the whole cell if it is a class, else at semicolons, else at spaces."""
    if cell.strip() in classes:  # one name, which may contain spaces
        return [cell.strip()]
    names = cell.split(";") if ";" in cell else cell.split()
    return [name.strip() for name in names if name.strip()]


def _json_rows(path: Path, text: str, _: Collection[str]) -> Iterator[tuple[str, str, list[str]]]:
    try:
        # Pairs, because a dictionary would silently drop all but the last of equal keys.
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON, or nested too deeply: {error}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UsageError(f"{path}: got no JSON object, expected {{image: [classes]}}")
    for image, names in pairs:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{path}, key {image!r}: got {names!r}, expected a list of class names")
        yield f"key {image!r}", image, names
