"""Segmenting with every backend and with PyTorch: latency, throughput, masks, memory, start-up.

    python benchmarks/segmenting.py --data VOC_LAYOUT [--quick] [--backends onnxruntime-cpu,pytorch-eager]

Each candidate has its own process. They run alternately on the same images, so that a busy machine slows them
all down alike. Writes benchmarks/results/segmenting.json; the same as `multisa bench --stages segment`.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from multisa.benchmarks.harness import median_ratio
from multisa.benchmarks.suite.candidates import (
    COMPILED,
    REFERENCE,
    Candidate,
    auto_candidate,
    baseline_of,
    list_candidates,
)
from multisa.benchmarks.suite.context import BenchContext, stage_main
from multisa.benchmarks.suite.images import of_one_size, read_working, settle, spread
from multisa.benchmarks.suite.roofline import mean_roofline
from multisa.benchmarks.suite.segment_candidate import SegmentCandidate
from multisa.benchmarks.worker_process import WorkerFailedError, WorkerProcess
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.progress import Progress, log
from multisa.runtime.system import usable_cpus

Row = dict[str, Any]


@dataclass(eq=False)
class _Measured:
    """A running candidate and its measurements so far."""

    candidate: Candidate
    worker: WorkerProcess
    row: Row
    latency_rounds: list[list[float]] = field(default_factory=list)  # seconds of single images
    rates: list[float] = field(default_factory=list)  # images per second from file to file, one per round
    loop_rates: list[float] = field(default_factory=list)  # the same in a plain loop

    @property
    def seconds(self) -> list[float]:
        return [seconds for each in self.latency_rounds for seconds in each]


def measure(context: BenchContext) -> list[Row]:
    """One row per candidate; candidates that cannot run here have the reason as "problem"."""
    listed = list_candidates(context.bundle, SEGMENTER, context.backends, gpu=bool(probe_gpus().gpus))
    default = auto_candidate(context.bundle.path, SEGMENTER.name, context.engine_cache)
    rows: list[Row] = []
    with ExitStack() as stack:
        measured = []
        for candidate in listed:
            row = candidate.row(is_default=candidate == default)
            rows.append(row)
            try:
                opened = _arguments(context, candidate)
                worker = stack.enter_context(WorkerProcess.started_twice(*opened))
            except WorkerFailedError as error:
                row["problem"] = str(error)
                log.info(f"{candidate.title}: skipped: {error}")
                continue
            row["startup_seconds"] = round(worker.start_seconds, 3)
            measured.append(_Measured(candidate, worker, row))
        Segmenter(context, measured).measure()
    return rows


def _arguments(context: BenchContext, candidate: Candidate) -> tuple[Any, ...]:
    """Arguments of the candidate's WorkerProcess. Raises WorkerFailedError for a skipped candidate."""
    if not candidate.is_ours and context.pytorch_problem:
        raise WorkerFailedError(context.pytorch_problem)
    if candidate.backend == COMPILED and context.effort.is_quick and COMPILED not in context.backends:
        raise WorkerFailedError(
            f"compiles for minutes: skipped in a quick run unless --backends names {COMPILED}"
        )
    first = context.val[0].path
    return SegmentCandidate, context.bundle.path, candidate, context.engine_cache, first, context.weights


