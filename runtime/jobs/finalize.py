"""The end of a run: what is one file for all shards, made anew from their parts each time."""

import heapq
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import ImageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.decode import decode_image, decode_mask, read_mask
from multisa.runtime.jobs.output import REPORT_FOLDER, REPORT_PAGE
from multisa.runtime.jobs.shards import PRIVATE, FinishedFolder
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.worker import FAILURES, RECORDS
from multisa.runtime.report.pictures import clear_pictures
from multisa.runtime.report.report import ReportData, write_report
from multisa.runtime.report.summary import group_failures
from multisa.runtime.sources.base import Source
from multisa.runtime.writers.base import Writer, shard_path, tar_key

LABELS_FILE, FAILED_FILE = "labels.jsonl", "failed.jsonl"
FINISHED = f"{PRIVATE}/finished.json"


def finalize_files(
    out: Path, writers: Sequence[Writer], shards: Sequence[int], retries: Sequence[int]
) -> None:
    """Write labels.jsonl, failed.jsonl (where there are any) and what the sinks have for the whole run.

    shards, retries: numbers of the committed shards, in order; what a retry says of an image holds.
    """
    first, again = FinishedFolder(out, shards), FinishedFolder(out, retries)
    records, failures = _latest(again)
    first.write(LABELS_FILE, _merged(first.parts(RECORDS), records, set()))
    _write_failures(first, failures, set(records))
    everything = FinishedFolder(out, (*shards, *retries))
    for writer in writers:
        writer.finalize(everything, len(shards) + len(retries))
    write_json_atomically(out / FINISHED, {"files": [*first.written, *everything.written]})


def record_finalized(out: Path, shards: int) -> None:
    """Note that files and record are those of so many shards: only the page may be left to be written."""
    write_json_atomically(out / FINISHED, {**_finished(out), "shards": shards})


def record_report(out: Path, report_images: int) -> None:
    """Note that the page is written, with so many pictures."""
    write_json_atomically(out / FINISHED, {**_finished(out), "report_images": report_images})


def is_report_written(out: Path, report_images: int) -> bool:
    """Whether the page is that of the files that are there, with so many pictures."""
    return _finished(out).get("report_images") == report_images and (out / REPORT_PAGE).is_file()


def write_failures(out: Path, shards: Sequence[int], retries: Sequence[int]) -> None:
    """Write failed.jsonl of the shards that are committed, for a run that stops before its end."""
    records, failures = _latest(FinishedFolder(out, retries))
    _write_failures(FinishedFolder(out, shards), failures, set(records))


def is_finalized(out: Path, shards: int) -> bool:
    """Whether `note_finished` was told so many shards."""
    return _finished(out).get("shards") == shards


def reopen(out: Path) -> None:
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


UInt8 = npt.NDArray[np.uint8]
Record = Mapping[str, Any]

_LONG_SIDE = 640  # of the images that are read for the page


def write_page(
    job: Job, manifest: Manifest, snapshot: Snapshot, shard_size: int, run: Record, report_images: int
) -> None:
    """Write the page and its pictures; an image that cannot be read any more has none.

    Masks are taken from the sinks "masks" or "tar"; with others alone the page has figures only.
    """
    with ExitStack() as stack:
        source = stack.enter_context(job.open_source())
        pictures = _Pictures(job, snapshot, shard_size, source)
        write_report(
            job.out,
            ReportData(
                manifest,
                run,
                records=_lines(job.out / LABELS_FILE),
                failures=_lines(job.out / FAILED_FILE),
                read_image=pictures.image,
                read_mask=pictures.mask,
            ),
            report_images=report_images if {"masks", "tar"} & set(job.writers) else 0,
        )


def remove_page(out: Path) -> None:
    """Remove the page of a run and its pictures. Raises UsageError where OUT/report is not the page's own."""
    (out / REPORT_PAGE).unlink(missing_ok=True)
    clear_pictures(out)
    folder = out / REPORT_FOLDER
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class _Pictures:
    """What the page shows of an image, by its record."""

    def __init__(self, job: Job, snapshot: Snapshot, shard_size: int, source: Source) -> None:
        self._job, self._snapshot, self._shard_size, self._source = job, snapshot, shard_size, source

    def image(self, record: Record) -> UInt8 | None:
        """uint8 [H, W, 3], upright, perhaps smaller than it is; None when it cannot be had any more."""
        work = self._snapshot.work(int(record["index"]))
        try:
            data = self._source.read(work.item)
            return decode_image(data, max_pixels=self._job.max_pixels, long_side=_LONG_SIDE).rgb
        except ImageError:
            return None

    def mask(self, record: Record) -> UInt8:
        """uint8 [H, W] of the image's own size."""
        index = int(record["index"])
        name = self._snapshot.work(index).name
        if "masks" in self._job.writers:
            return read_mask(self._job.out / "masks" / f"{name}.png", max_pixels=self._job.max_pixels)
        shard = self._snapshot.shard_of(index, self._shard_size)
        with tarfile.open(self._job.out / shard_path("shards", shard, "tar")) as members:
            member = members.extractfile(f"{tar_key(name)}.png")
            assert member is not None  # it is what this run has written
            return decode_mask(member.read(), max_pixels=self._job.max_pixels)


def _lines(path: Path) -> Iterator[Record]:
    if path.is_file():
        with path.open("rb") as lines:
            yield from map(json.loads, lines)
