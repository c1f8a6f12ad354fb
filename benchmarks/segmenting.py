"""Segmenting on every engine and in PyTorch: latency, throughput, masks, memory, start.

    python benchmarks/segmenting.py --data VOC_LAYOUT [--quick] [--engines onnxruntime-cpu,pytorch-eager]

Each contender has a process of its own; they take turns on the same photographs, so that a noisy machine
slows all alike. Writes benchmarks/results/segmenting.json; `multisa bench --stages segment` is the same.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from multisa.benchmarks.suite.command import run_on_photographs
from multisa.benchmarks.suite.contender import (
    COMPILED,
    REFERENCE,
    Contender,
    auto_contender,
    baseline_of,
    contenders,
)
from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.benchmarks.suite.limits import segmenting_floor
from multisa.benchmarks.suite.sample import of_one_size, read_working, settle, spread
from multisa.benchmarks.suite.segment_contender import SegmentContender
from multisa.benchmarks.suite.setting import Setting
from multisa.benchmarks.suite.subject import subject_main
from multisa.benchmarks.suite.turns import ratio_of_turns
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.progress import Progress, log
from multisa.runtime.system import usable_cpus

Row = dict[str, Any]


@dataclass(eq=False)
class _Member:
    """A contender that runs, and what is known of it so far."""

    contender: Contender
    guest: Guest
    row: Row
    rounds: list[list[float]] = field(default_factory=list)  # seconds of single photographs
    rates: list[float] = field(default_factory=list)  # images a second from file to file, of each turn
    loops: list[float] = field(default_factory=list)  # ... in a plain loop

    @property
    def seconds(self) -> list[float]:
        return [seconds for one in self.rounds for seconds in one]


def measure(setting: Setting) -> list[Row]:
    """One row for each contender, those that cannot run here with the reason as "problem"."""
    listed = contenders(setting.bundle, SEGMENTER, setting.engines, gpu=bool(probe_gpus().gpus))
    default = auto_contender(setting.bundle.path, SEGMENTER.name, setting.plans)
    rows: list[Row] = []
    with ExitStack() as stack:
        members = []
        for contender in listed:
            row = contender.row(is_default=contender == default)
            rows.append(row)
            try:
                guest = stack.enter_context(Guest.started_twice(*_opened(setting, contender)))
            except GuestFailedError as error:
                row["problem"] = str(error)
                log.info(f"{contender.title}: left out: {error}")
                continue
            row["startup_seconds"] = round(guest.start_seconds, 3)
            members.append(_Member(contender, guest, row))
        Segmenter(setting, members).measure()
    return rows


def _opened(setting: Setting, contender: Contender) -> tuple[Any, ...]:
    """What a guest is started with. Raises GuestFailedError for a contender that is left out."""
    if not contender.is_ours and setting.pytorch_problem:
        raise GuestFailedError(setting.pytorch_problem)
    if contender.backend == COMPILED and setting.effort.is_quick and COMPILED not in setting.engines:
        raise GuestFailedError(
            f"compiles for minutes: left out of a quick run unless --engines names {COMPILED}"
        )
    first = setting.val[0].image
    return SegmentContender, setting.bundle.path, contender, setting.plans, first, setting.states


class Segmenter:
    """The steps of the measurement; in each of them the contenders take turns."""

    def __init__(self, setting: Setting, members: list[_Member]) -> None:
        self._setting, self._effort, self._members = setting, setting.effort, members
        self._files = [p.image for p in spread(setting.val, self._effort.latency_photographs)]

    def measure(self) -> None:
        """Fill the rows.

        Who cannot do what every row has takes no further turn, and has the reason as "problem"; who fails
        later, with a batch that is too large perhaps, has it among its "notes".
        """
        needed = (*[self._latency] * self._effort.rounds, self._memory, self._masks)
        needed += (*[self._end_to_end] * self._effort.turns,)
        curves = (self._sizes, self._batches, self._cores)  # last: afterwards they run on one thread each
        steps = (*needed, *curves)
        with Progress((len(steps) + 1) * len(self._members), "segmenting", "step") as bar:
            self._all(bar, self._warm_up)
            for step in steps:
                self._all(bar, step, may_fail=step in curves)
        self._summarise()

    def _all(self, bar: Progress, step: Callable[[_Member], object], *, may_fail: bool = False) -> None:
        for member in self._members:
            if member.row["problem"] is None:
                settle()
                try:
                    step(member)
                except GuestFailedError as error:
                    name = step.__name__.strip("_").replace("_", " ")
                    log.info(f"{member.contender.title}: {name}: {error}")
                    if may_fail:
                        member.row.setdefault("notes", []).append(f"{name}: {error}")
                    else:
                        member.row["problem"] = str(error)
            bar.advance()

    def _warm_up(self, member: _Member) -> None:
        member.guest.call("load", self._files)
        member.guest.call("latencies")

    def _latency(self, member: _Member) -> None:
        member.rounds.append(member.guest.call("latencies"))

    def _memory(self, member: _Member) -> None:
        member.row["peak_mib"] = {"host": member.guest.peak_mib, "device": member.guest.call("device_mib")}
        member.row["model_bytes"] = member.guest.call("model_bytes")

    def _masks(self, member: _Member) -> None:
        photographs = spread(self._setting.val, self._effort.masks)
        kept = self._setting.scratch / "reference-labels"
        is_reference = member.contender == REFERENCE  # which comes first
        kept.mkdir(parents=True, exist_ok=True)
        first = self._members[0]
        agreeing = first.contender == REFERENCE and first.row["problem"] is None
        member.row |= member.guest.call("masks", photographs, kept if agreeing else None, is_reference)
        member.row["photographs"] = len(photographs)

    def _sizes(self, member: _Member) -> None:
        photograph, rows = self._setting.val[0].image, []
        for side in self._effort.sides:
            pixels, seconds = member.guest.call("at_side", photograph, side, self._effort.repeats)
            row = {"long_side": side, "pixels": pixels, "latency_ms": _ms(statistics.median(seconds))}
            rows.append(row)
        member.row["sizes"] = rows

    def _batches(self, member: _Member) -> None:
        rows = []
        for batch in self._effort.batches:
            files = (self._of_one_size * batch)[:batch]
            seconds = statistics.median(member.guest.call("batch", files, self._effort.repeats))
            rows.append({"batch": batch, "images_per_second": round(batch / seconds, 2)})
        member.row["batches"] = rows

    def _end_to_end(self, member: _Member) -> None:
        photographs = spread(self._setting.val, self._effort.end_to_end)
        out, contender = self._setting.scratch / "segmented", member.contender
        loop = member.guest.call("loop", [p.image for p in photographs], out / "loop")
        member.loops.append(loop)
        if not contender.is_ours:
            member.rates.append(loop)
            return
        record = run_on_photographs("segment", self._setting, contender, photographs, out / "command")
        member.rates.append(record["images_per_second"])

    def _cores(self, member: _Member) -> None:
        cores, repeats = usable_cpus(), self._effort.repeats
        rows = [{"cores": cores, "images_per_second": member.guest.call("images_per_second", repeats)}]
        # What torch compiles, it would compile anew for each, for minutes.
        alone = member.contender.device != "cpu" or member.contender.backend == COMPILED
        for count in () if alone else [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cores]:
            with Guest(*_opened(self._setting, member.contender), cpus=count) as guest:
                guest.call("load", self._files)
                rows.append({"cores": count, "images_per_second": guest.call("images_per_second", repeats)})
        member.row["cores"] = sorted(rows, key=lambda row: int(row["cores"]))

    def _summarise(self) -> None:
        ran = [member for member in self._members if member.row["problem"] is None]
        sizes = [read_working(path, self._long_side).shape[1:3] for path in self._files]
        floor = segmenting_floor(self._setting, sizes)
        for member in ran:
            baseline = baseline_of(member.contender, [other.contender for other in ran])
            theirs = next(other for other in ran if other.contender == baseline)
            seconds, rates = member.seconds, member.rates
            member.row |= {
                "baseline": member is theirs,
                "latency_ms": latency_figures(member.rounds),
                "times_baseline": round(statistics.median(theirs.seconds) / statistics.median(seconds), 3),
                "images_per_second": round(statistics.median(rates), 2),
                "end_to_end": {
                    "by": "multisa segment" if member.contender.is_ours else "loop",
                    "photographs": min(self._effort.end_to_end, len(self._setting.val)),
                    "images_per_second": [round(rate, 2) for rate in rates],
                    "times_baseline": ratio_of_turns(rates, theirs.rates),
                },
                "loop": {
                    "images_per_second": [round(rate, 2) for rate in member.loops],
                    "times_baseline": ratio_of_turns(member.loops, theirs.loops),
                },
                "limit": floor.limit(member.contender, statistics.mean(seconds)),
            }

    @cached_property
    def _of_one_size(self) -> list[Path]:
        return of_one_size(spread(self._setting.val, 4 * max(self._effort.batches)), self._long_side)

    @property
    def _long_side(self) -> int:
        return self._setting.bundle.manifest.parameters.long_side


def latency_figures(rounds: list[list[float]]) -> dict[str, Any]:
    """Milliseconds: percentiles over all photographs and rounds, and the median of each round.

    Of fewer than a hundred, one in a hundred is not to be had.
    """
    every = np.array([seconds for one in rounds for seconds in one])
    p50, p90, p99 = np.percentile(every, (50, 90, 99))
    return {
        "p50": _ms(p50),
        "p90": _ms(p90),
        "p99": _ms(p99) if len(every) >= 100 else None,
        "min": _ms(every.min()),
        "max": _ms(every.max()),
        "mean": _ms(every.mean()),
        "count": len(every),
        "repeats": [_ms(statistics.median(one)) for one in rounds],
    }


def _ms(seconds: float) -> float:
    return round(1000 * float(seconds), 3)


if __name__ == "__main__":
    subject_main("segmenting", __doc__, "segment", measure)
