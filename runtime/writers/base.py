"""Writers: the formats in which a run stores its results.

To add a format:

1. Write a subclass of `Writer` in its own module. `encode` turns one image into a small payload,
   `write_shard` turns the payloads of a shard into files, and `finalize` writes the files of the whole run.
   Override `results` if files are named after images, and set `needs_probabilities` if it needs those.
2. Add its name and a line of help to `WRITERS` and its class to `open_writers` in `registry.py`.
3. Read its files back in `tests/runtime/test_runtime_writers.py`, with the library that users read them with.

The images alone determine every byte: no timestamps, no random names, no order that depends on threads. An
interrupted and resumed run therefore writes the same files as an uninterrupted one.
"""

import hashlib
import heapq
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.predict.prediction import ClassProbabilities

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One finished image, as writers receive it."""

    index: int  # position in the run, from 0; the same in every run over the same source
    id: str  # of its SourceItem
    name: str  # path of its results without extension, unique in the run; "a/b" for the id "a/b.jpg"
    mask: UInt8  # [H, W] class ids, at the size of the upright image
    png: bytes  # the mask as a palette PNG
    confidence: UInt8  # [h, w] of the chosen class, 0..255 for 0..1, at the size of the networks' input
    record: Mapping[str, Any]  # its line of labels.jsonl
    probabilities: ClassProbabilities | None = None  # set if a writer of the run needs them


class ShardFiles(Protocol):
    """Collects the files of one shard; they appear at their paths when the shard is committed."""

    def write(self, relative: str, data: bytes) -> None:
        """Add the file with the posix path `relative` below the output folder."""

    def write_part(self, writer: str, data: bytes) -> None:
        """Keep data of this shard for `Writer.finalize`; it is not a result."""


class RunFolder(Protocol):
    """The output folder of a run whose shards are all committed."""

    def parts(self, writer: str) -> Iterator[bytes]:
        """Yield the data passed to `write_part`, one shard at a time, in the order of the shards."""

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below the output folder piece by piece; it appears when it is complete."""


@dataclass(frozen=True)
class WriterContext:
    """The facts about a run that its writers use."""

    out: Path
    command: str  # "label" or "segment"
    manifest: Manifest  # classes, palette, the bundle's name
    bundle_sha256: str


class Writer(ABC):
    """One format. Several threads may call `encode` at once; the other methods run in one thread."""

    needs_probabilities = False  # whether `encode` uses `LabelledImage.probabilities`

    def __init__(self, context: WriterContext) -> None:
        self.context = context

    @abstractmethod
    def encode(self, image: LabelledImage) -> Any:
        """Return everything that the shard needs of one image, kept small: encoded masks, no arrays.

        Raises ImageError when the format cannot hold the image.
        """

    @abstractmethod
    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[Any]) -> None:
        """Write the files of one shard; `payloads` are in the order of the images, without failed ones."""

    def finalize(self, folder: RunFolder, shards: int) -> None:  # noqa: B027 (many formats need none)
        """Write the files that cover the whole run; after a retry, write them again from all parts.

        The shards of a retry follow the others: sort by the index of the image where order matters.
        """

    def results(self, name: str) -> Sequence[str]:
        """Return the paths below the output folder that belong only to the image `name`."""
        return ()


def shard_path(folder: str, shard: int, ending: str) -> str:
    """Return the path of a shard's file below the output folder."""
    return f"{folder}/{shard:06d}.{ending}"


# Each format percent-encodes the names that it cannot hold.

# WebDataset ends a key at the first dot of its last part, and skips members like "__MACOSX__/a".
_TAR = re.compile(r"\.(?=[^/]*$)|^__|[\0-\x1f\x7f]")
# Datumaro and CVAT strip the lines of their lists and treat "#" as the start of a comment.
_LINE = re.compile(r"^#|^\s|\s$|[\0-\x1f\x7f\x85\u2028\u2029]")
_LABEL = re.compile(f"{_LINE.pattern}|:")  # colons separate the fields of labelmap.txt
# Datumaro keeps all masks in one folder. "%~" marks a name that was cut.
_FILE = re.compile(r"[/\\\0-\x1f\x7f]|%~")

_MAX_FILE_NAME = 255 - len(".png")  # bytes, on every common file system
_DIGEST = 32  # hexadecimal digits


def tar_key(name: str) -> str:
    """Escape the key of a sample in a tar shard, which must have no dot in its last part."""
    return _escaped(name, _TAR)


def line_name(name: str) -> str:
    """Escape a name for a list with one name per line."""
    return _escaped(name, _LINE)


def label_name(name: str) -> str:
    """Escape the name of a class for CVAT's labelmap.txt."""
    return _escaped(name, _LABEL)


def file_name(name: str) -> str:
    """Turn a name into one file name without folders and extension.

    A name that is too long for a file system is cut and ends with "%~" and a digest.
    """
    escaped = _escaped(name, _FILE)
    if len(escaped.encode()) <= _MAX_FILE_NAME:
        return escaped
    ending = "%~" + hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    return escaped.encode()[: _MAX_FILE_NAME - len(ending)].decode(errors="ignore") + ending


def unescape_name(escaped: str) -> str:
    """Invert any of the functions above, unless the name was cut."""
    return unquote(escaped)


def _escaped(name: str, unsafe: re.Pattern[str]) -> str:
    if not unsafe.search(name) and unquote(name) == name:
        return name
    return unsafe.sub(lambda match: _percent(match[0]), name.replace("%", "%25"))


def _percent(text: str) -> str:
    # `quote` leaves dots, tildes and underscores alone.
    return "".join(quoted if (quoted := quote(c, safe="")) != c else f"%{ord(c):02X}" for c in text)


Row = tuple[int, list[bytes]]  # the index of an image, and fields without tabs and line ends


def json_bytes(value: Any) -> bytes:
    """Encode JSON on one line with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def encode_rows(rows: Iterable[tuple[int, Sequence[bytes]]]) -> bytes:
    """Encode the rows of one shard, in the order of the images, as a part for `ordered_rows`."""
    return b"".join(b"\t".join((b"%d" % index, *fields)) + b"\n" for index, fields in rows)


def ordered_rows(folder: RunFolder, writer: str) -> Iterator[Row]:
    """Yield the rows of all shards sorted by index; holds one shard per retry of the run in memory.

    The shards of a run are sorted, and so are those of each retry: this merges sorted lists.
    """
    bounds = list(_sorted_lists(folder, writer))
    lists = (_rows(islice(folder.parts(writer), start, end)) for start, end in bounds)
    return heapq.merge(*lists, key=lambda row: row[0])


def _sorted_lists(folder: RunFolder, writer: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of parts in which the index only increases."""
    start, count, last = 0, 0, -1
    for number, part in enumerate(folder.parts(writer)):
        count = number + 1
        if not part:
            continue
        if _index(part) < last:
            yield start, number
            start = number
        last = _index(part[part.rfind(b"\n", 0, -1) + 1 :])
    if count > start:
        yield start, count


def _rows(parts: Iterable[bytes]) -> Iterator[Row]:
    for part in parts:
        for line in part.split(b"\n")[:-1]:
            index, *fields = line.split(b"\t")
            yield int(index), fields


def _index(line: bytes) -> int:
    return int(line[: line.find(b"\t")])
