"""Segmenting with every backend and with PyTorch: latency, throughput, masks, memory, start-up.

    multisa bench --data VOC_LAYOUT --stages segment -o DIR

Each candidate has its own process. They run alternately on the same images, so that a busy machine slows them
all down alike. Its bench.json is benchmarks/results/segmenting.json.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from multisa.benchmarks.harness import median_ratio
from multisa.benchmarks.suite.candidates import (
    COMPILED,
    REFERENCE,
    Candidate,
    Measured,
    Row,
    auto_candidate,
    baseline_of,
    list_candidates,
    run_alternately,
)
from multisa.benchmarks.suite.context import BenchContext, mean_roofline
from multisa.benchmarks.suite.images import read_working
from multisa.benchmarks.suite.segment_candidate import SegmentCandidate
from multisa.benchmarks.worker_process import WorkerProcess
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.progress import Progress
from multisa.runtime.system import usable_cpus
from multisa.training.data import spread


@dataclass(eq=False)
class _Measured(Measured):
    """A candidate and its measurements so far; `rates` are from file to file."""

    latency_rounds: list[list[float]] = field(default_factory=list)  # seconds of single images
    loop_rates: list[float] = field(default_factory=list)  # images per second in a plain loop

    def call(self, name: str, *arguments: object) -> Any:
        assert self.worker is not None
        return self.worker.call(name, *arguments)

    @property
    def seconds(self) -> list[float]:
        return [seconds for each in self.latency_rounds for seconds in each]


def measure(context: BenchContext) -> list[Row]:
    """One row per candidate; candidates that cannot run here have the reason as "problem"."""
    listed = list_candidates(context.bundle, SEGMENTER, context.backends, gpu=bool(probe_gpus().gpus))
    default = auto_candidate(context.bundle.path, SEGMENTER.name, context.engine_cache)
    measured = [_Measured(each, each.row(is_default=each == default)) for each in listed]
    with ExitStack() as stack:
        for each in measured:
            each.start(stack, _skipped(context, each.candidate), *_arguments(context, each.candidate))
        _Steps(context, [each for each in measured if each.worker]).measure()
    return [each.row for each in measured]


def _skipped(context: BenchContext, candidate: Candidate) -> str:
    """Why a candidate is not started; empty where it is."""
    if candidate.backend == COMPILED and context.effort.is_quick and COMPILED not in context.backends:
        return f"compiles for minutes: skipped in a quick run unless --backends names {COMPILED}"
    return "" if candidate.is_ours else context.pytorch_problem


def _arguments(context: BenchContext, candidate: Candidate) -> tuple[Any, ...]:
    """What its WorkerProcess is started with."""
    first = context.val[0].path
    return SegmentCandidate, context.bundle.path, candidate, context.engine_cache, first, context.weights


class _Steps:
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
        curves = [self._sizes, self._batches, self._cores]
        with Progress((len(steps) + len(curves)) * len(self._measured), "segmenting", "step") as bar:
            for step in (*steps, *curves):
                run_alternately(self._measured, step, bar, is_curve=step in curves)
        self._summarise()

    def _warm_up(self, each: _Measured) -> None:
        each.call("load", self._files)
        each.call("latencies")

    def _latency(self, each: _Measured) -> None:
        each.latency_rounds.append(each.call("latencies"))

    def _memory(self, each: _Measured) -> None:
        assert each.worker is not None
        each.row["model_bytes"], device = each.call("sizes")
        each.row["peak_mib"] = {"host": each.worker.peak_mib, "device": device}

    def _masks(self, each: _Measured) -> None:
        images = spread(self._context.val, self._effort.masks)
        reference = self._context.scratch / "reference-labels"
        reference.mkdir(parents=True, exist_ok=True)
        first = self._measured[0]  # the reference, if it runs
        has_reference = first.candidate == REFERENCE and first.row["problem"] is None
        kept = reference if has_reference else None
        each.row |= each.call("masks", images, kept, each.candidate == REFERENCE)
        each.row["images"] = len(images)

    def _end_to_end(self, each: _Measured) -> None:
        images = spread(self._context.val, self._effort.end_to_end)
        out = self._context.scratch / "segmented"
        rate = each.call("loop", [image.path for image in images], out / "loop")
        each.loop_rates.append(rate)
        if each.candidate.is_ours:
            record = self._context.run_on_images("segment", each.candidate, images, out / "command")
            rate = record["images_per_second"]
        each.rates.append(rate)

    def _sizes(self, each: _Measured) -> None:
        rows = []
        for side in self._effort.sides:
            pixels, seconds = each.call("at_side", self._files[0], side, self._effort.repeats)
            rows.append({"long_side": side, "pixels": pixels, "latency_ms": _ms(statistics.median(seconds))})
        each.row["sizes"] = rows

    def _batches(self, each: _Measured) -> None:
        rows = []
        for batch in self._effort.batches:
            seconds = statistics.median(each.call("batch", self._files[0], batch, self._effort.repeats))
            rows.append({"batch": batch, "images_per_second": round(batch / seconds, 2)})
        each.row["batches"] = rows

    def _cores(self, each: _Measured) -> None:
        """Throughput by cores, on a CPU with one thread per image."""
        cores = usable_cpus()
        # torch.compile would compile again for each number of cores, for minutes.
        if each.candidate.device != "cpu" or each.candidate.backend == COMPILED:
            rate = each.call("images_per_second", 1, self._effort.repeats)
            each.row["cores"] = [{"cores": cores, "images_per_second": rate}]
            return
        each.row["cores"] = []
        for count in (*(count for count in (1, 2, 4, 8, 16, 32, 64) if count < cores), cores):
            with WorkerProcess(*_arguments(self._context, each.candidate), 1, cpus=count) as worker:
                worker.call("load", self._files)
                rate = worker.call("images_per_second", count, self._effort.repeats)
            each.row["cores"].append({"cores": count, "images_per_second": rate})

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


def latency_figures(rounds: list[list[float]]) -> dict[str, Any]:
    """Milliseconds: percentiles over all images and rounds, and the median of each round.

    p99 is None for fewer than a hundred samples.
    """
    every = np.array([seconds for each in rounds for seconds in each])
    percentiles = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    figures: dict[str, Any] = {k: _ms(np.percentile(every, share)) for k, share in percentiles.items()}
    if len(every) < 100:
        figures["p99"] = None
    repeats = [_ms(statistics.median(each)) for each in rounds]
    return {**figures, "mean": _ms(every.mean()), "count": len(every), "repeats": repeats}


def _ms(seconds: float) -> float:
    return round(1000 * float(seconds), 3)
