"""The images that a list or a manifest names, in its order: beside it, elsewhere, or behind URLs."""

import csv
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.image_labels import split_classes
from multisa.runtime.sources.base import Listed, SourceItem
from multisa.runtime.sources.folders import SourceBase
from multisa.runtime.sources.names import SeenHashes, printable, safe_id, unique_id
from multisa.runtime.sources.remote import protocol_of
from multisa.runtime.sources.storage import Store, join, why

Labels = tuple[str, ...]

MOST_LABELS = 10_000  # of one image


@dataclass(frozen=True)
class CellReader:
    """Reads labels; `classes` tells names that hold spaces from several names, and labels from a caption."""

    column: str = "labels"
    classes: Collection[str] = ()

    def from_value(self, value: Any) -> Labels | None:
        """A list of names, a text of them, or None. Raises ValueError for anything else."""
        if value is None:
            return None
        if isinstance(value, str):
            value = split_classes(value, self.classes)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"got {str(value)[:80]!r}, expected a list of class names or one text")
        if len(value) > MOST_LABELS:
            raise ValueError(f"got {len(value)} labels, expected at most {MOST_LABELS}")
        return tuple(dict.fromkeys(value))

    def from_file(self, kind: str, data: bytes) -> Labels | None:
        """What a file of a sample says: "json", "cls" or "txt". Raises ValueError when it cannot be read."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
        if kind != "json":
            labels = self.from_value(text.strip())
            # Most shards keep a caption in .txt.
            is_caption = kind == "txt" and self.classes and not set(labels or ()) <= set(self.classes)
            return None if is_caption else labels
        value = parse_json(text)
        return self.from_value(value.get(self.column)) if isinstance(value, dict) else None


def parse_json(text: str) -> Any:
    """The value of a JSON text of any origin. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON, or nested too deeply") from None


LONGEST_LINE = 2**20  # bytes
_BATCH = 1024  # rows of Parquet
_LARGEST_PARQUET_HEADER = 2**28  # bytes, and entries, of what describes a file


class Row(NamedTuple):
    """One image of a list."""

    place: str  # "line 3", "row 3"
    image: str
    labels: tuple[str, ...] | None


class Columns(NamedTuple):
    """Where a manifest has what; the labels' column may be left out unless it was asked for by name."""

    image: str = "image"
    cells: CellReader = CellReader()
    labels_required: bool = False


def rows_of(store: Store, path: str, columns: Columns) -> Iterator[Row]:
    """The rows of a file ending in .txt, .csv, .jsonl, .ndjson or .parquet.

    Raises UsageError naming the line or row that cannot be used, BackendUnavailable where pyarrow is missing.
    """
    shown = printable(path.partition("?")[0])
    reader = KINDS[path.partition("?")[0].lower().rpartition(".")[2]]
    try:
        with store.stream(path) as file:
            yield from reader(file, shown, columns)
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({why(error)}), expected a list of images") from error


