"""The end of a run: files that cover all shards, made from the parts of the shards, and the report."""

import heapq
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.files import read_json_object, write_json_atomically
from multisa.runtime.imaging.decode import decode_image, decode_mask, read_mask
from multisa.runtime.jobs.fingerprint import read_fingerprint, run_key
from multisa.runtime.jobs.shards import PRIVATE, CommittedShards, leads_elsewhere, path_below
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.worker import FAILURES, RECORDS
from multisa.runtime.report.report import FOLDER, PAGE, ReportData, clear_pictures, write_report
from multisa.runtime.report.summary import MIN_SHARE, group_failures
from multisa.runtime.sources.base import Source
from multisa.runtime.writers.base import Writer, shard_path, tar_key

LABELS_FILE = "labels.jsonl"
FAILED_FILE = "failed.jsonl"
FINALIZED = f"{PRIVATE}/finished.json"

UInt8 = npt.NDArray[np.uint8]
Record = Mapping[str, Any]

_LONG_SIDE = 640  # pixels of the images that are read for the report


def finalize_files(
    output: Path, writers: Sequence[Writer], shards: Sequence[int], retries: Sequence[int], classes: Sequence[str]
) -> None:
    """Write labels.jsonl, failed.jsonl (if an image failed) and what the writers have for the whole run.

    shards, retries: numbers of the committed shards, in order. The last retry of an image counts. classes: of
    the foreground, to count the images that show each of them.
    """
    first = CommittedShards(output, shards)
    records, failures = _latest(CommittedShards(output, retries))
    first.write(LABELS_FILE, _merge(first.parts(RECORDS), records, set()))
    _write_failures(first, failures, set(records))
    everything = CommittedShards(output, (*shards, *retries))
    for writer in writers:
        writer.finalize(everything, len(shards) + len(retries))
    counts = dict.fromkeys(classes, 0)
    notes: dict[str, int] = {}
    for record in _read_lines(output / LABELS_FILE):
        for name, share in record["pixel_shares"].items():
            if share >= MIN_SHARE and name in counts:
                counts[name] += 1
        for note in record.get("notes", ()):
            notes[note] = notes.get(note, 0) + 1
    files = [*first.written, *everything.written]
    write_json_atomically(output / FINALIZED, {"files": files, "images_per_class": counts, "notes": notes})


def record_finalized(output: Path, **values: int) -> None:
    """Note that files and record cover so many `shards`, or that the report has so many `report_images`."""
    write_json_atomically(output / FINALIZED, {**read_json_object(output / FINALIZED), **values})


def is_report_written(output: Path, report_images: int) -> bool:
    """Whether there is a report of the current files, with so many images."""
    return read_json_object(output / FINALIZED).get("report_images") == report_images and (output / PAGE).is_file()


def is_finalized(output: Path, shards: int) -> bool:
    """Whether files and record cover so many shards."""
    return read_json_object(output / FINALIZED).get("shards") == shards


def reopen(output: Path) -> None:
    """Note that there is more to do."""
    (output / FINALIZED).unlink(missing_ok=True)


def finalized_files(output: Path) -> list[str]:
    """Paths below OUT of the files that cover the whole run."""
    files = read_json_object(output / FINALIZED).get("files")
    written = [str(file) for file in files] if isinstance(files, list) else []
    return [*written, LABELS_FILE, FAILED_FILE]


def write_failures(output: Path, shards: Sequence[int], retries: Sequence[int]) -> None:
    """Write failed.jsonl for the committed shards, for a run that stops before its end."""
    records, failures = _latest(CommittedShards(output, retries))
    _write_failures(CommittedShards(output, shards), failures, set(records))


def failure_reasons(output: Path) -> dict[str, int]:
    """Number of failed images for each reason, the most frequent first."""
    groups = group_failures(_read_lines(output / FAILED_FILE), 1)
    return {reason: group.count for reason, group in groups.items()}


def finalized_counts(output: Path, what: str) -> dict[str, int]:
    """Number of images by foreground class that they show, or by note, as `finalize_files` has counted them.

    what: "images_per_class" or "notes".
    """
    counts = read_json_object(output / FINALIZED).get(what)
    return counts if isinstance(counts, dict) else {}


def failed_indices(output: Path, shards: Sequence[int], retries: Sequence[int]) -> list[int]:
    """Indices of the images that failed when they were tried last, in order."""
    records, failures = _latest(CommittedShards(output, retries))
    merged = _merge(CommittedShards(output, shards).parts(FAILURES), failures, set(records))
    return [_index(line) for lines in merged for line in lines.splitlines()]


