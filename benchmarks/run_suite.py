"""The whole suite: the stages one after the other, bench.json written after each."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multisa.benchmarks import kernels, labelling, segmenting
from multisa.benchmarks.bench_file import SCHEMA_VERSION
from multisa.benchmarks.suite.candidates import Row, list_candidates
from multisa.benchmarks.suite.context import BenchContext, BenchRequest, make_context
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.errors import Interrupted, UsageError
from multisa.runtime.files import write_json_atomically


def run_suite(
    request: BenchRequest,
    output: Path,
    stages: Sequence[str],
    report: Callable[[dict[str, Any]], object] = lambda bench: None,
) -> dict[str, Any]:
    """Measure `stages`; after each, write OUTPUT/bench.json and call `report`.

    Raises UsageError for a stage, backend or data set that does not exist or fit.
    """
    unknown = [name for name in stages if name not in MEASURES]
    if unknown or not stages:
        raise UsageError(f"got the stages {list(stages)}, expected some of {', '.join(MEASURES)}")
    start = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    with _interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="multisa-bench-") as scratch:
        context = make_context(request, Path(scratch))
        list_candidates(context.bundle, SEGMENTER, context.backends, gpu=False)  # refuses unknown names now
        output.mkdir(parents=True, exist_ok=True)
        described = {**context.describe(), "started": started}
        bench: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "environment": described}
        for name in (name for name in MEASURES if name in stages):
            bench[name] = MEASURES[name](context)
            described["seconds"] = round(time.monotonic() - start, 1)
            write_json_atomically(output / "bench.json", bench)
            report(bench)
    return bench


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends worker processes and removes the scratch folder, as Ctrl-C does; in the main thread."""

    def stop(number: int, _: object) -> None:
        raise Interrupted("stopped by SIGTERM; finished stages are in the report", signal=number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


MEASURES: dict[str, Callable[[BenchContext], list[Row]]] = {
    "segment": segmenting.measure,
    "label": labelling.measure,
    "kernels": lambda context: kernels.measure(quick=context.effort.is_quick),
}
