"""Images named by a list (.txt) or a manifest (.csv, .jsonl, .parquet), in its order.

They lie beside the list, elsewhere, or behind URLs. A manifest has a column `image`, and may have `labels`.
"""

import csv
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.image_labels import Labels, split_classes
from multisa.runtime.sources.base import Listed, SourceItem
from multisa.runtime.sources.folders import SourceBase
from multisa.runtime.sources.names import SeenHashes, printable, safe_id, unique_id
from multisa.runtime.sources.remote import protocol_of
from multisa.runtime.sources.storage import Store, join, reason_of

MOST_LABELS = 10_000  # of one image
LONGEST_LINE = 2**20  # bytes
IMAGE, LABELS = "image", "labels"  # columns and keys of a manifest
_BATCH = 1024  # rows of Parquet
_LARGEST_PARQUET_HEADER = 2**28  # bytes, and entries, of the file's metadata


@dataclass(frozen=True)
class LabelReader:
    """Reads labels; `classes` tell a name with spaces from several names, and labels from a caption."""

    classes: Collection[str] = ()

    def from_value(self, value: Any) -> Labels | None:
        """Labels from a list of names, a text of names, or None. Raises ValueError for anything else."""
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
        """Labels from a file of a sample: "json", "cls" or "txt". Raises ValueError if it cannot be read."""
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
        return self.from_value(value.get(LABELS)) if isinstance(value, dict) else None


