"""When a figure is worse than it was: beyond noise, and not because the machine was slower."""

from multisa.benchmarks.report.changes import BETTER, SAME, WORSE
from multisa.benchmarks.report.figures import MEMORY, MIOU, RATIOS, SIZE, SPEEDS, START, TAIL, TIME

START_UP = 0.5  # it is measured once: only one that takes more than 1.5 times as long is worse
TAIL_NOISE = 2.0  # a tenth of the samples make a p90: it scatters about twice as much as the median
MEMORY_FACTOR, MEMORY_MIB = 1.2, 16.0
SIZE_FACTOR = 1.05
MIOU_POINTS = 0.1
AGREEMENT_SHARE = 0.001
_ROUNDING = 1e-9  # no limit is passed by the last bit of a difference


def noise_of(kind: str, scatter: float, tolerance: float) -> float | None:
    """The share by which a time must be longer to count; None for figures that are not of time.

    scatter: of the two figures together (`Pair.scatter`).
    """
    if kind == START:
        return START_UP
    if kind not in (*SPEEDS, *RATIOS):
        return None
    return max(tolerance, scatter) * (TAIL_NOISE if kind == TAIL else 1.0)


def judge(kind: str, old: float, new: float, noise: float | None, drift: float) -> tuple[str, str]:
    """(outcome, verdict) of a figure. noise: see `noise_of`.

    drift: how many times as long the code of others takes that was measured beside it; it has not changed, so
    that is the machine. A time is slower if it is so by itself, and against what others take now.
    """
    if noise is not None:
        factor = new / old if kind in (TIME, TAIL, START) else old / new  # how many times as long ours takes
        limit = 1 + noise + _ROUNDING
        if factor > limit:
            return (WORSE, "slower") if factor / drift > limit else (SAME, "slower, but so are others")
        if factor < 1 / limit:
            return (BETTER, "faster") if factor / drift < 1 / limit else (SAME, "faster, but so are others")
        return SAME, SAME
    if kind in (MEMORY, SIZE):
        least, more = (MEMORY_FACTOR, MEMORY_MIB) if kind == MEMORY else (SIZE_FACTOR, 0.0)
        larger, smaller = (a > least * b * (1 + _ROUNDING) + more for a, b in ((new, old), (old, new)))
        return (WORSE, "more") if larger else (BETTER, "less") if smaller else (SAME, SAME)
    limit = (MIOU_POINTS if kind == MIOU else AGREEMENT_SHARE) + _ROUNDING
    return (
        (WORSE, "lower") if old - new > limit else (BETTER, "higher") if new - old > limit else (SAME, SAME)
    )
