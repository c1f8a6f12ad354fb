"""`multisa bench --compare OLD`: what became slower, larger or less accurate, beyond noise.

    comparison = compare_benches(new, read_bench(Path("old/bench.json")))

- A time is worse if it is longer by more than the tolerance and the scatter of its repeats, by itself and
  relative to the baselines measured beside it (which did not change, so their change is the machine's).
- On another machine only ratios to the baselines are compared.
- mIoU and agreement of labels are compared only for the same bundle and data.
- A row of ours that ran and no longer does is a regression; rows of baselines never are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles

from multisa.benchmarks.bench_file import (
    STAGES,
    Bench,
    Row,
    curve,
    is_ours,
    nested,
    number,
    numbers,
    one_line,
    row_key,
    row_name,
    rows_of,
    validate_bench,
    value,
)
from multisa.runtime.errors import MultisaError, UsageError

TOLERANCE = 0.1  # the share by which a time may be longer
START_UP_TOLERANCE = 0.5  # start-up is measured once
TAIL_FACTOR = 2.0  # a p90 rests on a tenth of the samples and scatters about twice as much as the median
LARGER = {"memory": (1.2, 16.0), "size": (1.05, 0.0)}  # by more than this factor, and this many MiB
LOWER = {"miou": 0.1, "agreement": 0.001}  # by more than this: percentage points, share of pixels
_ROUNDING = 1e-9  # keeps the last bit of a difference from exceeding a limit
_MACHINE = ("processor", "cores", "instruction_set", "quick")
_BASELINES = ("torch", "scipy", "pydensecrf2")  # packages of the baselines; segmenting has only the first

WORSE = "worse"
BETTER = "better"
SAME = "same"

# Kinds: "ratio" is how many times as fast as the baseline a row of ours is; "against", how many times as fast
# as a row of others ours is. Each figure has its unit, its key, and the key of its repeats.
_FIGURES = (
    ("latency p50", "time", "ms", ("latency_ms", "p50"), ("latency_ms", "repeats")),
    ("latency p90", "tail", "ms", ("latency_ms", "p90"), ("latency_ms", "repeats")),
    ("end to end", "rate", "images/s", ("images_per_second",), ("end_to_end", "images_per_second")),
    ("times baseline", "ratio", "×", ("times_baseline",), ("latency_ms", "repeats")),
    ("end to end, times baseline", "ratio", "×", ("end_to_end", "times_baseline"), ()),
    ("plain loop, times baseline", "ratio", "×", ("loop", "times_baseline"), ()),
    ("ours times as fast", "against", "×", ("default_times_as_fast",), ()),
    ("start-up", "start", "s", ("startup_seconds",), ()),
    ("peak memory", "memory", "MiB", ("peak_mib", "host"), ()),
    ("peak memory, device", "memory", "MiB", ("peak_mib", "device"), ()),
    ("model size", "size", "bytes", ("model_bytes",), ()),
    ("mIoU", "miou", "%", ("miou",), ()),
    ("labels alike", "agreement", "", ("label_agreement",), ()),
    ("median", "time", "ms", ("median_ms",), ()),
    ("ours times as fast", "against", "×", ("times_ours",), ()),
)
_CURVES = (
    ("over batches", "rate", "images/s", ("batches", "batch", "images_per_second")),
    ("over cores", "rate", "images/s", ("cores", "cores", "images_per_second")),
    ("over sizes", "time", "ms", ("sizes", "pixels", "latency_ms")),
)


class RegressionError(MultisaError):
    """Something is slower, larger or less accurate than in the old report."""

    exit_code = 3


@dataclass(frozen=True)
class Figure:
    """One figure of a row. points: a curve's values by x; rounds: repeats of different images each."""

    kind: str
    unit: str
    value: float
    spread: float = 0.0
    points: Mapping[float, float] | None = None
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Change:
    """One figure in both reports; both values are None where a row runs in only one of them."""

    row: str
    figure: str
    unit: str
    old: float | None
    new: float | None
    outcome: str  # WORSE, BETTER or SAME
    reason: str
    noise: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The change as a line of `Comparison.text`."""
        digits = 5 if self.figure in ("mIoU", "labels alike") else 3
        old, new = ("" if each is None else number(each, digits) for each in (self.old, self.new))
        ratio = f"{number(self.new / self.old)}×" if self.new is not None and self.old else ""
        noise = "" if self.noise is None else f"{self.noise:.0%}"
        verdict = f"WORSE: {self.reason}" if self.outcome == WORSE else self.reason
        return self.row, self.figure, old, new, self.unit, ratio, noise, verdict


@dataclass(frozen=True)
class Comparison:
    """Every compared figure, and notes on what was not compared and why."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def only(self, outcome: str) -> tuple[Change, ...]:
        """The changes with this outcome."""
        return tuple(change for change in self.changes if change.outcome == outcome)

    def text(self) -> str:
        """Notes, a table of all that was compared, and the counts."""
        head = ("row", "figure", "old", "new", "unit", "ratio", "noise", "verdict")
        counts = ", ".join(f"{len(self.only(outcome))} {outcome}" for outcome in (WORSE, BETTER, SAME))
        return "\n".join([*self.notes, *aligned([head, *(c.cells() for c in self.changes)]), counts])


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells padded to columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def check_against(new: Bench, old: Bench) -> str:
    """The comparison as text. Raises RegressionError with the text where something is worse."""
    comparison = compare_benches(new, old)
    text = comparison.text()
    if not comparison.changes:
        raise UsageError(f"nothing to compare, expected a report with some of the same stages:\n{text}")
    if comparison.only(WORSE):
        raise RegressionError(f"worse than before:\n{text}")
    return text


