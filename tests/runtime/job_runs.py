"""Runs as the command line makes them, and what they leave, for the tests of runs."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle, LabelMethod
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import Job, RunOptions, make_job


def run_label(source: Path, out: Path, bundle: Bundle, **options: Any) -> RunSummary:
    """`multisa label` without its last lines. options: labels, method, min_area, request, those of RunOptions."""
    return _run("label", source, out, bundle, **options)


def run_segment(source: Path, out: Path, bundle: Bundle, **options: Any) -> RunSummary:
    """`multisa segment` without its last lines. options: min_area, request, and those of RunOptions."""
    return _run("segment", source, out, bundle, **options)


def job_of(source: Path, out: Path, bundle: Bundle, **options: Any) -> Job:
    """What a worker that segments is given."""
    return make_job("segment", str(source), out, bundle.path, BackendRequest(), RunOptions(**options))


def write_noise(folder: Path, images: int) -> Path:
    """Images of noise in three sizes, the fourth of every ten broken."""
    folder.mkdir()
    for i in range(images):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64 + 8 * (i % 3), 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
        if i % 10 == 4:
            (folder / f"{i:02d}.png").write_bytes(b"no image")
    return folder


def records(out: Path, name: str = "labels.jsonl") -> list[dict[str, Any]]:
    """The lines of one of the files of a run; none where it is not there."""
    path = out / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def reasons(out: Path) -> dict[str, str]:
    """Why each image failed."""
    return {row["image"]: row["reason"] for row in records(out, "failed.jsonl")}


def public_bytes(out: Path) -> dict[str, bytes]:
    """Every file that must not differ between two runs."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    private = (".multisa", "report.html", "report")
    return {path.as_posix(): (out / path).read_bytes() for path in files if path.parts[0] not in private}


def cut_at(monkeypatch: pytest.MonkeyPatch, shards: int, *, before: bool) -> None:
    """Let a run be cut when so many more shards are committed; before, or after, the line of the next one."""
    append, numbers = Journal.append, itertools.count()

    def cut(journal: Journal, result: ShardResult) -> None:
        last = next(numbers) >= shards
        if not (last and before):
            append(journal, result)
        if last:
            raise InterruptedError("cut by the test")

    monkeypatch.setattr(Journal, "append", cut)


def _run(
    command: str,
    source: Path,
    out: Path,
    bundle: Bundle,
    *,
    labels: Path | None = None,
    request: BackendRequest | None = None,
    method: LabelMethod | None = None,
    min_area: float | None = None,
    **options: Any,
) -> RunSummary:
    chosen = RunOptions(**options)
    request = request or BackendRequest()
    job = make_job(command, str(source), out, bundle.path, request, chosen, method=method, min_area=min_area)
    return run(job, chosen, LocalExecutor, labels=labels)
