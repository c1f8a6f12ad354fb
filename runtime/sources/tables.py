"""Rows of a list or a manifest, one at a time: text, CSV, JSONL, Parquet.

for row in rows_of(store, "photos.csv", columns): row.place, row.image, row.labels
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from multisa.runtime.errors import EngineUnavailable, UsageError
from multisa.runtime.sources.label_cells import CellReader, parse_json
from multisa.runtime.sources.names import printable
from multisa.runtime.sources.storage import Store, why

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

    Raises UsageError naming the line or row that cannot be used, EngineUnavailable where pyarrow is missing.
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
        raise EngineUnavailable(f"{shown}: pyarrow is not installed", remedy="pip install pyarrow") from error

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
