"""OUT/.multisa/run.json: what the last sitting did, for programs and for people who look later."""

import json
import platform
import re
from typing import Any

from multisa.runtime.bulk.crew import Crew
from multisa.runtime.bulk.folder import RUN
from multisa.runtime.bulk.inventory import Inventory
from multisa.runtime.bulk.job import Job
from multisa.runtime.bulk.method import DECIMALS
from multisa.runtime.bulk.summary import RunSummary
from multisa.runtime.bundle import Bundle
from multisa.runtime.files import sha256_of_file, write_json_atomically
from multisa.runtime.manifest import MANIFEST_NAME

_QUERY = re.compile(r"[?#].*", re.DOTALL)
_USER = re.compile(r"://(?:[^/@:]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@)")
_PASSED_OVER = 1000  # entries of the source that the record names


def run_record(
    job: Job, bundle: Bundle, summary: RunSummary, inventory: Inventory, crew: Crew, started: str
) -> dict[str, Any]:
    """The record of a run that has ended."""
    identity = crew.identity()
    versions = {key.removeprefix("version of "): v for key, v in identity.items() if "version of" in key}
    passed_over = inventory.entries_passed_over(_PASSED_OVER)
    return {
        "command": job.command,
        "started": started,
        "source": without_secrets(job.source),
        "images": summary.done_now,
        "kept": summary.done - summary.done_now,
        "failures": summary.failures,
        "failure_kinds": summary.failure_kinds,
        "passed_over": inventory.passed_over,
        "skipped": [f"{entry.id}: {entry.reason}" for entry in passed_over],
        "seconds": round(summary.seconds, 3),
        "images_per_second": round(summary.images_per_second, 3),
        "stage_seconds": {name: round(s, DECIMALS) for name, s in sorted(summary.stage_seconds.items())},
        "workers": summary.width.workers,
        "stage_workers": {name: summary.width.threads_of(name) for name in sorted(summary.stage_seconds)},
        "cores": summary.width.cores,
        "bundle": {"name": bundle.manifest.name, "sha256": sha256_of_file(bundle.path / MANIFEST_NAME)},
        "engines": crew.engines(),
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
