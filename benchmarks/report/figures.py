"""What of a row is compared with the same row of another report, and how much each figure scatters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from multisa.benchmarks.report.cells import OURS, Row, end_to_end, points, value

# How figures are judged. RATIO: how many times as fast as the reference; AGAINST: how many times as fast ours
# is as this row. Both are lower where ours is slower.
TIME, RATE, RATIO, AGAINST = "time", "rate", "ratio", "against"
START, MEMORY, MIOU, AGREEMENT = "start", "memory", "miou", "agreement"
SPEEDS = (TIME, RATE, START)
RATIOS = (RATIO, AGAINST)
ACCURACIES = (MIOU, AGREEMENT)


@dataclass(frozen=True)
class Figure:
    """One figure of a row; `curve` instead of `value` where it is one for each x."""

    kind: str
    unit: str
    value: float = 0.0
    spread: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()


def figures(stage: str, row: Row) -> dict[str, Figure]:
    """Every figure of the row that is compared, by name."""
    found = _kernel(row) if stage == "kernels" else _run(row)
    # Ratios to the reference are of ours; how much faster ours is, is told by the rows of others.
    other = AGAINST if is_ours(stage, row) else RATIO
    return {name: figure for name, figure in found.items() if figure.kind != other}


def is_ours(stage: str, row: Row) -> bool:
    """Whether the row runs our code: the others are what ours is measured against."""
    if stage == "segment":
        return not str(row["engine"]).startswith("pytorch")
    return str(row["recipe" if stage == "label" else "way"]).startswith(OURS)


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


def common(old: Figure, new: Figure) -> tuple[float, float] | None:
    """The two values; of curves the geometric means over the places that both have, None without any.

    Points of a curve have no repeats of their own: together they scatter less than each of them.
    """
    if not old.curve:
        return old.value, new.value
    one, other = dict(old.curve), dict(new.curve)
    places = sorted(set(one) & set(other))
    return (_mean([one[x] for x in places]), _mean([other[x] for x in places])) if places else None


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(found) for found in values) / len(values))


def _run(row: Row) -> dict[str, Figure]:
    of_latency = spread((row.get("latency_ms") or {}).get("repeats") or ())
    of_speed = spread((row.get("end_to_end") or {}).get("images_per_second") or ())
    has_latency = value(row, "latency_ms", "p50") is not None
    single: Mapping[str, tuple[str, str, float | None, float]] = {
        "latency p50": (TIME, "ms", value(row, "latency_ms", "p50"), of_latency),
        "end to end": (RATE, "images/s", end_to_end(row), of_speed),
        # Of segmenting this is a ratio of latencies, of labelling one of whole runs.
        "times reference": (
            RATIO,
            "×",
            value(row, "times_reference"),
            of_latency if has_latency else of_speed,
        ),
        "ours times as fast": (AGAINST, "×", value(row, "default_times_as_fast"), of_speed),
        "end to end, times reference": (RATIO, "×", value(row, "end_to_end", "times_reference"), of_speed),
        "start-up": (START, "s", value(row, "startup_seconds"), 0.0),
        "peak memory": (MEMORY, "MiB", value(row, "peak_mib", "host"), 0.0),
        "peak memory, device": (MEMORY, "MiB", value(row, "peak_mib", "device"), 0.0),
        "mIoU": (MIOU, "%", value(row, "miou"), 0.0),
        "labels alike": (AGREEMENT, "", value(row, "label_agreement"), 0.0),
    }
    found = {
        name: Figure(kind, unit, figure, scatter)
        for name, (kind, unit, figure, scatter) in single.items()
        if figure is not None
    }
    for name, kind, unit, curve in (
        ("over batches", RATE, "images/s", points(row, "batches", "batch", "images_per_second")),
        ("over cores", RATE, "images/s", points(row, "cores", "cores", "images_per_second")),
        ("over sizes", TIME, "ms", points(row, "sizes", "pixels", "latency_ms")),
    ):
        if curve:
            found[name] = Figure(kind, unit, spread=max(of_latency, of_speed), curve=tuple(curve))
    return found


def _kernel(row: Row) -> dict[str, Figure]:
    middle, least, ratio = (value(row, key) for key in ("median_ms", "min_ms", "times_ours"))
    # Quartiles are not kept of kernels. What interrupts only ever makes longer, so the least is the better
    # of the two ends to measure the scatter by.
    scatter = 0.0 if middle is None or least is None else max(middle - least, 0.0) / middle
    found = {}
    if middle is not None:
        found["median"] = Figure(TIME, "ms", middle, scatter)
    if ratio is not None:
        found["ours times as fast"] = Figure(AGAINST, "×", ratio, scatter)
    return found
