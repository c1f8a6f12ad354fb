"""What a run reports: a summary for its caller and for people, and OUT/.multisa/run.json for later."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.files import sha256_of_file, write_json_atomically
from multisa.runtime.jobs.finalize import FAILED_FILE, LABELS_FILE
from multisa.runtime.jobs.output import RUN
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency
from multisa.runtime.jobs.worker import Executor
from multisa.runtime.predict.prediction import DECIMALS
from multisa.runtime.progress import format_examples, pluralize
from multisa.runtime.report.report import PAGE
from multisa.runtime.report.summary import RunFigures, StageTime, describe_run
from multisa.runtime.sources.registry import SEVERAL
from multisa.runtime.writers.registry import writer_folder

_CLASSES_SHOWN = 10  # in the summary; the report has all of them
_SKIPPED_SHOWN = 1000  # skipped entries of the source that the record lists


@dataclass(frozen=True)
class RunSummary:
    """What a run has done: in total, and in this session, which is one call of `run` of perhaps many."""

    images: int  # of the run
    done: int  # images that have a mask, in total
    failures: int  # images that were tried and failed, in total
    done_now: int  # images that got their mask in this session
    seconds: float  # duration of this session
    stage_seconds: Mapping[str, float]  # of work by stage, summed over the threads, in this session
    job: Job  # `job.output` is the folder with the results
    concurrency: Concurrency  # threads and cores of all worker processes
    skipped: int  # entries of the source that are not images or cannot be read
    failure_kinds: Mapping[str, int]  # failures of this session by the kind of Failure
    reasons: Mapping[str, int]  # failed images by reason, in total
    images_per_class: Mapping[str, int]  # images that show a class, by foreground class, in total
    notes: Mapping[str, int]  # images by what was done to their pixels, such as a scaling to 8 bits, in total

    @property
    def images_per_second(self) -> float:
        """Images done per second of this session."""
        return self.done_now / self.seconds if self.seconds else 0.0


def describe_summary(summary: RunSummary, *, report_images: int, quiet: bool = False) -> str:
    """The run in lines of text: speed, failures, classes found, and last the one path to open.

    quiet: without where the time went and without the path to open.
    """
    job = summary.job
    stages = () if quiet else summary.stage_seconds.items()
    figures = RunFigures(
        command=job.command,
        done=summary.done_now,
        failed=summary.failures,
        seconds=summary.seconds,
        stages=tuple(StageTime(name, busy, summary.concurrency.threads_of(name)) for name, busy in stages),
        kept=summary.done - summary.done_now,
        skipped=summary.skipped,
        cores=summary.concurrency.cores,
        reasons=summary.reasons,
    )
    lines = [describe_run(figures)]
    if summary.failures:
        lines.append(f"failures: {job.output / FAILED_FILE} (--retry-failed tries them again)")
    lines.append(_describe_classes(summary.images_per_class))
    if summary.notes:
        notes = [f"{note} ({pluralize(count, 'image')})" for note, count in summary.notes.items()]
        lines.append(f"notes: {format_examples(notes)}; see {job.output / LABELS_FILE}")
    folder = "masks" if "masks" in job.writers else writer_folder(job.writers[0])
    if not quiet:
        lines.append(f"open {job.output / (PAGE if report_images else folder)}")
    return "\n".join(lines)


def _describe_classes(images_per_class: Mapping[str, int]) -> str:
    """In words: "found: dog in 3 images, cat in 1"."""
    found = sorted(((-count, name) for name, count in images_per_class.items() if count))
    if not found:
        return "found: no class in any image"
    shown = [f"{name} in {pluralize(-count, 'image')}" for count, name in found[:_CLASSES_SHOWN]]
    if len(found) > _CLASSES_SHOWN:
        shown.append(f"and {len(found) - _CLASSES_SHOWN} more classes")
    return f"found: {', '.join(shown)}"


def run_record(
    job: Job, bundle: Bundle, summary: RunSummary, snapshot: Snapshot, executor: Executor, started: str
) -> dict[str, Any]:
    """The record of a finished run, as JSON values."""
    fingerprint = executor.fingerprint()
    versions = {key.removeprefix("version of "): v for key, v in fingerprint.items() if "version of" in key}
    skipped = list(snapshot.skipped_entries(_SKIPPED_SHOWN))
    concurrency = summary.concurrency
    return {
        "command": job.command,
        "started": started,
        "source": without_secrets(job.source),
        "images": summary.done_now,
        "kept": summary.done - summary.done_now,
        "failures": summary.failures,
        "failure_kinds": summary.failure_kinds,
        "skipped": snapshot.skipped,
        "skipped_entries": [f"{entry.id}: {entry.reason}" for entry in skipped],
        "seconds": round(summary.seconds, 3),
        "images_per_second": round(summary.images_per_second, 3),
        "stage_seconds": {name: round(s, DECIMALS) for name, s in sorted(summary.stage_seconds.items())},
        "workers": concurrency.workers,
        "stage_workers": {name: concurrency.threads_of(name) for name in sorted(summary.stage_seconds)},
        "cores": concurrency.cores,
        "bundle": {"name": bundle.manifest.name, "sha256": sha256_of_file(bundle.path / MANIFEST_NAME)},
        "label_method": fingerprint["label method"],
        "min_area": fingerprint["min area"],
        "backends": executor.backends(),
        "versions": {"python": platform.python_version(), **versions},
    }


_QUERY = re.compile(r"[?#].*", re.DOTALL)
_USER = re.compile(r"://(?:[^/@:]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@)")


def without_secrets(source: str) -> str:
    """A source as it may be stored: a URL without query and user, which contain signatures and keys.

    A key may contain slashes: if the first colon does not begin a port, everything up to the first @ is
    removed.
    """
    if SEVERAL in source:
        return format_examples(source.split(SEVERAL))
    if "://" not in source:
        return source
    return _USER.sub("://", _QUERY.sub("", source))


def write_record(job: Job, record: dict[str, Any]) -> None:
    """Store a record."""
    write_json_atomically(job.output / RUN, record)