def _lines(file: BinaryIO, shown: str) -> Iterator[tuple[str, str]]:
    """("line 1", its text with its end) and so on."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UsageError(f"{shown}, line {number}: longer than {LONGEST_LINE} bytes, expected a list")
        try:
            yield f"line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{shown}, line {number}: is not UTF-8 text ({error.reason})") from error


def _text_rows(file: BinaryIO, shown: str, _: Columns) -> Iterator[Row]:
    for place, line in _lines(file, shown):
        if image := line.rstrip("\r\n"):
            yield Row(place, image, None)


def _csv_rows(file: BinaryIO, shown: str, columns: Columns) -> Iterator[Row]:
    rows = csv.reader((line for _, line in _lines(file, shown)), strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        image, labels = _positions(header, f"{shown}, line 1", columns)
        for cells in rows:
            place = f"line {rows.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(f"{shown}, {place}: got {len(cells)} columns, expected {len(header)}")
            yield _row(shown, place, cells[image], None if labels is None else cells[labels], columns)
    except csv.Error as error:
        raise UsageError(f"{shown}, line {rows.line_num}: not CSV: {error}") from error


def _jsonl_rows(file: BinaryIO, shown: str, columns: Columns) -> Iterator[Row]:
    for place, line in _lines(file, shown):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{shown}, {place}: {error}") from None
        if not isinstance(value, dict):
            raise UsageError(f'{shown}, {place}: got no JSON object, expected {{"{columns.image}": "a.jpg"}}')
        if columns.labels_required and columns.cells.column not in value:
            raise UsageError(f"{shown}, {place}: no key {columns.cells.column!r}")
        yield _row(shown, place, value.get(columns.image), value.get(columns.cells.column), columns)


def _parquet_rows(file: BinaryIO, shown: str, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BackendUnavailable(
            f"{shown}: pyarrow is not installed", remedy="pip install pyarrow"
        ) from error

    @contextmanager
    def parquet_errors() -> Iterator[None]:
        try:
            yield
        except (pyarrow.ArrowException, ValueError, MemoryError) as error:
            raise UsageError(f"{shown}: not a Parquet file that can be read: {error}") from error

    number = 0
    with parquet_errors():
        table = parquet.ParquetFile(
            file,
            thrift_string_size_limit=_LARGEST_PARQUET_HEADER,
            thrift_container_size_limit=_LARGEST_PARQUET_HEADER,
        )
        names = list(table.schema_arrow.names)
        image, labels = _positions(names, shown, columns)
        wanted = [names[i] for i in (image, labels) if i is not None]
        for batch in table.iter_batches(_BATCH, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                cell = values.get(columns.cells.column)
                yield _row(shown, f"row {number}", values[columns.image], cell, columns)


Reader = Callable[[BinaryIO, str, Columns], Iterator[Row]]
KINDS: dict[str, Reader] = {
    "txt": _text_rows,
    "csv": _csv_rows,
    "jsonl": _jsonl_rows,
    "ndjson": _jsonl_rows,
    "parquet": _parquet_rows,
}


def _positions(header: list[str], where: str, columns: Columns) -> tuple[int, int | None]:
    """Which column is the image, which the labels."""
    got = ",".join(header)[:200]
    for name in (columns.image, columns.cells.column):
        if header.count(name) > 1:
            raise UsageError(f"{where}: got two columns {name!r}, expected one")
    if columns.image not in header:
        raise UsageError(
            f"{where}: got the columns {got!r}, expected {columns.image!r} and {columns.cells.column!r}"
        )
    if columns.cells.column in header:
        return header.index(columns.image), header.index(columns.cells.column)
    if columns.labels_required:
        raise UsageError(f"{where}: got the columns {got!r}, expected one named {columns.cells.column!r}")
    return header.index(columns.image), None


def _row(shown: str, place: str, image: Any, labels: Any, columns: Columns) -> Row:
    if not isinstance(image, str) or not image.strip():
        raise UsageError(
            f"{shown}, {place}: got {str(image)[:80]!r} as {columns.image!r}, expected the path of an image"
        )
    try:
        return Row(place, image, columns.cells.from_value(labels))
    except ValueError as error:
        raise UsageError(f"{shown}, {place}, {columns.cells.column!r}: {error}") from None


class _Found(NamedTuple):
    place: str  # as SourceItem: below the list's folder where it can be said so
    id: str
    identity: str  # the same for two ways to write one place


class ListSource(SourceBase):
    """Images by name; `store_of` gives the store of a protocol ("" is this machine).

    Ids are the paths below the list's folder. What lies elsewhere has the path that is written, without what
    leads upwards; where another image has that id already, a digest of the place is put to it.
    """

    def __init__(self, path: str, store_of: Callable[[str], Store], columns: Columns) -> None:
        self._path = path
        self._store_of = store_of
        self._columns = columns
        self._protocol = protocol_of(path)
        whole = path if self._protocol else os.path.abspath(path)  # noqa: PTH100 (text, as all paths here)
        self._home = whole.partition("?")[0].rpartition("/")[0]

    @property
    def description(self) -> str:
        """See Source."""
        return f"list {printable(self._path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        identities, ids = SeenHashes(), SeenHashes()
        for row in rows_of(self._store_of(self._protocol), self._path, self._columns):
            where = f"{self.description}, {row.place}"
            found = self._find(row.image, where)
            if not identities.add(found.identity):
                raise UsageError(f"{where}: {printable(row.image)} came before, expected each image once")
            name, attempts = found.id, itertools.count()
            while not ids.add(name):
                name = unique_id(found.id, found.place, next(attempts))
            size, version = self._status(found.place)
            yield SourceItem(name, found.place, size, version, row.labels)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        protocol = protocol_of(item.uri)
        try:
            if protocol:
                return self._store_of(protocol).read(item.uri, item.size, item.version)
            return self._store_of(self._protocol).read(self._absolute(item.uri), item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error

    def exists(self, item: SourceItem) -> bool:
        """See Source; it is about the disk or the server of the item, of which a list may name many."""
        protocol = protocol_of(item.uri)
        if protocol:
            return self._store_of(protocol).is_reachable(item.uri)
        store = self._store_of(self._protocol)
        if not self._protocol:
            if item.size < 0:
                return True  # it was not there when it was listed: of its disk nothing is known
            if not item.uri.startswith("/") and not store.exists(self._home):
                return False
        return store.is_reachable(self._absolute(item.uri))

    def _find(self, image: str, where: str) -> _Found:
        if "\0" in image or printable(image) != image:
            raise UsageError(f"{where}: {printable(image)!r} is no path, expected UTF-8 without NUL")
        if "://" in image:
            if protocol_of(image) in ("", "file", "local") or "::" in image:
                raise UsageError(
                    f"{where}: {image}: expected a path or the URL of one file (s3://, https://)"
                )
            rest = image.partition("://")[2]
            return _Found(image, safe_id(rest.partition("?")[0]), image)
        if self._protocol:
            if image.startswith("/") or ".." in image.split("/"):
                raise UsageError(
                    f"{where}: {image} leaves the list's folder, expected a path below it, or a URL"
                )
            place = os.path.normpath(image)
            return _Found(place, safe_id(place), join(self._home, place))
        whole = os.path.normpath(os.path.join(self._home, image))  # noqa: PTH118 (a Path for each is slow)
        if whole.startswith(self._home + "/"):
            inside = whole[len(self._home) + 1 :]
            return _Found(inside, safe_id(inside), whole)
        place = os.path.normpath(image)
        return _Found(place, safe_id(place), whole)

    def _absolute(self, place: str) -> str:
        return place if place.startswith("/") else join(self._home, place)

    def _status(self, place: str) -> tuple[int, str]:
        """Size and version where they cost no request; a file that is not there is found out by `read`."""
        if self._protocol or protocol_of(place):
            return -1, ""
        try:
            status = os.stat(self._absolute(place))  # noqa: PTH116 (a Path for each is slow)
        except OSError:
            return -1, ""
        return status.st_size, str(status.st_mtime_ns)
