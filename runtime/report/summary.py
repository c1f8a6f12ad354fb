"""A run in a few lines of text: rate, busy shares, which stage is the limit, failures.

print(describe_run(RunFigures("label", done=980, failed=20, seconds=312.5, stages=stages)))
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multisa.runtime.progress import counted

LIMIT_SHARE = 0.85  # busy for so much of the time, a stage (or all cores) holds up the rest
_REASONS = 5  # named in the text; failed.jsonl has them all


@dataclass(frozen=True)
class StageTime:
    """One stage of the pipeline: the seconds its workers were busy, added up."""

    name: str
    busy_seconds: float
    workers: int = 1


@dataclass(frozen=True)
class RunFigures:
    """All that the text needs; counts are of this run, `kept` is what earlier runs had committed."""

    command: str
    done: int
    failed: int
    seconds: float
    stages: tuple[StageTime, ...] = ()
    kept: int = 0
    passed_over: int = 0  # entries of the source that are no images or cannot be had
    cores: int = 0  # of the machine; 0 when not known
    reasons: Mapping[str, int] = field(default_factory=dict)  # images by general reason, see reasons.py
    look_at: tuple[str, ...] = ()  # "out/report.html: the doubtful ones first"

    @property
    def images_per_second(self) -> float:
        """Images done in a second of this run; 0 for a run of no time."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


def figures_from_run(run: Mapping[str, Any]) -> RunFigures:
    """The figures that .multisa/run.json has: stages may have `stage_workers`, else all have `workers`."""
    workers = run.get("stage_workers", {})
    stages = tuple(
        StageTime(str(name), float(seconds), int(workers.get(name, run.get("workers", 1))))
        for name, seconds in run.get("stage_seconds", {}).items()
    )
    return RunFigures(
        command=str(run.get("command", "run")),
        done=int(run.get("images", 0)),
        failed=int(run.get("failures", 0)),
        seconds=float(run.get("seconds", 0.0)),
        stages=stages,
        kept=int(run.get("kept", 0)),
        passed_over=int(run.get("passed_over", 0)),
        cores=int(run.get("cores", 0)),
    )


def busy_shares(figures: RunFigures) -> dict[str, float]:
    """For each stage its busy seconds over what its workers had, the busiest first; 0..1 but for rounding."""
    if figures.seconds <= 0:
        return {}
    shares = {s.name: s.busy_seconds / (max(s.workers, 1) * figures.seconds) for s in figures.stages}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def describe_limit(figures: RunFigures) -> str:
    """Which stage holds the others up, and why that is said; empty for a run without stages or time."""
    shares = busy_shares(figures)
    if not shares:
        return ""
    name, share = next(iter(shares.items()))
    workers = next(stage.workers for stage in figures.stages if stage.name == name)
    busy = f"its {counted(workers, 'worker')} had work for {share:.0%} of the time"
    together = sum(stage.busy_seconds for stage in figures.stages)
    used = together / (figures.cores * figures.seconds) if figures.cores else 0.0
    if used >= LIMIT_SHARE:
        cores = f"the stages together had work for all of {counted(figures.cores, 'core')}"
        return f"the limit is the processor, in {name} most ({busy}): {cores}, more workers gain nothing"
    if share >= LIMIT_SHARE:
        return f"the limit is {name}: {busy}; more workers for it, or a faster engine, would be felt"
    return f"no stage is the limit: {name} is the busiest, {busy}; the rest is waiting for source or disk"


def describe_run(figures: RunFigures) -> str:
    """The run in lines: what was done, where the time went, what failed, where to look."""
    lines = [_done(figures)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in busy_shares(figures).items())
    if shares:
        lines += [f"busy: {shares}", describe_limit(figures)]
    reasons = sorted(figures.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"failed, {counted(count, 'image')}: {reason}" for reason, count in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        rest = sum(count for _, count in reasons[_REASONS:])
        lines.append(f"failed, {counted(rest, 'image')}: {len(reasons) - _REASONS} further reasons")
    lines += [f"look at {place}" for place in figures.look_at]
    return "\n".join(lines)


def describe_duration(seconds: float) -> str:
    """Seconds as people read them: "0.8 s", "4 min 10 s", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(math.floor(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _done(figures: RunFigures) -> str:
    parts = [
        f"{counted(figures.done, 'image')} in {describe_duration(figures.seconds)} "
        f"({figures.images_per_second:.2f}/s), {figures.failed} failed"
    ]
    if figures.kept:
        parts.append(f"{figures.kept} kept from before")
    if figures.passed_over:
        parts.append(f"{figures.passed_over} passed over")
    return ", ".join(parts)
