"""The whole suite: the stages one after the other, what each found written at once."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multisa.benchmarks import labelling, segmenting
from multisa.benchmarks.report import cut_texts
from multisa.benchmarks.report.schema import SCHEMA_VERSION
from multisa.benchmarks.suite import kernel_rows
from multisa.benchmarks.suite.contender import contenders
from multisa.benchmarks.suite.machine import describe_run
from multisa.benchmarks.suite.setting import Setting, make_setting
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.errors import Interrupted, UsageError
from multisa.runtime.files import write_json_atomically

BENCH_FILE = "bench.json"
MEASURES: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
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
    stages: Sequence[str] = tuple(MEASURES)
    engines: Sequence[str] = ()  # all
    plans: Path | None = None
    quick: bool = False


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the processes and remove the scratch folder, as Ctrl-C does; in the main thread."""

    def stop(number: int, _: object) -> None:
        raise Interrupted("ended by SIGTERM; the stages that were done are in the report", signal=number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_suite(
    request: BenchRequest, report: Callable[[dict[str, Any]], object] = lambda bench: None
) -> dict[str, Any]:
    """Measure the stages asked for; after each, OUT/bench.json is written and `report` called.

    Raises UsageError for a stage, an engine or a data set that does not exist or fit.
    """
    unknown = [name for name in request.stages if name not in MEASURES]
    if unknown or not request.stages:
        raise UsageError(f"got the stages {list(request.stages)}, expected some of {', '.join(MEASURES)}")
    start, started = time.monotonic(), datetime.now(UTC)
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="multisa-bench-") as scratch:
        setting = make_setting(
            request.bundle,
            request.data,
            Path(scratch),
            engines=tuple(request.engines),
            plans=request.plans,
            quick=request.quick,
        )
        contenders(setting.bundle, SEGMENTER, setting.engines, gpu=False)  # whether they exist
        request.out.mkdir(parents=True, exist_ok=True)
        bench: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": {
                **describe_run(setting),
                "started": started.isoformat(timespec="seconds").replace("+00:00", "Z"),
            },
        }
        for name in (name for name in MEASURES if name in request.stages):
            bench[name] = MEASURES[name](setting)
            bench["environment"]["seconds"] = round(time.monotonic() - start, 1)
            write_json_atomically(request.out / BENCH_FILE, cut_texts(bench))
            report(bench)
    return bench