def compare_benches(new: Bench, old: Bench, *, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the rows that both reports have. Raises UsageError for what is not a report."""
    validate_bench(new)
    validate_bench(old)
    changes: list[Change] = []
    notes: dict[str, None] = {}  # a set that keeps its order
    for stage in STAGES:
        if new.get(stage) and old.get(stage):
            pair = _StagePair(stage, new, old, tolerance)
            changes += pair.changes()
            notes |= dict.fromkeys(pair.notes())
        elif new.get(stage) or old.get(stage):
            notes[f"{stage}: only in the {'new' if new.get(stage) else 'old'} report"] = None
    return Comparison(tuple(changes), tuple(notes))


class _StagePair:
    """The rows of one stage in two reports."""

    def __init__(self, stage: str, new: Bench, old: Bench, tolerance: float) -> None:
        self._stage = stage
        self._tolerance = tolerance
        self._new = {row_key(stage, row): row for row in new[stage]}
        self._old = {row_key(stage, row): row for row in old[stage]}
        self._environments = (new["environment"], old["environment"])
        self._other_machine = self._differing(*((key,) for key in _MACHINE))
        self._other_data = self._differing(("bundle", "sha256"), ("data", "digest"))
        self._other_gpus = self._differing(("gpus",))
        packages = _BASELINES[:1] if stage == "segment" else _BASELINES
        self._other_versions = self._differing(*(("versions", name) for name in packages))
        baselines = [{row_key(stage, r) for r in rows_of(b, stage) if r.get("baseline")} for b in (new, old)]
        self._same_baselines = baselines[0] == baselines[1]

    def _differing(self, *paths: tuple[str, ...]) -> list[str]:
        """The parts of the environment that differ, as "key (OLD before, NEW now)"."""
        found = []
        for path in paths:
            new, old = (_at(environment, path) for environment in self._environments)
            if new != old:
                found.append(f"{' '.join(path)} ({old} before, {new} now)")
        return found

    def notes(self) -> Iterator[str]:
        """What differs between the runs, and what is therefore not compared."""
        if self._other_machine:
            differing = "; ".join(self._other_machine)
            yield f"another machine or effort: {differing}: only ratios to the baselines are compared"
        if self._other_data and self._stage != "kernels":
            yield f"another bundle or data set: {'; '.join(self._other_data)}: mIoU and labels not compared"
        if self._other_versions:
            yield f"other versions: {'; '.join(self._other_versions)}: baselines are not comparable"
        if not self._same_baselines:
            yield f"{self._stage}: the baselines changed: ratios to them are not compared"
        for key in sorted(self._old.keys() ^ self._new.keys()):
            which, rows = ("old", self._old) if key in self._old else ("new", self._new)
            yield f"{self._stage}: {row_name(self._stage, rows[key])}: only in the {which} report"

    def changes(self) -> Iterator[Change]:
        """Every figure that can be compared, row by row of the old report."""
        for key, old in self._old.items():
            new = self._new.get(key)
            if new is None or (self._other_gpus and old.get("device") == "cuda"):
                continue
            name = f"{self._stage}: {row_name(self._stage, new)}"
            ran, runs = (not row.get("problem") for row in (old, new))
            if ran and runs:
                yield from self._figures(name, old, new)
            elif ran != runs and is_ours(self._stage, new):
                reason = "runs now" if runs else f"ran before, now: {one_line(str(new['problem']))}"
                yield Change(name, "runs", "", None, None, BETTER if runs else WORSE, reason)

    def _figures(self, name: str, old: Row, new: Row) -> Iterator[Change]:
        for label, then, now in self._pairs(old, new):
            if not self._comparable(then.kind, old, new):
                continue
            is_ratio = then.kind in ("ratio", "against")
            noise = noise_of(then.kind, then.spread, self._tolerance)
            drift = 1.0 if is_ratio else self._drift(new)
            outcome, reason = judge(then.kind, then.value, now.value, noise, drift)
            if outcome != SAME and not (is_ratio or then.kind in LOWER or is_ours(self._stage, new)):
                outcome, reason = SAME, f"{reason}, not ours"
            yield Change(name, label, then.unit, then.value, now.value, outcome, reason, noise)

    def _pairs(self, old: Row, new: Row) -> Iterator[tuple[str, Figure, Figure]]:
        after = figures(self._stage, new)
        for label, figure in figures(self._stage, old).items():
            if label in after and (pair := common(figure, after[label])):
                yield label, *pair

    def _comparable(self, kind: str, old: Row, new: Row) -> bool:
        if kind in LOWER:
            return not self._other_data
        if kind == "size":
            return not self._differing(("bundle", "name"))
        if value(old, "mean_pixels") != value(new, "mean_pixels"):
            return False  # a quick run has other images than a full one
        if kind in ("ratio", "against"):  # on the same machine the times are compared already
            return bool(self._other_machine) and self._same_baselines and not self._other_versions
        return not self._other_machine

    def _drift(self, row: Row) -> float:
        """How many times as long the baselines beside this row take now; 1 where nothing can be said."""
        factors = []
        beside = ("kernel", "size") if self._stage == "kernels" else ("device",)
        for key, old in self._old.items():
            new = self._new.get(key, {"problem": "missing"})
            is_baseline = self._stage != "segment" or (old.get("baseline") and new.get("baseline"))
            if old.get("problem") or new.get("problem") or is_ours(self._stage, old) or not is_baseline:
                continue
            if any(new.get(k) != row.get(k) for k in beside):
                continue
            ratios = {label: now.value / then.value for label, then, now in self._pairs(old, new)}
            if "latency p50" not in ratios and "end to end" in ratios:
                factors.append(1 / ratios["end to end"])
            elif label := next((k for k in ("latency p50", "median") if k in ratios), None):
                factors.append(ratios[label])
        return median(factors) if factors and not self._other_versions else 1.0


def _at(environment: Row, path: tuple[str, ...]) -> str:
    found = nested(environment, path)
    return one_line(str(found or "none")).partition("+")[0]  # "2.9.0+cpu": the build does not matter


def figures(stage: str, row: Row) -> dict[str, Figure]:
    """Every figure of a row that is compared, by name."""
    found = {
        name: Figure(kind, unit, figure, spread_of(numbers(row, *repeats)))
        for name, kind, unit, path, repeats in _FIGURES
        if (figure := value(row, *path)) is not None and figure > 0
    }
    latency = spread_of(numbers(row, "latency_ms", "repeats"))
    for name, kind, unit, keys in _CURVES:
        if points := curve(row, *keys):
            found[name] = Figure(kind, unit, 0.0, latency, points)
    if rates := numbers(row, "loop", "images_per_second"):
        found["plain loop"] = Figure("rate", "images/s", median(rates), spread_of(rates))
    if value(row, "end_to_end", "rounds") and "end to end" in found:
        rates = numbers(row, "end_to_end", "images_per_second")
        found["end to end"] = replace(found["end to end"], rounds=rates, spread=0.0)
    if "median" in found and (least := value(row, "min_ms")):
        # Interruptions only make a repeat longer: the distance to the minimum is the scatter.
        middle = found["median"].value
        found["median"] = replace(found["median"], spread=max(middle - least, 0) / middle)
    skipped = "against" if is_ours(stage, row) else "ratio"
    return {name: figure for name, figure in found.items() if figure.kind != skipped}


def spread_of(repeats: Sequence[float]) -> float:
    """Half the interquartile range over the median; 0 for fewer than three repeats.

    Quartiles, so that one interrupted repeat does not count. Not divided by the root of their number: what
    slows a machine down lasts longer than one repeat, so the median scatters nearly as the repeats do.
    """
    if len(repeats) < 3:
        return 0.0
    low, middle, high = quantiles(repeats, n=4, method="inclusive")
    return (high - low) / 2 / middle


def common(old: Figure, new: Figure) -> tuple[Figure, Figure] | None:
    """Both figures, the old one with the joint spread; None where curves share no point.

    Curves become the geometric mean over their common points. Rounds of different images become the old
    value, and the old value times the median ratio of each round to the same round before.
    """
    if old.points is not None and new.points is not None:
        shared = old.points.keys() & new.points.keys()
        if not shared:
            return None
        means = [math.exp(sum(math.log(p[x]) for x in shared) / len(shared)) for p in (old.points, new.points)]
        old, new = replace(old, value=means[0]), replace(new, value=means[1])
    if old.rounds and len(old.rounds) == len(new.rounds):
        ratios = [now / then for then, now in zip(old.rounds, new.rounds, strict=True)]
        return replace(old, spread=spread_of(ratios)), replace(new, value=old.value * median(ratios))
    return replace(old, spread=old.spread + new.spread), new


def noise_of(kind: str, spread: float, tolerance: float) -> float | None:
    """The share by which a time has to be longer to count; None for figures that are not times."""
    if kind == "start":
        return START_UP_TOLERANCE
    if kind in LARGER or kind in LOWER:
        return None
    return max(tolerance, spread) * (TAIL_FACTOR if kind == "tail" else 1.0)


def judge(kind: str, old: float, new: float, noise: float | None, drift: float) -> tuple[str, str]:
    """(outcome, reason) of a figure. drift: how many times as long the baselines take now."""
    if noise is not None:
        factor = new / old if kind in ("time", "tail", "start") else old / new  # times as long as before
        limit = 1 + noise + _ROUNDING
        is_worse, is_better = factor > limit, factor < 1 / limit
        if is_worse and factor / drift <= limit:
            return SAME, "slower, like the baselines"
        if is_better and factor / drift >= 1 / limit:
            return SAME, "faster, like the baselines"
        words = ("slower", "faster")
    elif kind in LARGER:
        more_than, mib = LARGER[kind]
        is_worse, is_better = (b > more_than * a * (1 + _ROUNDING) + mib for a, b in ((old, new), (new, old)))
        words = ("more", "less")
    else:
        limit = LOWER[kind] + _ROUNDING
        is_worse, is_better = old - new > limit, new - old > limit
        words = ("lower", "higher")
    return (WORSE, words[0]) if is_worse else (BETTER, words[1]) if is_better else (SAME, SAME)