def _write_failures(first: CommittedShards, retried: dict[int, bytes], done: set[int]) -> None:
    if any(_merge(first.parts(FAILURES), retried, done)):
        first.write(FAILED_FILE, _merge(first.parts(FAILURES), retried, done))
    else:
        (first.output / FAILED_FILE).unlink(missing_ok=True)


def _latest(retries: CommittedShards) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Of the images that were retried: the records of those done, the failures of the others, by index."""
    done: dict[int, bytes] = {}
    failed: dict[int, bytes] = {}
    for records, failures in zip(retries.parts(RECORDS), retries.parts(FAILURES), strict=True):
        for line in failures.splitlines(keepends=True):
            failed[_index(line)] = line
        for line in records.splitlines(keepends=True):
            done[_index(line)] = line
            failed.pop(_index(line), None)
    return done, failed


def _merge(parts: Iterator[bytes], retried: dict[int, bytes], done: set[int]) -> Iterator[bytes]:
    """Lines in the order of the images, one or more at a time: `retried` replaces, `done` leaves out."""
    if not retried and not done:
        yield from (part for part in parts if part)
        return
    lines = (line for part in parts for line in part.splitlines(keepends=True))
    kept = ((_index(line), line) for line in lines)
    others = ((index, line) for index, line in kept if index not in retried and index not in done)
    yield from (line for _, line in heapq.merge(others, sorted(retried.items())))


def _index(line: bytes) -> int:
    return int(json.loads(line)["index"])


def _read_lines(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines; nothing if it does not exist."""
    if path.is_file():
        with path.open("rb") as lines:
            yield from map(json.loads, lines)


def write_run_report(
    job: Job, manifest: Manifest, snapshot: Snapshot, shard_size: int, record: Record, report_images: int
) -> None:
    """Write the report and its pictures; an image that can no longer be read has none.

    Masks are read from the files of the writers "masks" or "tar"; without either the report has only figures.
    """
    with job.open_source() as source:
        masks = RunMasks(job.output, job.writers, snapshot, shard_size, job.max_pixels)
        pictures = _Pictures(job, snapshot, masks, source)
        write_report(
            job.output,
            ReportData(
                manifest,
                record,
                records=_read_lines(job.output / LABELS_FILE),
                failures=_read_lines(job.output / FAILED_FILE),
                read_image=pictures.image,
                read_mask=pictures.mask,
                run_key=run_key(read_fingerprint(job.output) or {}, snapshot),
            ),
            report_images=report_images if {"masks", "tar"} & set(job.writers) else 0,
        )


def remove_report(output: Path) -> None:
    """Remove the report of a run and its pictures. Raises UsageError if OUT/report is another folder."""
    (output / PAGE).unlink(missing_ok=True)
    clear_pictures(output)
    folder = output / FOLDER
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True)
class _Pictures:
    """Reads what the report shows of an image, by its record."""

    job: Job
    snapshot: Snapshot
    masks: "RunMasks"
    source: Source

    def image(self, record: Record) -> UInt8 | None:
        """uint8 [H, W, 3], upright, perhaps smaller than the image; None if it can no longer be read."""
        sample = self.snapshot.sample(int(record["index"]))
        try:
            data = self.source.read(sample.item)
            return decode_image(data, max_pixels=self.job.max_pixels, long_side=_LONG_SIDE).rgb
        except ImageError:
            return None

    def mask(self, record: Record) -> UInt8:
        """Class ids, uint8 [H, W], at the image's own size."""
        return self.masks.read(int(record["index"]))[1]


@dataclass(frozen=True)
class RunMasks:
    """Reads the masks that a run has written in the format "masks" or "tar"."""

    output: Path
    writers: tuple[str, ...]
    snapshot: Snapshot
    shard_size: int
    max_pixels: int

    def read(self, index: int) -> tuple[str, UInt8]:
        """The name of an image's results, and its class ids, uint8 [H, W], at its own size.

        Raises ImageError for a mask that cannot be read, UsageError for a path that leads out of the output folder.
        """
        name = self.snapshot.sample(index).name
        try:
            path = path_below(self.output, f"masks/{name}.png")
        except ValueError as error:
            raise UsageError(f"{self.output}: {error}; the list of its images was altered") from error
        if "masks" in self.writers:
            if leads_elsewhere(self.output, path.parent) or path.is_symlink():
                raise UsageError(f"{path}: leads out of {self.output}, expected a mask of the run: remove the link")
            return name, read_mask(path, max_pixels=self.max_pixels)
        shard = self.snapshot.shard_of(index, self.shard_size)
        with tarfile.open(self.output / shard_path("shards", shard, "tar")) as archive:
            file = archive.extractfile(f"{tar_key(name)}.png")
            assert file is not None  # this run has written it
            return name, decode_mask(file.read(), max_pixels=self.max_pixels)
