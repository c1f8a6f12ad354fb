"""Images named by a list (.txt) or a manifest (.csv, .jsonl, .parquet), in its order.

Entries are paths relative to the list, absolute paths, or URLs. A manifest has a column `image` and may have
a column of labels (any of LABEL_COLUMNS). Rows about one image that follow each other are merged.
"""

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.image_labels import IMAGE_COLUMNS, LABEL_COLUMNS, ClassNames, Labels, find_column, log_label_column
from multisa.runtime.progress import log
from multisa.runtime.sources.base import Listed, Skipped, Source, SourceItem
from multisa.runtime.sources.remote import protocol_of
from multisa.runtime.sources.storage import (
    SeenHashes,
    Store,
    join,
    last_name,
    mask_name,
    printable,
    reason_of,
    safe_id,
    unique_id,
)

MOST_LABELS = 10_000  # of one image
LONGEST_LINE = 2**20  # bytes
_BATCH = 1024  # rows of Parquet
_LARGEST_PARQUET_HEADER = 2**28  # bytes, and entries, of the file's metadata


@dataclass(frozen=True)
class LabelReader:
    """Reads labels. `classes` tell a name with spaces from several names, and labels from a caption."""

    classes: ClassNames = field(default_factory=lambda: ClassNames(()))
    ignore: bool = False  # only tell whether there are labels: return () for any

    def from_value(self, value: Any) -> Labels | None:
        """Return the labels in a list or a text of names, or None. Raises ValueError for anything else."""
        if value is None or self.ignore:
            return None if value is None else ()
        if isinstance(value, str):
            value = self.classes.split(value)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"got {str(value)[:80]!r}, expected a list of class names or one text")
        if len(value) > MOST_LABELS:
            raise ValueError(f"got {len(value)} labels, expected at most {MOST_LABELS}")
        return tuple(dict.fromkeys(value))

    def from_file(self, kind: str, data: bytes) -> Labels | None:
        """Return the labels in a "json", "cls" or "txt" file. Raises ValueError for an unreadable one."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
        if kind == "cls":
            return self.from_value(text.strip())
        if kind == "txt":  # a caption, in most shards
            labels = self.from_value(text.strip()) or ()
            others = [name for name in labels if self.classes.find(name) is None] if self.classes.classes else []
            if others and len(others) < len(labels):
                raise ValueError(f"taken for a caption: it holds class names, but {others[0][:40]!r} is no class")
            return None if others else labels or None
        value = parse_json(text)
        if isinstance(value, dict):
            try:
                value = value.get(find_column(value, LABEL_COLUMNS, "labels") or "")
            except UsageError as error:
                raise ValueError(str(error)) from None
        return self.from_value(value)


def parse_json(text: str) -> Any:
    """Parse untrusted JSON. Raises ValueError, also for deep nesting and for a key that an object has twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise KeyError  # a ValueError would be taken for broken JSON
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except KeyError:
        raise ValueError("is JSON with a key that occurs twice, expected each key once") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON, or nested too deeply") from None


Columns = tuple[str | None, str | None]  # of the images and of the labels


class Row(NamedTuple):
    """One image of a list."""

    where: str  # "m.csv, line 3"
    image: str
    labels: Labels | None


def read_rows(store: Store, path: str, labels: LabelReader) -> Iterator[Row]:
    """Yield the rows of a file ending in .txt, .csv, .jsonl, .ndjson or .parquet.

    Raises UsageError that names the bad line or row, BackendUnavailable if pyarrow is missing.
    """
    list_name = printable(path.partition("?")[0])
    reader = KINDS[path.partition("?")[0].lower().rpartition(".")[2]]
    try:
        with store.stream(path) as file:
            yield from reader(file, list_name, labels)
    except OSError as error:
        reason = reason_of(error)
        raise UsageError(f"{list_name}: cannot be read ({reason}), expected a list of images") from error


