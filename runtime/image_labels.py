"""Image-level labels from a file or a mapping: CSV (`image,labels`) or {image: [classes]}.

In CSV, spaces separate classes; semicolons or commas do if names contain spaces. An image may have several
rows, one for each label, and there may be other columns:

    image,labels
    farm/001.jpg,cow horse
    kitchen.jpg,dining table;chair
    garden.jpg,"dog, person"
"""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text, sha256_of_bytes, sha256_of_file
from multisa.runtime.progress import log

IMAGE_COLUMNS = ("image",)
LABEL_COLUMNS = ("labels", "label", "classes", "class")  # names of the column of labels; a file has one of them

_UNUSUAL = re.compile(r"\\|//|(?:^|/)\./|/\.?$")  # parts of paths that pathlib would change

Labels = tuple[str, ...]
LabelMapping = Mapping[str, Sequence[str]]  # {image: [classes]}
_Row = tuple[str, str, Sequence[str]]  # where it is, image, names of classes


def labels_from_scores(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> Labels:
    """Return the classes whose score reaches its threshold, in the order of `scores`."""
    return tuple(name for name, score in scores.items() if score >= thresholds[name])


class ClassNames:
    """The classes of a bundle or data set, found by the names that people write."""

    def __init__(self, classes: Collection[str]) -> None:
        self.classes = tuple(classes)
        self._exact = {normal_name(name): name for name in self.classes}
        folds = Counter(normal_name(name).casefold() for name in self.classes)
        self._folded = {normal_name(name).casefold(): name for name in self.classes}
        self._folded = {fold: name for fold, name in self._folded.items() if folds[fold] == 1}

    def find(self, name: str) -> str | None:
        """Return the class of this name, or None.

        Blanks around and between words, and the way an accent is encoded (Unicode NFC, NFD), make no difference;
        nor does upper or lower case, unless several classes differ in nothing else.
        """
        normal = normal_name(name)
        return self._exact.get(normal) or self._folded.get(normal.casefold())

    def resolve(self, names: Iterable[str], where: str) -> Labels:
        """Return the classes of these names, each once, in the order of the ids.

        Raises UsageError with `where` for a name that is no class.
        """
        found = set()
        for name in names:
            class_name = self.find(name)
            if class_name is None:
                raise UsageError(f"{where}: unknown class {name!r}, expected {', '.join(self.classes)}")
            found.add(class_name)
        return tuple(name for name in self.classes if name in found)

    def split(self, cell: str) -> list[str]:
        """Split a cell into names: the whole cell if it is a class, else at semicolons, at commas, or at spaces."""
        if self.find(cell) is not None:  # one name, which may contain spaces
            return [cell.strip()]
        separator = next((mark for mark in ";," if mark in cell), None)
        return [name.strip() for name in cell.split(separator) if name.strip()]


def normal_name(name: str) -> str:
    """Return a class name in Unicode NFC, without blanks around it, and with one between words."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def find_column(names: Iterable[str], wanted: Sequence[str], where: str) -> str | None:
    """Return the one of `names` (columns, keys) that is in `wanted`, in any case, or None.

    Raises UsageError if there are several.
    """
    columns = [name for name in names if name.strip().lower() in wanted]
    if len(columns) > 1:
        raise UsageError(f"{where}: got the columns {' and '.join(columns)}, expected one column of {wanted[0]}")
    return columns[0] if columns else None


def log_label_column(column: str, where: str) -> None:
    """Log which column the labels are read from, where its name is not the usual one."""
    if column.strip().lower() != LABEL_COLUMNS[0]:
        log.info(f"{where}: labels are read from the column '{column.strip()}'")


def image_key(path: str) -> str:
    """Return what two spellings of the path of one image have in common: posix separators, Unicode NFC."""
    text = path.strip().strip("\ufeff").strip()  # a file that was joined from others has several byte order marks
    if text.isascii() and not _UNUSUAL.search(text):
        return text
    return PurePosixPath(unicodedata.normalize("NFC", text.replace("\\", "/"))).as_posix()


def without_suffix(path: str) -> str:
    """Return a posix path without its suffix, as pathlib does, in a tenth of the time."""
    folder, slash, file = path.rpartition("/")
    dot = file.rfind(".")
    return f"{folder}{slash}{file[:dot] if 0 < dot < len(file) - 1 else file}"


@dataclass(frozen=True)
class ImageLabels:
    """The rows of a label file, by the key that names the image: a path or a file name."""

    name: str  # for messages: the path of the file
    rows: Mapping[str, Labels]  # classes in the order of the bundle
    sha256: str  # of the file or mapping

    def matcher(self, relatives: Iterable[str] = (), root: str = "") -> "LabelMatcher":
        """Return a matcher that finds the rows of images one by one.

        relatives: all images, if they are known; read once. A row that names one of them by its path then
        never matches another one by its file name. Otherwise that is an error if the other one comes first.
        root: name of the images' folder, with which the paths in the rows may begin.
        """
        return LabelMatcher(self, relatives, root)


class LabelMatcher:
    """Finds the rows of images one by one; memory grows with the rows, not with the images."""

    def __init__(self, labels: ImageLabels, relatives: Iterable[str] = (), root: str = "") -> None:
        self._labels = labels
        self._root = image_key(root) if root else ""
        self._taken = {key for relative in relatives for key in self._exact_keys(image_key(relative))}
        self._users: dict[str, str] = {}  # key -> the image that it matched
        self.misplaced: dict[str, str] = {}  # key -> an image of its file name in another folder, which it is not
        self.near_in_case: dict[str, str] = {}  # key -> an image whose file name differs in case
        self.moved: dict[str, str] = {}  # key -> the image that it matched though the images' folder has another name

    def find(self, relative: str) -> Labels | None:
        """Return the classes of an image, by its posix path below the images' folder, or None without a row.

        Rows match by relative path, with or without extension; else by file name, if they do not name another
        image by its path and no other folder than the image's. Raises UsageError when several rows with
        different labels match, or when a row has matched another image before.
        """
        image = image_key(relative)
        exact = self._exact_keys(image)
        keys = exact or self._named_keys(image, relative)
        if not keys:
            for key in self._by_folded_name.get(image.rpartition("/")[2].casefold(), []):
                self.near_in_case.setdefault(key, relative)
            return None
        rows = self._labels.rows
        if len({rows[key] for key in keys}) > 1:
            raise UsageError(
                f"{self._labels.name}: {relative} matches several rows with different labels "
                f"({', '.join(keys)}), expected one: write its path relative to the images' folder"
            )
        self._taken.update(exact)
        for key in keys:
            other = self._users.setdefault(key, relative)
            if other != relative:
                raise UsageError(
                    f"{self._labels.name}: row {key!r} matches several images ({other}, {relative}), "
                    "expected one: write their paths relative to the images' folder"
                )
        return rows[keys[0]]

    def unused(self) -> tuple[str, ...]:
        """Return the keys of the rows that have matched no image, sorted."""
        return tuple(sorted(set(self._labels.rows) - self._users.keys()))

    def why_unused(self, key: str) -> str:
        """Return why a row has matched no image."""
        if key in self.misplaced:
            return f"names another folder than {self.misplaced[key]}"
        if key in self.near_in_case:
            return f"no image has this name, but {self.near_in_case[key]} differs in upper or lower case only"
        return "no image has this name"

    def _exact_keys(self, image: str) -> list[str]:
        """Return the keys that name an image by its path, with or without extension."""
        return [key for key in dict.fromkeys((image, without_suffix(image))) if key in self._labels.rows]

    def _named_keys(self, image: str, relative: str) -> list[str]:
        """Return the keys that name an image by its file name, and no other folder than its own.

        Keys that go on with the name of the images' folder come before those that go on with another one.
        """
        file = image.rpartition("/")[2]
        names = dict.fromkeys((file, without_suffix(file)))
        keys = [key for name in names for key in self._by_file_name.get(name, []) if key not in self._taken]
        certain, moved = [], []
        for key in keys:
            theirs, ours = key.split("/")[-2::-1], image.split("/")[-2::-1]  # folders, from the image upwards
            if any(a != b for a, b in zip(theirs, ours, strict=False)):
                self.misplaced.setdefault(key, relative)
            elif len(theirs) > len(ours) and theirs[len(ours)] != self._root:
                moved.append(key)
            else:
                certain.append(key)
        if not certain:
            self.moved.update(dict.fromkeys(moved, relative))
        return certain or moved

    @cached_property
    def _by_file_name(self) -> dict[str, list[str]]:
        return self._index(str)

    @cached_property
    def _by_folded_name(self) -> dict[str, list[str]]:
        return self._index(str.casefold)

    def _index(self, form: Callable[[str], str]) -> dict[str, list[str]]:
        """Return the keys by the form of their file name."""
        index: dict[str, list[str]] = {}
        for key in self._labels.rows:
            index.setdefault(form(key.rpartition("/")[2]), []).append(key)
        return index


def read_image_labels(labels: Path | LabelMapping, classes: Collection[str]) -> ImageLabels:
    """Read a label file (.csv or .json) or a mapping; `classes` are the allowed names, in the order of their ids.

    An empty list means that the image shows none of the classes. Several rows of a CSV about one image are
    merged. Raises UsageError with the line (CSV) or the key (JSON) for a missing header, a malformed row, an
    unknown class, or an image that has labels in one row and none in another.
    """
    names = ClassNames(classes)
    is_table = False
    if isinstance(labels, Path):
        name, suffix = str(labels), labels.suffix.lower()
        if suffix not in (".csv", ".json"):
            raise UsageError(f"{labels}: got a file ending in {labels.suffix!r}, expected .csv or .json")
        text, is_table = read_user_text(labels), suffix == ".csv"
        found = _csv_rows(name, text, names) if is_table else _json_rows(name, text)
        digest = sha256_of_file(labels)
    else:
        name = "labels"
        pairs = list(_checked_pairs(name, labels.items()))
        found = iter(pairs)
        digest = sha256_of_bytes(json.dumps({image: value for _, image, value in pairs}, sort_keys=True).encode())
    rows: dict[str, Labels] = {}
    positions: dict[str, str] = {}
    for position, image, values in found:
        if not image.strip():
            raise UsageError(f"{name}, {position}: got no image, expected its path or file name")
        key = image_key(image)
        classes_of = names.resolve(values, f"{name}, {position}")
        before = rows.setdefault(key, classes_of)
        if before == classes_of:
            positions.setdefault(key, position)
            continue
        if not (is_table and before and classes_of):
            raise UsageError(
                f"{name}, {position}: {key} has {_in_words(classes_of)} here, but {_in_words(before)} at "
                f"{positions[key]}: keep one of them"
            )
        rows[key] = names.resolve((*before, *classes_of), name)
    if not rows:
        raise UsageError(f"{name}: has no row, expected at least one image")
    return ImageLabels(name, rows, digest)


def _in_words(labels: Labels) -> str:
    return f"the labels {', '.join(labels)}" if labels else "no labels"


def _csv_rows(name: str, text: str, classes: ClassNames) -> Iterator[_Row]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        image_column = find_column(header, IMAGE_COLUMNS, f"{name}, line 1")
        column = find_column(header, LABEL_COLUMNS, f"{name}, line 1")
        if image_column is None or column is None:
            got = ",".join(header)
            raise UsageError(
                f"{name}, line 1: got {got!r}, expected the header 'image,labels' (or label, classes, class; other "
                "columns may stand beside), separated by commas"
            )
        log_label_column(column, name)
        places = header.index(image_column), header.index(column)
        for cells in lines:
            position = f"line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(
                    f"{name}, {position}: got {len(cells)} columns, expected {len(header)} ({','.join(header)}): "
                    "separate classes by spaces or semicolons"
                )
            yield position, cells[places[0]], classes.split(cells[places[1]])
    except csv.Error as error:
        raise UsageError(f"{name}, line {lines.line_num}: not CSV: {error}") from error


class _Pairs(list[tuple[str, object]]):
    """The keys and values of a JSON object."""


def _json_rows(name: str, text: str) -> Iterator[_Row]:
    try:
        # Pairs, because a dictionary would silently drop all but the last of equal keys.
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not JSON, or nested too deeply: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise UsageError(f"{name}: got no JSON object, expected {{image: [classes]}}")
    yield from _checked_pairs(name, pairs)


def _checked_pairs(name: str, pairs: Iterable[tuple[object, object]]) -> Iterator[_Row]:
    for image, names in pairs:
        is_list = isinstance(names, Iterable) and not isinstance(names, (str, Mapping, _Pairs))
        listed = list(names) if is_list and isinstance(names, Iterable) else None
        if listed is None or not all(isinstance(entry, str) for entry in listed):
            got = f"{names!r:.80}"
            raise UsageError(f"{name}, key {str(image)!r}: got {got}, expected a list of class names")
        yield f"key {str(image)!r}", str(image), listed
