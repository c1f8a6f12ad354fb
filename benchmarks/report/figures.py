"""What of a row is compared with the same row of another report, and how much each figure scatters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from multisa.benchmarks.report.cells import Row, end_to_end, is_ours, points, rate, value

# How figures are judged. RATIO: how many times as fast as the baseline; AGAINST: how many times as fast ours
# is as this row. Both are lower where ours is slower. TAIL: a time of which few samples tell.
TIME, TAIL, RATE, RATIO, AGAINST = "time", "tail", "rate", "ratio", "against"
START, MEMORY, SIZE, MIOU, AGREEMENT = "start", "memory", "size", "miou", "agreement"
SPEEDS = (TIME, TAIL, RATE, START)
RATIOS = (RATIO, AGAINST)
ACCURACIES = (MIOU, AGREEMENT)


@dataclass(frozen=True)
class Figure:
    """One figure of a row; `curve` instead of `value` where it is one for each x.

    turns: its repeats, where each is of other photographs, which are those of the same turn of another run.
    """

    kind: str
    unit: str
    value: float = 0.0
    spread: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    turns: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A figure then and now. ratio: now over then, where it is not that of the two: the median over turns."""

    old: float
    new: float
    scatter: float
    ratio: float | None = None


def figures(stage: str, row: Row, beside: Row | None = None) -> dict[str, Figure]:
    """Every figure of the row that is compared, by name. beside: the row that its ratios are to."""
    found = _kernel(row, beside) if stage == "kernels" else _run(row, beside)
    # Ratios to the baseline are of ours; how much faster ours is, is told by the rows of others.
    other = AGAINST if is_ours(stage, row) else RATIO
    return {name: figure for name, figure in found.items() if figure.kind != other}


def spread(repeats: Sequence[float]) -> float:
    """Half the range between the lower and the upper quartile, over the median; 0 for fewer than three.

    Quartiles, because one repeat that something else has interrupted says nothing of the others. It is not
    divided by the root of their number: repeats follow each other, and what slows a machine down lasts longer
    than one of them, so that their median scatters nearly as they do.
    """
    if len(repeats) < 3:
        return 0.0
    low, middle, high = quantiles(repeats, n=4, method="inclusive")
    return (high - low) / 2 / middle


def spread_of_ratio(repeats: Sequence[float], others: Sequence[float]) -> float:
    """How much the ratio of two that took turns scatters; without turns in common, as much as both."""
    if len(repeats) == len(others):
        return spread([one / other for one, other in zip(repeats, others, strict=True)])
    return spread(repeats) + spread(others)


def common(old: Figure, new: Figure) -> Pair | None:
    """The two values and what they scatter; of curves the geometric means over the places that both have,
    None without any.

    Points of a curve have no repeats of their own: together they scatter less than each of them. Of turns,
    which differ by their photographs, the ratios of each to the same turn then.
    """
    if old.curve:
        one, other = dict(old.curve), dict(new.curve)
        places = sorted(set(one) & set(other))
        if not places:
            return None
        means = (_mean([one[x] for x in places]), _mean([other[x] for x in places]))
        return Pair(*means, old.spread + new.spread)
    if old.turns and len(old.turns) == len(new.turns):
        ratios = [now / then for then, now in zip(old.turns, new.turns, strict=True)]
        return Pair(old.value, new.value, spread(ratios), median(ratios))
    # Each median may be off by the spread of its repeats, in opposite directions.
    return Pair(old.value, new.value, old.spread + new.spread)


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(found) for found in values) / len(values))


def _repeats(row: Row | None, key: str) -> tuple[float, ...]:
    found = ((row or {}).get(key) or {}).get("repeats" if key == "latency_ms" else "images_per_second")
    return tuple(found or ())


