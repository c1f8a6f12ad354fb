"""What every format of results keeps: each image encoded by itself, each shard written as a whole.

    payload = sink.encode(image)               # in a worker's thread, for one image
    sink.write_shard(files, shard, payloads)   # in one thread, in the order of the images
    sink.finish(folder, shards)   # once, at the end: files for the whole run

All bytes that a sink writes are determined by its images: no times, no random names, no order of a dictionary
that depends on threads.
"""

import hashlib
import heapq
import json
import re
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
Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One finished image, as sinks get it."""

    index: int  # position in the run, from 0; the same in every run over the same source
    id: str  # of the source's item
    name: str  # path of its results without extension, unique in the run; "a/b" from the id "a/b.jpg"
    mask: UInt8  # [H, W] class ids, of the image's own size (upright)
    png: bytes  # the mask as a palette PNG
    confidence: UInt8  # [h, w] of the chosen class, 0..255 for 0..1, at the size the networks saw
    record: Mapping[str, Any]  # its line of labels.jsonl
    probabilities: ClassProbabilities | None = None  # only where a sink asks for them


class ShardFiles(Protocol):
    """Takes the files of one shard; they appear at their paths together, when the shard is committed."""

    def write(self, relative: str, data: bytes) -> None:
        """Keep a file for the posix path `relative` below OUT."""

    def write_part(self, writer: str, data: bytes) -> None:
        """Keep what `Sink.finish` needs of this shard; it is not one of the results."""


class RunFolder(Protocol):
    """The folder of a run that is complete, as `Sink.finish` sees it."""

    def parts(self, writer: str) -> Iterator[bytes]:
        """What `write_part` was given, in the order of the shards; one at a time."""

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below OUT piece by piece, flushed and renamed into place at the end."""


@dataclass(frozen=True)
class WriterContext:
    """What a sink may know about the run."""

    out: Path
    command: str  # "label" or "segment"
    manifest: Manifest  # classes, palette, the bundle's name
    bundle_sha256: str


class Writer(Protocol):
    """One format. `encode` may be called from several threads at once."""

    @property
    def needs_probabilities(self) -> bool:
        """Whether `LabelledImage.soft` must be there."""

    def encode(self, image: LabelledImage) -> Any:
        """Everything the shard needs of one image, small: masks as PNG or runs, not as arrays.

        Raises ImageError when the format cannot hold the image.
        """

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[Any]) -> None:
        """Write the files of shard `shard`; payloads in the order of the images, none of failed ones."""

    def finalize(self, folder: RunFolder, shards: int) -> None:
        """Write what is one file for the whole run; called again after a retry, then from all parts anew.

        Shards of a retry come after the others, so parts are sorted by the index of the image where order
        matters.
        """

    def results(self, name: str) -> Sequence[str]:
        """Paths below OUT that are named after the image `name`; empty where files are named after shards."""


class WriterBase:
    """The part of a sink that a format leaves as it is."""

    needs_probabilities = False

    def __init__(self, context: WriterContext) -> None:
        self.context = context

    def finalize(self, folder: RunFolder, shards: int) -> None:
        """Write nothing: every file is one shard's."""

    def results(self, name: str) -> Sequence[str]:
        """No file: they are named after shards."""
        return ()


def shard_path(folder: str, shard: int, ending: str) -> str:
    """Path below OUT of the file of one shard."""
    return f"{folder}/{shard:06d}.{ending}"


# webdataset cuts a key at the first dot of its last part and passes over members like "__MACOSX__/a".
_TAR = re.compile(r"\.(?=[^/]*$)|^__|[\0-\x1f\x7f]")
# Datumaro's and CVAT's lists of names are lines, stripped, and "#" begins a comment.
_LINE = re.compile(r"^#|^\s|\s$|[\0-\x1f\x7f\x85\u2028\u2029]")
_LABEL = re.compile(f"{_LINE.pattern}|:")  # labelmap.txt separates its fields by colons
# Datumaro's masks lie in one folder. "%~" marks a name that was cut.
_FILE = re.compile(r"[/\\\0-\x1f\x7f]|%~")

_MAX_FILE_NAME = 255 - len(".png")  # bytes, on every common file system
_DIGEST = 32  # hexadecimal digits


def tar_key(name: str) -> str:
    """Key of a sample in a tar shard, without a dot in its last part; `plain_name` gives the name back."""
    return _escaped(name, _TAR)


def line_name(name: str) -> str:
    """A name in a list of lines; `plain_name` gives it back."""
    return _escaped(name, _LINE)


def label_name(name: str) -> str:
    """A class in CVAT's labelmap.txt; `plain_name` gives it back."""
    return _escaped(name, _LABEL)


def file_name(name: str) -> str:
    """One file's name, without extension and folders; `plain_name` gives the name back.

    Of a name too long for a file system the beginning stays, and "%~" and a digest of the name follow.
    """
    escaped = _escaped(name, _FILE)
    if len(escaped.encode()) <= _MAX_FILE_NAME:
        return escaped
    ending = "%~" + hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    begin = escaped.encode()[: _MAX_FILE_NAME - len(ending)].decode(errors="ignore")
    return begin + ending


def plain_name(escaped: str) -> str:
    """The name that was escaped (not of one that was cut)."""
    return unquote(escaped)


def _escaped(name: str, unsafe: re.Pattern[str]) -> str:
    if not unsafe.search(name) and unquote(name) == name:
        return name
    return unsafe.sub(lambda match: _percent(match[0]), name.replace("%", "%25"))


def _percent(text: str) -> str:
    # `quote` leaves dots, tildes and underscores alone.
    return "".join(quoted if (quoted := quote(c, safe="")) != c else f"%{ord(c):02X}" for c in text)


Row = tuple[int, list[bytes]]


def json_bytes(value: Any) -> bytes:
    """JSON on one line, keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def part_of(rows: Iterable[tuple[int, Sequence[bytes]]]) -> bytes:
    """Write the rows of one shard, in the order of the images."""
    return b"".join(b"\t".join((b"%d" % index, *fields)) + b"\n" for index, fields in rows)


def ordered_rows(folder: RunFolder, writer: str) -> Iterator[Row]:
    """Read the rows of all shards by index, holding one shard for each retry the run has had.

    The shards of a run are in order, and so are those of each retry after it: a few sorted lists to merge.
    """
    bounds = list(_sorted_lists(folder, writer))
    lists = (_rows(islice(folder.parts(writer), start, end)) for start, end in bounds)
    return heapq.merge(*lists, key=lambda row: row[0])


def _sorted_lists(folder: RunFolder, writer: str) -> Iterator[tuple[int, int]]:
    """From which part to which the indices only rise."""
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
