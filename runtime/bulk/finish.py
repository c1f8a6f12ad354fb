"""The end of a run: what is one file for all shards, made anew from their parts each time."""

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multisa.runtime.bulk.folder import REPORT_PAGE
from multisa.runtime.bulk.shards import PRIVATE, FinishedFolder
from multisa.runtime.bulk.worker import FAILURES, RECORDS
from multisa.runtime.files import write_json_atomically
from multisa.runtime.report.reasons import group_failures
from multisa.runtime.sinks.contract import Sink

LABELS_FILE, FAILED_FILE = "labels.jsonl", "failed.jsonl"
FINISHED = f"{PRIVATE}/finished.json"


def finish_files(out: Path, sinks: Sequence[Sink], shards: Sequence[int], retries: Sequence[int]) -> None:
    """Write labels.jsonl, failed.jsonl (where there are any) and what the sinks have for the whole run.

    shards, retries: numbers of the committed shards, in order; what a retry says of an image holds.
    """
    first, again = FinishedFolder(out, shards), FinishedFolder(out, retries)
    records, failures = _latest(again)
    first.write(LABELS_FILE, _merged(first.parts(RECORDS), records, set()))
    _write_failures(first, failures, set(records))
    everything = FinishedFolder(out, (*shards, *retries))
    for sink in sinks:
        sink.finish(everything, len(shards) + len(retries))
    write_json_atomically(out / FINISHED, {"files": [*first.written, *everything.written]})


def note_finished(out: Path, shards: int) -> None:
    """Note that files and record are those of so many shards: only the page may be left to be written."""
    write_json_atomically(out / FINISHED, {**_finished(out), "shards": shards})


def note_page(out: Path, pictured: int) -> None:
    """Note that the page is written, with so many pictures."""
    write_json_atomically(out / FINISHED, {**_finished(out), "pictured": pictured})


def is_page_written(out: Path, pictured: int) -> bool:
    """Whether the page is that of the files that are there, with so many pictures."""
    return _finished(out).get("pictured") == pictured and (out / REPORT_PAGE).is_file()


def write_failures(out: Path, shards: Sequence[int], retries: Sequence[int]) -> None:
    """Write failed.jsonl of the shards that are committed, for a run that stops before its end."""
    records, failures = _latest(FinishedFolder(out, retries))
    _write_failures(FinishedFolder(out, shards), failures, set(records))


def is_finished(out: Path, shards: int) -> bool:
    """Whether `note_finished` was told so many shards."""
    return _finished(out).get("shards") == shards


def unfinish(out: Path) -> None:
    """Note that there is more to be done."""
    (out / FINISHED).unlink(missing_ok=True)


def finished_files(out: Path) -> list[str]:
    """Paths below OUT of what is one file for a whole run."""
    files = _finished(out).get("files")
    written = [str(file) for file in files] if isinstance(files, list) else []
    return [*written, LABELS_FILE, FAILED_FILE]


def failure_reasons(out: Path) -> dict[str, int]:
    """How many images failed for which reason, the most frequent first."""
    if not (out / FAILED_FILE).is_file():
        return {}
    with (out / FAILED_FILE).open("rb") as lines:
        groups = group_failures(map(json.loads, lines), 1)
    return {reason: group.count for reason, group in groups.items()}


def failed_indices(out: Path, shards: Sequence[int], retries: Sequence[int]) -> list[int]:
    """Positions of the images that failed the last time they were tried, in order."""
    records, failures = _latest(FinishedFolder(out, retries))
    merged = _merged(FinishedFolder(out, shards).parts(FAILURES), failures, set(records))
    return [_index(line) for lines in merged for line in lines.splitlines()]


def _write_failures(first: FinishedFolder, retried: dict[int, bytes], done: set[int]) -> None:
    if any(_merged(first.parts(FAILURES), retried, done)):
        first.write(FAILED_FILE, _merged(first.parts(FAILURES), retried, done))
    else:
        (first.out / FAILED_FILE).unlink(missing_ok=True)


def _finished(out: Path) -> dict[str, Any]:
    try:
        value = json.loads((out / FINISHED).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _latest(folder: FinishedFolder) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Of the images that were tried again: the records of those done, the failures of the others."""
    done: dict[int, bytes] = {}
    failed: dict[int, bytes] = {}
    for records, failures in zip(folder.parts(RECORDS), folder.parts(FAILURES), strict=True):
        for line in failures.splitlines(keepends=True):
            failed[_index(line)] = line
        for line in records.splitlines(keepends=True):
            done[_index(line)] = line
            failed.pop(_index(line), None)
    return done, failed


def _merged(parts: Iterator[bytes], retried: dict[int, bytes], done: set[int]) -> Iterator[bytes]:
    """Lines, some at once, in the order of the images: `retried` in place of the first, without `done`."""
    if not retried and not done:
        yield from (part for part in parts if part)
        return
    first = (line for part in parts for line in part.splitlines(keepends=True))
    kept = ((_index(line), line) for line in first)
    others = ((index, line) for index, line in kept if index not in retried and index not in done)
    yield from (line for _, line in heapq.merge(others, sorted(retried.items())))


def _index(line: bytes) -> int:
    return int(json.loads(line)["index"])
