"""What `finish` needs of each image, kept by shard as lines and read back by the index of the image.

A line is the index and the fields of one image, separated by tabs; JSON has none unescaped.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from multisa.runtime.sinks.contract import RunFolder

Row = tuple[int, list[bytes]]


def json_bytes(value: Any) -> bytes:
    """JSON on one line, keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def part_of(rows: Iterable[tuple[int, Sequence[bytes]]]) -> bytes:
    """Write the rows of one shard, in the order of the images."""
    return b"".join(b"\t".join((b"%d" % index, *fields)) + b"\n" for index, fields in rows)


def ordered_rows(folder: RunFolder, sink: str) -> Iterator[Row]:
    """Read the rows of all shards by index, holding one shard for each retry the run has had.

    The shards of a run are in order, and so are those of each retry after it: a few sorted lists to merge.
    """
    bounds = list(_sorted_lists(folder, sink))
    lists = (_rows(islice(folder.parts(sink), start, end)) for start, end in bounds)
    return heapq.merge(*lists, key=lambda row: row[0])


def _sorted_lists(folder: RunFolder, sink: str) -> Iterator[tuple[int, int]]:
    """From which part to which the indices only rise."""
    start, count, last = 0, 0, -1
    for number, part in enumerate(folder.parts(sink)):
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