def _scatter_to(row: Row, beside: Row | None, key: str) -> float:
    """How much the row's ratio to the one beside it scatters."""
    mine, theirs = _repeats(row, key), _repeats(beside, key)
    if beside is not None and bool(_turns(row)) != bool(_turns(beside)):
        return spread(theirs if _turns(row) else mine)  # turns are of other photographs each: no scatter
    return spread_of_ratio(mine, theirs)


def _turns(row: Row) -> float | None:
    return value(row, "end_to_end", "turns")


def _run(row: Row, beside: Row | None) -> dict[str, Figure]:
    latencies, whole, loop = (_repeats(row, key) for key in ("latency_ms", "end_to_end", "loop"))
    to_latency, to_whole, to_loop = (
        _scatter_to(row, beside, key) for key in ("latency_ms", "end_to_end", "loop")
    )
    has_latency = value(row, "latency_ms", "p50") is not None
    by_turns = bool(_turns(row))
    single: Mapping[str, tuple[str, str, float | None, float]] = {
        "latency p50": (TIME, "ms", value(row, "latency_ms", "p50"), spread(latencies)),
        "latency p90": (TAIL, "ms", value(row, "latency_ms", "p90"), spread(latencies)),
        "end to end": (RATE, "images/s", end_to_end(row), spread(whole)),
        "plain loop": (RATE, "images/s", rate(row, "loop"), spread(loop)),
        # Of segmenting this is a ratio of latencies, of labelling one of whole runs.
        "times baseline": (
            RATIO,
            "×",
            value(row, "times_baseline"),
            to_latency if has_latency else to_whole,
        ),
        "ours times as fast": (AGAINST, "×", value(row, "default_times_as_fast"), to_whole),
        "end to end, times baseline": (RATIO, "×", value(row, "end_to_end", "times_baseline"), to_whole),
        "plain loop, times baseline": (RATIO, "×", value(row, "loop", "times_baseline"), to_loop),
        "start-up": (START, "s", value(row, "startup_seconds"), 0.0),
        "peak memory": (MEMORY, "MiB", value(row, "peak_mib", "host"), 0.0),
        "peak memory, device": (MEMORY, "MiB", value(row, "peak_mib", "device"), 0.0),
        "model size": (SIZE, "bytes", value(row, "model_bytes"), 0.0),
        "mIoU": (MIOU, "%", value(row, "miou"), 0.0),
        "labels alike": (AGREEMENT, "", value(row, "label_agreement"), 0.0),
    }
    found = {
        name: Figure(kind, unit, figure, scatter, turns=whole if by_turns and name == "end to end" else ())
        for name, (kind, unit, figure, scatter) in single.items()
        if figure is not None
    }
    scatter = max(spread(latencies), 0.0 if by_turns else spread(whole))
    for name, kind, unit, curve in (
        ("over batches", RATE, "images/s", points(row, "batches", "batch", "images_per_second")),
        ("over cores", RATE, "images/s", points(row, "cores", "cores", "images_per_second")),
        ("over sizes", TIME, "ms", points(row, "sizes", "pixels", "latency_ms")),
    ):
        if curve:
            found[name] = Figure(kind, unit, spread=scatter, curve=tuple(curve))
    return found


def _kernel(row: Row, beside: Row | None) -> dict[str, Figure]:
    middle, ratio = value(row, "median_ms"), value(row, "times_ours")
    found = {}
    if middle is not None:
        found["median"] = Figure(TIME, "ms", middle, _scatter(row))
    if ratio is not None:
        both = _scatter(row) + (0.0 if beside is None else _scatter(beside))
        found["ours times as fast"] = Figure(AGAINST, "×", ratio, both)
    return found


def _scatter(kernel: Row) -> float:
    """Quartiles are not kept of kernels. What interrupts only ever makes longer, so the least is the better
    of the two ends to measure the scatter by."""
    middle, least = value(kernel, "median_ms"), value(kernel, "min_ms")
    return 0.0 if middle is None or least is None else max(middle - least, 0.0) / middle
