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

from multisa.benchmarks import labelling, segmenting
from multisa.benchmarks.bench_file import SCHEMA_VERSION
from multisa.benchmarks.harness import peaks
from multisa.benchmarks.suite.candidates import list_candidates
from multisa.benchmarks.suite.context import BenchContext, BenchRequest, make_context
from multisa.benchmarks.worker_process import INSTALL
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.errors import Interrupted, UsageError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.progress import Progress, log

Row = dict[str, Any]
BENCH_FILE = "bench.json"
OURS = "multisa"


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
            write_json_atomically(output / BENCH_FILE, bench)
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


def measure_kernels(context: BenchContext) -> list[Row]:
    """Rows of the random walk and the dense CRF, ours and the literature's.

    A kernel whose packages are missing is one row with the reason as "problem".
    """
    machine = peaks()
    rows: list[Row] = []
    kernels = {"random walk": _walk, "dense CRF": _crf}
    with Progress(len(kernels), "kernels", "kernel") as bar:
        for name, kernel in kernels.items():
            try:
                for size, ways, limit in kernel(machine, context.effort.is_quick):
                    rows += [_row(name, size, way, ways, limit) for way in ways]
            except ImportError as error:  # SciPy or pydensecrf
                missing = f"{error.name} is not installed" if error.name else str(error)
                rows.append({"kernel": name, "way": "", "problem": f"{missing}: {INSTALL}"})
                log.info(f"{name}: skipped: {missing}: {INSTALL}")
            bar.advance()
    return rows


def _walk(machine: dict[str, float], quick: bool) -> Iterator[tuple[str, Row, Row]]:
    from multisa.benchmarks import random_walk

    for compared in random_walk.comparisons(quick=quick, machine=machine):
        size = f"{compared['size']}x{compared['size']}, {compared['channels']} channels"
        yield size, compared["ways"], compared["roofline"]["binding"]


def _crf(machine: dict[str, float], quick: bool) -> Iterator[tuple[str, Row, Row]]:
    from multisa.benchmarks import dense_crf

    for compared in dense_crf.comparisons(quick=quick, machine=machine):
        shape = f"{dense_crf.WIDTH}x{dense_crf.HEIGHT}, {compared['parameters']}"
        limit = {
            "roofline_ms": compared["roofline"]["roofline_ms"],
            "share": compared["roofline"]["share_of_roofline"],
            "text": "bytes of the lattice read once per iteration, over the measured bandwidth of a copy",
        }
        yield f"{shape}, {compared['labels']} labels, {compared['present']} present", compared["ways"], limit


def _row(kernel: str, size: str, way: str, ways: Row, limit: Row) -> Row:
    return {
        "kernel": kernel,
        "way": way,
        "size": size,
        "threads": "all" if way.startswith("dense squaring") else 1,
        "problem": None,
        **ways[way],
        "times_ours": round(ways[way]["median_ms"] / ways[OURS]["median_ms"], 3),
        "limit": limit if way == OURS else None,
    }


MEASURES: dict[str, Callable[[BenchContext], list[Row]]] = {
    "segment": segmenting.measure,
    "label": labelling.measure,
    "kernels": measure_kernels,
}
