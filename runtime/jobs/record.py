"""OUT/.multisa/run.json: what the last sitting did, for programs and for people who look later."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.files import sha256_of_file, write_json_atomically
from multisa.runtime.jobs.executor import Executor
from multisa.runtime.jobs.finalize import FAILED_FILE, LABELS_FILE
from multisa.runtime.jobs.output import REPORT_PAGE, RUN
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency
from multisa.runtime.predict.prediction import DECIMALS
from multisa.runtime.report.summary import RunFigures, StageTime, describe_run
from multisa.runtime.writers.registry import writer_folder


@dataclass(frozen=True)
class RunSummary:
    """Counts of all sittings; seconds of this one."""

    images: int  # in the inventory
    done: int  # with a mask
    failures: int  # tried, and not done
    done_now: int  # in this sitting
    seconds: float
    stage_seconds: Mapping[str, float]  # of this sitting, summed over the threads
    job: Job
    width: Concurrency  # of all who did shards
    skipped: int  # entries of the source that were passed over
    failure_kinds: Mapping[str, int]  # of this sitting
    reasons: Mapping[str, int]  # images by reason, of all that have failed

    @property
    def images_per_second(self) -> float:
        """How many images were done in a second of this sitting."""
        return self.done_now / self.seconds if self.seconds else 0.0


def describe_summary(summary: RunSummary, *, report_images: int) -> str:
    """The run in lines of text: what was done, which stage is the limit, what failed, where to look."""
    job, out = summary.job, summary.job.out
    looks = [f"{out / writer_folder(writer)}" for writer in job.writers] + [str(out / LABELS_FILE)]
    if summary.failures:
        looks.append(f"{out / FAILED_FILE}: the failures (--retry-failed tries them again)")
    if report_images:
        looks.append(f"{out / REPORT_PAGE}: the most uncertain first")
    stages = summary.stage_seconds.items()
    return describe_run(
        RunFigures(
            command=job.command,
            done=summary.done_now,
            failed=summary.failures,
            seconds=summary.seconds,
            stages=tuple(StageTime(name, busy, summary.width.threads_of(name)) for name, busy in stages),
            kept=summary.done - summary.done_now,
            skipped=summary.skipped,
            cores=summary.width.cores,
            reasons=summary.reasons,
            look_at=tuple(looks),
        )
    )


_QUERY = re.compile(r"[?#].*", re.DOTALL)
_USER = re.compile(r"://(?:[^/@:]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@)")
_PASSED_OVER = 1000  # entries of the source that the record names


def run_record(
    job: Job, bundle: Bundle, summary: RunSummary, snapshot: Snapshot, executor: Executor, started: str
) -> dict[str, Any]:
    """The record of a run that has ended."""
    identity = executor.identity()
    versions = {key.removeprefix("version of "): v for key, v in identity.items() if "version of" in key}
    skipped = snapshot.skipped_entries(_PASSED_OVER)
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
        "workers": summary.width.workers,
        "stage_workers": {name: summary.width.threads_of(name) for name in sorted(summary.stage_seconds)},
        "cores": summary.width.cores,
        "bundle": {"name": bundle.manifest.name, "sha256": sha256_of_file(bundle.path / MANIFEST_NAME)},
        "backends": executor.backends(),
        "versions": {"python": platform.python_version(), **versions},
    }


def without_secrets(source: str) -> str:
    """A source as it may be kept: of a URL neither query nor user, which hold signatures and keys.

    A key may hold slashes: all up to the first @ goes where a colon comes first that begins no port.
    """
    if "://" not in source:
        return source
    return _USER.sub("://", _QUERY.sub("", source))


def read_record(job: Job) -> dict[str, Any]:
    """What was kept; empty where there is none that can be read."""
    try:
        value = json.loads((job.out / RUN).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_record(job: Job, record: dict[str, Any]) -> None:
    """Keep it."""
    write_json_atomically(job.out / RUN, record)