def parse_json(text: str) -> Any:
    """The value of a JSON text of any origin. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON, or nested too deeply") from None


class Row(NamedTuple):
    """One image of a list."""

    position: str  # "line 3", "row 3"
    image: str
    labels: Labels | None


def read_rows(store: Store, path: str, labels: LabelReader) -> Iterator[Row]:
    """The rows of a file ending in .txt, .csv, .jsonl, .ndjson or .parquet.

    Raises UsageError naming the line or row that cannot be used, BackendUnavailable if pyarrow is missing.
    """
    shown = printable(path.partition("?")[0])
    reader = KINDS[path.partition("?")[0].lower().rpartition(".")[2]]
    try:
        with store.stream(path) as file:
            yield from reader(file, shown, labels)
    except OSError as error:
        raise UsageError(
            f"{shown}: cannot be read ({reason_of(error)}), expected a list of images"
        ) from error


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


def _text_rows(file: BinaryIO, shown: str, _: LabelReader) -> Iterator[Row]:
    for position, line in _lines(file, shown):
        if image := line.rstrip("\r\n"):
            yield Row(position, image, None)


def _csv_rows(file: BinaryIO, shown: str, reader: LabelReader) -> Iterator[Row]:
    rows = csv.reader((line for _, line in _lines(file, shown)), strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        _check_columns(header, f"{shown}, line 1")
        for cells in rows:
            position = f"line {rows.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(f"{shown}, {position}: got {len(cells)} columns, expected {len(header)}")
            yield _row(shown, position, dict(zip(header, cells, strict=True)), reader)
    except csv.Error as error:
        raise UsageError(f"{shown}, line {rows.line_num}: not CSV: {error}") from error


def _jsonl_rows(file: BinaryIO, shown: str, reader: LabelReader) -> Iterator[Row]:
    for position, line in _lines(file, shown):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{shown}, {position}: {error}") from None
        if not isinstance(value, dict):
            raise UsageError(f'{shown}, {position}: got no JSON object, expected {{"{IMAGE}": "a.jpg"}}')
        yield _row(shown, position, value, reader)


def _parquet_rows(file: BinaryIO, shown: str, reader: LabelReader) -> Iterator[Row]:
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
        _check_columns(names, shown)
        wanted = [name for name in (IMAGE, LABELS) if name in names]
        for batch in table.iter_batches(_BATCH, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield _row(shown, f"row {number}", values, reader)


KINDS: dict[str, Callable[[BinaryIO, str, LabelReader], Iterator[Row]]] = {
    "txt": _text_rows,
    "csv": _csv_rows,
    "jsonl": _jsonl_rows,
    "ndjson": _jsonl_rows,
    "parquet": _parquet_rows,
}


def _check_columns(header: list[str], where: str) -> None:
    """Raise UsageError for a header without images, or with a column of images or labels twice."""
    for name in (IMAGE, LABELS):
        if header.count(name) > 1:
            raise UsageError(f"{where}: got two columns {name!r}, expected one")
    if IMAGE not in header:
        got = ",".join(header)[:200]
        raise UsageError(f"{where}: got the columns {got!r}, expected {IMAGE!r} and {LABELS!r}")


def _row(shown: str, position: str, values: dict[str, Any], reader: LabelReader) -> Row:
    image = values.get(IMAGE)
    if not isinstance(image, str) or not image.strip():
        raise UsageError(
            f"{shown}, {position}: got {str(image)[:80]!r} as {IMAGE!r}, expected the path of an image"
        )
    try:
        return Row(position, image, reader.from_value(values.get(LABELS)))
    except ValueError as error:
        raise UsageError(f"{shown}, {position}, {LABELS!r}: {error}") from None


class _Found(NamedTuple):
    """Where an image of a list is."""

    uri: str  # as in SourceItem: below the list's folder if possible
    id: str
    identity: str  # equal for two spellings of one URI


class ListSource(SourceBase):
    """Images by name; `store_of` returns the store of a protocol ("" is this machine).

    Ids are paths below the list's folder. An image elsewhere has the path as written, without what leads
    upwards, and with a digest of the URI where another image has that id.
    """

    def __init__(self, path: str, store_of: Callable[[str], Store], labels: LabelReader) -> None:
        self._path = path
        self._store_of = store_of
        self._labels = labels
        self._protocol = protocol_of(path)
        whole = path if self._protocol else os.path.abspath(path)  # noqa: PTH100 (text, as all paths here)
        self._home = whole.partition("?")[0].rpartition("/")[0]
        self.description = f"list {printable(path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        identities, ids = SeenHashes(), SeenHashes()
        for row in read_rows(self._store_of(self._protocol), self._path, self._labels):
            where = f"{self.description}, {row.position}"
            found = self._find(row.image, where)
            if not identities.add(found.identity):
                raise UsageError(f"{where}: {printable(row.image)} came before, expected each image once")
            name, attempts = found.id, itertools.count()
            while not ids.add(name):
                name = unique_id(found.id, found.uri, next(attempts))
            size, version = self._status(found.uri)
            yield SourceItem(name, found.uri, size, version, row.labels)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        protocol = protocol_of(item.uri)
        store = self._store_of(protocol or self._protocol)
        path = item.uri if protocol else self._absolute(item.uri)
        try:
            return store.read(path, item.size, item.version)
        except OSError as error:
            raise ImageError(reason_of(error)) from error

    def exists(self, item: SourceItem) -> bool:
        """See Source; looks at the disk or the server of the item, as a list may name many."""
        protocol = protocol_of(item.uri)
        if protocol:
            return self._store_of(protocol).is_reachable(item.uri)
        store = self._store_of(self._protocol)
        if not self._protocol:
            if item.size < 0:
                return True  # it did not exist when it was listed: its disk is unknown
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
        path = os.path.normpath(image)
        if self._protocol:
            if image.startswith("/") or ".." in image.split("/"):
                raise UsageError(
                    f"{where}: {image} leaves the list's folder, expected a path below it, or a URL"
                )
            return _Found(path, safe_id(path), join(self._home, path))
        whole = os.path.normpath(os.path.join(self._home, image))  # noqa: PTH118 (a Path for each is slow)
        if whole.startswith(self._home + "/"):
            path = whole[len(self._home) + 1 :]
        return _Found(path, safe_id(path), whole)

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else join(self._home, path)

    def _status(self, uri: str) -> tuple[int, str]:
        """Size and version if they cost no request; a missing file is an error of `read`."""
        if self._protocol or protocol_of(uri):
            return -1, ""
        try:
            status = os.stat(self._absolute(uri))  # noqa: PTH116 (a Path for each is slow)
        except OSError:
            return -1, ""
        return status.st_size, str(status.st_mtime_ns)