class Segmenter:
    """The steps of the measurement; in each step the candidates run alternately."""

    def __init__(self, context: BenchContext, measured: list[_Measured]) -> None:
        self._context = context
        self._effort = context.effort
        self._measured = measured
        self._files = [image.path for image in spread(context.val, self._effort.latency_images)]

    def measure(self) -> None:
        """Fill the rows.

        A candidate that fails at a figure every row has is not measured further; its row has the reason as
        "problem". One that fails at a curve, for example with too large a batch, has it among its "notes".
        """
        steps: list[Callable[[_Measured], object]] = [self._warm_up]
        steps += [self._latency] * self._effort.latency_rounds
        steps += [self._memory, self._masks]
        steps += [self._end_to_end] * self._effort.end_to_end_rounds
        curves = [self._sizes, self._batches, self._cores]  # _cores last: it leaves one thread per image
        with Progress((len(steps) + len(curves)) * len(self._measured), "segmenting", "step") as bar:
            for step in (*steps, *curves):
                self._run(bar, step, is_curve=step in curves)
        self._summarise()

    def _run(self, bar: Progress, step: Callable[[_Measured], object], *, is_curve: bool) -> None:
        for each in self._measured:
            if each.row["problem"] is None:
                settle()
                try:
                    step(each)
                except WorkerFailedError as error:
                    name = step.__name__.strip("_").replace("_", " ")
                    log.info(f"{each.candidate.title}: {name}: {error}")
                    if is_curve:
                        each.row.setdefault("notes", []).append(f"{name}: {error}")
                    else:
                        each.row["problem"] = str(error)
            bar.advance()

    def _warm_up(self, each: _Measured) -> None:
        each.worker.call("load", self._files)
        each.worker.call("latencies")

    def _latency(self, each: _Measured) -> None:
        each.latency_rounds.append(each.worker.call("latencies"))

    def _memory(self, each: _Measured) -> None:
        each.row["peak_mib"] = {"host": each.worker.peak_mib, "device": each.worker.call("device_mib")}
        each.row["model_bytes"] = each.worker.call("model_bytes")

    def _masks(self, each: _Measured) -> None:
        images = spread(self._context.val, self._effort.masks)
        reference = self._context.scratch / "reference-labels"
        reference.mkdir(parents=True, exist_ok=True)
        first = self._measured[0]  # the reference, if it runs
        has_reference = first.candidate == REFERENCE and first.row["problem"] is None
        kept = reference if has_reference else None
        each.row |= each.worker.call("masks", images, kept, each.candidate == REFERENCE)
        each.row["images"] = len(images)

    def _sizes(self, each: _Measured) -> None:
        rows = []
        for side in self._effort.sides:
            image = self._context.val[0].path
            pixels, seconds = each.worker.call("at_side", image, side, self._effort.repeats)
            rows.append({"long_side": side, "pixels": pixels, "latency_ms": _ms(statistics.median(seconds))})
        each.row["sizes"] = rows

    def _batches(self, each: _Measured) -> None:
        rows = []
        for batch in self._effort.batches:
            files = (self._of_one_size * batch)[:batch]
            seconds = statistics.median(each.worker.call("batch", files, self._effort.repeats))
            rows.append({"batch": batch, "images_per_second": round(batch / seconds, 2)})
        each.row["batches"] = rows

    def _end_to_end(self, each: _Measured) -> None:
        images = spread(self._context.val, self._effort.end_to_end)
        out = self._context.scratch / "segmented"
        rate = each.worker.call("loop", [image.path for image in images], out / "loop")
        each.loop_rates.append(rate)
        if each.candidate.is_ours:
            record = self._context.run_on_images("segment", each.candidate, images, out / "command")
            rate = record["images_per_second"]
        each.rates.append(rate)

    def _cores(self, each: _Measured) -> None:
        cores = usable_cpus()
        rows = [
            {"cores": cores, "images_per_second": each.worker.call("images_per_second", self._effort.repeats)}
        ]
        # torch.compile would compile again for each number of cores, for minutes.
        only_all = each.candidate.device != "cpu" or each.candidate.backend == COMPILED
        for count in () if only_all else [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cores]:
            with WorkerProcess(*_arguments(self._context, each.candidate), cpus=count) as worker:
                worker.call("load", self._files)
                rate = worker.call("images_per_second", self._effort.repeats)
                rows.append({"cores": count, "images_per_second": rate})
        each.row["cores"] = sorted(rows, key=lambda row: int(row["cores"]))

    def _summarise(self) -> None:
        ran = [each for each in self._measured if each.row["problem"] is None]
        sizes = [read_working(path, self._context.long_side).shape[1:3] for path in self._files]
        roofline = mean_roofline(self._context, "segmenting", sizes)
        for each in ran:
            baseline = baseline_of(each.candidate, [other.candidate for other in ran])
            theirs = next(other for other in ran if other.candidate == baseline)
            speedup = statistics.median(theirs.seconds) / statistics.median(each.seconds)
            each.row |= {
                "baseline": each is theirs,
                "latency_ms": latency_figures(each.latency_rounds),
                "times_baseline": round(speedup, 3),
                "images_per_second": round(statistics.median(each.rates), 2),
                "end_to_end": {
                    "by": "multisa segment" if each.candidate.is_ours else "loop",
                    "images": min(self._effort.end_to_end, len(self._context.val)),
                    "images_per_second": [round(rate, 2) for rate in each.rates],
                    "times_baseline": median_ratio(each.rates, theirs.rates),
                },
                "loop": {
                    "images_per_second": [round(rate, 2) for rate in each.loop_rates],
                    "times_baseline": median_ratio(each.loop_rates, theirs.loop_rates),
                },
                "limit": roofline.limit(each.candidate, statistics.mean(each.seconds)),
            }

    @cached_property
    def _of_one_size(self) -> list[Path]:
        images = spread(self._context.val, 4 * max(self._effort.batches))
        return of_one_size(images, self._context.long_side)


def latency_figures(rounds: list[list[float]]) -> dict[str, Any]:
    """Milliseconds: percentiles over all images and rounds, and the median of each round.

    p99 is None for fewer than a hundred samples.
    """
    every = np.array([seconds for each in rounds for seconds in each])
    p50, p90, p99 = np.percentile(every, (50, 90, 99))
    return {
        "p50": _ms(p50),
        "p90": _ms(p90),
        "p99": _ms(p99) if len(every) >= 100 else None,
        "min": _ms(every.min()),
        "max": _ms(every.max()),
        "mean": _ms(every.mean()),
        "count": len(every),
        "repeats": [_ms(statistics.median(each)) for each in rounds],
    }


def _ms(seconds: float) -> float:
    return round(1000 * float(seconds), 3)


if __name__ == "__main__":
    stage_main("segmenting", __doc__, "segment", measure)