def _lines(file: BinaryIO, list_name: str) -> Iterator[tuple[str, str]]:
    """Yield ("line 1", its text with the line end) and so on."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UsageError(f"{list_name}, line {number}: longer than {LONGEST_LINE} bytes, expected a list")
        try:
            yield f"line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{list_name}, line {number}"
            raise UsageError(f"{where}: is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def _text_rows(file: BinaryIO, list_name: str, _: LabelReader) -> Iterator[Row]:
    for position, line in _lines(file, list_name):
        if line.strip():
            yield Row(f"{list_name}, {position}", line.rstrip("\r\n"), None)


def _csv_rows(file: BinaryIO, list_name: str, reader: LabelReader) -> Iterator[Row]:
    rows = csv.reader((line for _, line in _lines(file, list_name)), strict=True)
    try:
        header = next(rows, [])
        columns = _columns(header, f"{list_name}, line 1")
        for cells in rows:
            position = f"line {rows.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(f"{list_name}, {position}: got {len(cells)} columns, expected {len(header)}")
            yield _row(f"{list_name}, {position}", dict(zip(header, cells, strict=True)), columns, reader)
    except csv.Error as error:
        raise UsageError(f"{list_name}, line {rows.line_num}: not CSV: {error}") from error


def _jsonl_rows(file: BinaryIO, list_name: str, reader: LabelReader) -> Iterator[Row]:
    is_logged = False
    for position, line in _lines(file, list_name):
        if not line.strip():
            continue
        where = f"{list_name}, {position}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        if not isinstance(value, dict):
            raise UsageError(f'{list_name}, {position}: got no JSON object, expected {{"image": "a.jpg"}}')
        columns = find_column(value, IMAGE_COLUMNS, where), find_column(value, LABEL_COLUMNS, where)
        if columns[1] is None and len(value) > 1 and not is_logged:
            is_logged = True
            _log_no_labels(list(value), where)
        yield _row(where, value, columns, reader)


def _parquet_rows(file: BinaryIO, list_name: str, reader: LabelReader) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BackendUnavailable(f"{list_name}: pyarrow is not installed", remedy="pip install pyarrow") from error
    number = 0
    try:
        table = parquet.ParquetFile(
            file, thrift_string_size_limit=_LARGEST_PARQUET_HEADER, thrift_container_size_limit=_LARGEST_PARQUET_HEADER
        )
        columns = _columns(table.schema_arrow.names, list_name)
        for batch in table.iter_batches(_BATCH, columns=list(filter(None, columns))):
            for values in batch.to_pylist():
                number += 1
                yield _row(f"{list_name}, row {number}", values, columns, reader)
    except (pyarrow.ArrowException, ValueError, MemoryError) as error:
        raise UsageError(f"{list_name}: not a readable Parquet file: {error}") from error


KINDS: dict[str, Callable[[BinaryIO, str, LabelReader], Iterator[Row]]] = {
    "txt": _text_rows,
    "csv": _csv_rows,
    "jsonl": _jsonl_rows,
    "ndjson": _jsonl_rows,
    "parquet": _parquet_rows,
}


def _columns(header: Sequence[str], where: str) -> Columns:
    """Return the columns of a manifest. Raises UsageError without one of images."""
    image, labels = (find_column(header, wanted, where) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image is None:
        got = ",".join(header)[:200]
        raise UsageError(f"{where}: got the columns {got!r}, expected 'image' and 'labels'")
    if labels is not None:
        log_label_column(labels, where)
    elif len(header) > 1:
        _log_no_labels(header, where)
    return image, labels


def _log_no_labels(columns: Sequence[str], where: str) -> None:
    got = ",".join(columns)[:200]
    log.info(f"{where}: got the columns {got!r}, none of them of labels ({', '.join(LABEL_COLUMNS)})")


def _row(where: str, values: dict[str, Any], columns: Columns, reader: LabelReader) -> Row:
    image, labels = (values.get(column) if column else None for column in columns)
    if not isinstance(image, str) or not image.strip():
        raise UsageError(f"{where}: got {str(image)[:80]!r} as 'image', expected the path of an image")
    try:
        return Row(where, image, reader.from_value(labels))
    except ValueError as error:
        raise UsageError(f"{where}, {columns[1]!r}: {error}") from None


class _Location(NamedTuple):
    """The location of a listed image."""

    uri: str  # as in SourceItem: relative to the list's folder if possible
    id: str
    identity: str  # equal for two spellings of one URI


class ListSource(Source):
    """The images that a list names; `store_of` returns the store of a protocol ("" is this machine).

    Ids are paths below the list's folder. For an image elsewhere, the id is the path as written without its
    upward parts, plus a digest of the URI where another image has that id.
    """

    def __init__(self, path: str, store_of: Callable[[str], Store], labels: LabelReader) -> None:
        self._path = path
        self._store_of = store_of
        self._labels = labels
        self._protocol = protocol_of(path)
        whole = path if self._protocol else os.path.abspath(path)  # noqa: PTH100 (text, as all paths here)
        self._home = whole.partition("?")[0].rpartition("/")[0]
        self.description = f"list {printable(path.partition('?')[0])}"
        self.folder_name = last_name(self._home)

    def listing(self) -> Iterator[Listed]:
        identities, ids = SeenHashes(), SeenHashes()
        for row, location in self._merged_rows():
            if not identities.add(location.identity):
                advice = "expected each image once" + (", or its rows one after the other" if row.labels else "")
                raise UsageError(f"{row.where}: {printable(row.image)} is a duplicate, {advice}")
            name, attempts = location.id, itertools.count()
            while not ids.add(name):
                name = unique_id(location.id, location.uri, next(attempts))
            size, version = self._status(location.uri)
            yield SourceItem(name, location.uri, size, version, row.labels)

    def _rows(self) -> Iterator[Row]:
        return read_rows(self._store_of(self._protocol), self._path, self._labels)

    def _merged_rows(self) -> Iterator[tuple[Row, _Location]]:
        """Yield one row per image: rows with labels that follow each other and name one image are merged."""
        last: tuple[Row, _Location] | None = None
        for row in self._rows():
            location = self._locate(row.image, row.where)
            if last and row.labels and last[0].labels and location.identity == last[1].identity:
                labels = tuple(dict.fromkeys((*last[0].labels, *row.labels)))
                last = (last[0]._replace(labels=labels), last[1])
                continue
            if last:
                yield last
            last = row, location
        if last:
            yield last

    def _read(self, item: SourceItem) -> bytes:
        protocol = protocol_of(item.uri)
        store = self._store_of(protocol or self._protocol)
        return store.read(item.uri if protocol else self._absolute(item.uri), item.size, item.version)

    def exists(self, item: SourceItem) -> bool:
        """See Source. Checks the disk or server of the item, because a list may name many."""
        protocol = protocol_of(item.uri)
        if protocol:
            return self._store_of(protocol).is_reachable(item.uri)
        store = self._store_of(self._protocol)
        if not self._protocol:
            if item.size < 0:
                return True  # the file did not exist when it was listed: its disk is unknown
            if not item.uri.startswith("/") and not store.exists(self._home):
                return False
        return store.is_reachable(self._absolute(item.uri))

    def _locate(self, image: str, where: str) -> _Location:
        if "\0" in image or printable(image) != image:
            raise UsageError(f"{where}: {printable(image)!r} is not a path, expected UTF-8 without NUL")
        if "://" in image:
            if protocol_of(image) in ("", "file", "local") or "::" in image:
                raise UsageError(f"{where}: {image}: expected a path or the URL of one file (s3://, https://)")
            rest = image.partition("://")[2]
            return _Location(image, safe_id(rest.partition("?")[0]), image)
        path = os.path.normpath(image)
        if self._protocol:
            if image.startswith("/") or ".." in image.split("/"):
                raise UsageError(f"{where}: {image} leaves the list's folder, expected a path below it, or a URL")
            return _Location(path, safe_id(path), join(self._home, path))
        whole = os.path.normpath(os.path.join(self._home, image))  # noqa: PTH118 (a Path for each is slow)
        plain = image.strip().replace("\\", "/")
        if image != plain and not os.path.lexists(whole):  # blanks around a path, or a path of Windows
            return self._locate(plain, where)
        if whole.startswith(self._home + "/"):
            path = whole[len(self._home) + 1 :]
        return _Location(path, safe_id(path), whole)

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else join(self._home, path)

    def _status(self, uri: str) -> tuple[int, str]:
        """Return size and version if that costs no request; `read` reports a missing file."""
        if self._protocol or protocol_of(uri):
            return -1, ""
        try:
            status = os.stat(self._absolute(uri))  # noqa: PTH116 (a Path for each is slow)
        except OSError:
            return -1, ""
        return status.st_size, str(status.st_mtime_ns)


class FilesSource(ListSource):
    """Images named one by one, as a shell expands a pattern without quotes; ids are paths below their common folder."""

    def __init__(self, paths: Sequence[str], store_of: Callable[[str], Store]) -> None:
        # URLs keep their host in their id, as in a list.
        whole = [path if protocol_of(path) else os.path.abspath(path) for path in paths]  # noqa: PTH100
        folders = [os.path.dirname(path) for path in whole if not protocol_of(path)]  # noqa: PTH120
        home = os.path.commonpath(folders) if folders else "/"
        super().__init__(join(home, "-"), store_of, LabelReader())
        self._paths = whole
        self.description = f"{len(paths)} images" + (f" in {printable(home)}" if folders else "")

    def listing(self) -> Iterator[Listed]:
        """See Source. A pattern without quotes skips the same names as one in quotes."""
        for entry in super().listing():
            problem = mask_name(entry.id) if isinstance(entry, SourceItem) else ""
            yield Skipped(entry.id, problem) if isinstance(entry, SourceItem) and problem else entry

    def _rows(self) -> Iterator[Row]:
        for number, path in enumerate(self._paths, 1):
            yield Row(f"image {number} of {len(self._paths)}", path, None)
