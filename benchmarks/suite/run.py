"""The whole suite: the stages one after the other, what each found written at once."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multisa.benchmarks import labelling, segmenting
from multisa.benchmarks.suite import kernel_rows
from multisa.benchmarks.suite.machine import describe_run
from multisa.benchmarks.suite.setting import Setting, make_setting
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_json_atomically

SCHEMA_VERSION = 1
BENCH_FILE = "bench.json"
STAGES: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
    "segment": segmenting.measure,
    "label": labelling.measure,
    "kernels": kernel_rows.measure,
}


@dataclass(frozen=True)
class BenchRequest:
    """What `multisa bench` was asked for."""

    bundle: Path
    data: Path
    out: Path
    stages: Sequence[str] = tuple(STAGES)
    engines: Sequence[str] = ()  # all
    plans: Path | None = None
    quick: bool = False


def run_suite(request: BenchRequest) -> dict[str, Any]:
    """Measure the stages asked for; OUT/bench.json after each. Raises UsageError for what does not exist."""
    unknown = [name for name in request.stages if name not in STAGES]
    if unknown or not request.stages:
        raise UsageError(f"got the stages {list(request.stages)}, expected some of {', '.join(STAGES)}")
    start, started, load = time.monotonic(), datetime.now(UTC), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="multisa-bench-") as scratch:
        setting = make_setting(
            request.bundle,
            request.data,
            Path(scratch),
            engines=tuple(request.engines),
            plans=request.plans,
            quick=request.quick,
        )
        request.out.mkdir(parents=True, exist_ok=True)
        bench: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": {
                **describe_run(setting, request.quick, load),
                "started": started.isoformat(timespec="seconds").replace("+00:00", "Z"),
            },
        }
        for name in (name for name in STAGES if name in request.stages):
            bench[name] = STAGES[name](setting)
            bench["environment"]["seconds"] = round(time.monotonic() - start, 1)
            write_json_atomically(request.out / BENCH_FILE, bench)
    return bench
