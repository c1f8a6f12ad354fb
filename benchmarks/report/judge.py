"""When a figure is worse than it was: beyond noise, and not because the machine was slower."""

from multisa.benchmarks.report.changes import BETTER, SAME, WORSE
from multisa.benchmarks.report.figures import MEMORY, MIOU, RATIOS, SPEEDS, START, TIME, Figure

START_UP = 0.5  # it is measured once: only one that takes more than 1.5 times as long is worse
MEMORY_FACTOR, MEMORY_MIB = 1.2, 16.0
MIOU_POINTS = 0.1
AGREEMENT_SHARE = 0.001
_ROUNDING = 1e-9  # no limit is passed by the last bit of a difference


def noise_of(old: Figure, new: Figure, tolerance: float) -> float | None:
    """The share by which a time must be longer to count; None for figures that are not of time."""
    if old.kind == START:
        return START_UP
    # Each median may be off by the spread of its repeats, in opposite directions.
    return max(tolerance, old.spread + new.spread) if old.kind in (*SPEEDS, *RATIOS) else None


def judge(kind: str, old: float, new: float, noise: float | None, drift: float) -> tuple[str, str]:
    """(outcome, verdict) of a figure. noise: see `noise_of`.

    drift: how many times as long the code of others takes that was measured beside it; it has not changed, so
    that is the machine. A time is slower if it is so by itself, and against what others take now.
    """
    if noise is not None:
        factor = new / old if kind in (TIME, START) else old / new  # how many times as long ours takes
        limit = 1 + noise + _ROUNDING
        if factor > limit:
            return (WORSE, "slower") if factor / drift > limit else (SAME, "slower, but so are others")
        if factor < 1 / limit:
            return (BETTER, "faster") if factor / drift < 1 / limit else (SAME, "faster, but so are others")
        return SAME, SAME
    if kind == MEMORY:
        larger, smaller = (a > MEMORY_FACTOR * b + MEMORY_MIB for a, b in ((new, old), (old, new)))
        return (WORSE, "more") if larger else (BETTER, "less") if smaller else (SAME, SAME)
    limit = (MIOU_POINTS if kind == MIOU else AGREEMENT_SHARE) + _ROUNDING
    return (
        (WORSE, "lower") if old - new > limit else (BETTER, "higher") if new - old > limit else (SAME, SAME)
    )
