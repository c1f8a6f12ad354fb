"""What each chart of the page shows, as data: which figures of which rows. `svg.py` draws them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multisa.benchmarks.report.cells import (
    OURS,
    Row,
    end_to_end,
    engine_name,
    full_name,
    number,
    plain,
    points,
    rate,
    row_name,
    rows_of,
    share,
    short,
    times,
    value,
)
from multisa.benchmarks.report.schema import STAGES

_FAR_APART = 20  # figures further apart than this factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """Points of one engine. colour: index of the engine in the report; style: index of its precision."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: int
    style: int
    strong: bool = False  # what a user gets who chooses nothing


@dataclass(frozen=True)
class Front:
    """One point for each engine, and the indices of those that no other beats in both, by x."""

    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    best: tuple[int, ...]


@dataclass(frozen=True)
class Lines:
    """Lines over one quantity. ideal: draw what each would be if it grew with x from its first point."""

    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    ideal: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value, and the text at its end."""

    label: str
    value: float
    text: str
    colour: int
    strong: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars side by side, the first on top. mark: a value with a line of its own."""

    title: str
    note: str
    x_label: str
    bars: tuple[Bar, ...]
    log: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Stacks:
    """Bars of parts that add up to 1. shares: of each bar, by part."""

    title: str
    note: str
    labels: tuple[str, ...]
    parts: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    texts: tuple[str, ...]


Chart = Front | Lines | Bars | Stacks


def all_charts(bench: Mapping[str, Any]) -> list[tuple[str, Chart]]:
    """(stage, chart) of every chart that the report has figures for."""
    segment, label = rows_of(bench, "segment"), rows_of(bench, "label")
    colours = _colours(bench)
    found: list[tuple[str, Chart | None]] = [
        ("segment", _whole(segment, colours)),
        ("segment", _loop(segment, colours)),
        ("segment", _floors("segment", segment, colours)),
        ("segment", _front(segment, colours)),
        *(("segment", chart) for chart in _lines("Segmenting", segment, colours)),
        ("label", _recipes(label)),
        ("label", _stages(label)),
        *(("label", chart) for chart in _lines("Labelling", label, colours)),
        ("label", _floors("label", label, colours)),
        ("kernels", _kernels(rows_of(bench, "kernels"))),
        ("kernels", _floors("kernels", rows_of(bench, "kernels"), colours)),
    ]
    return [(stage, chart) for stage, chart in found if chart is not None]


def pareto(found: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other beats in both, by cost; of equal ones the first."""
    order = sorted(range(len(found)), key=lambda index: (found[index][0], -found[index][1], index))
    best: list[int] = []
    for index in order:
        if not best or found[index][1] > found[best[-1]][1]:
            best.append(index)
    return best


@dataclass(frozen=True)
class _Colours:
    engines: tuple[str, ...]
    precisions: tuple[str, ...]

    def series(self, row: Row, xs: tuple[float, ...], ys: tuple[float, ...]) -> Series:
        style = self.precisions.index(str(row.get("precision") or ""))
        return Series(engine_name(row), xs, ys, self.of(row), style, bool(row.get("default")))

    def of(self, row: Row) -> int:
        return self.engines.index(str(row.get("engine") or ""))


def _colours(bench: Mapping[str, Any]) -> _Colours:
    rows = [row for stage in ("segment", "label", "kernels") for row in bench.get(stage) or ()]
    names = [tuple(dict.fromkeys(str(row.get(key) or "") for row in rows)) for key in ("engine", "precision")]
    return _Colours(names[0], names[1])


def _front(rows: list[Row], colours: _Colours) -> Front | None:
    found = [
        (row, latency, miou)
        for row in rows
        if (latency := value(row, "latency_ms", "p50")) is not None
        and (miou := value(row, "miou")) is not None
    ]
    if not found:
        return None
    return Front(
        "Latency against mIoU",
        "Of the engines on the line none is both faster and more accurate. The default has a ring.",
        "median latency of one photograph, ms",
        "mIoU",
        tuple(colours.series(row, (latency,), (miou,)) for row, latency, miou in found),
        tuple(pareto([(latency, miou) for _, latency, miou in found])),
    )


def _whole(rows: list[Row], colours: _Colours) -> Bars | None:
    found = [(row, end_to_end(row), value(row, "end_to_end", "times_baseline")) for row in rows]
    note = (
        "From the photograph's file to the mask's: ours by the command, PyTorch in a plain loop; in brackets "
        "how many times as fast as the baseline of the same device."
    )
    return _rates("Segmenting end to end", note, found, colours)


def _loop(rows: list[Row], colours: _Colours) -> Bars | None:
    found = [(row, rate(row, "loop"), value(row, "loop", "times_baseline")) for row in rows]
    note = (
        "Each engine in the same plain loop, from file to file, one photograph after the other: what the "
        "engine alone does; in brackets how many times as fast as the baseline of the same device."
    )
    return _rates("Engines in the same plain loop", note, found, colours)


def _rates(
    title: str, note: str, found: list[tuple[Row, float | None, float | None]], colours: _Colours
) -> Bars | None:
    bars = []
    for row, speed, ratio in found:
        if speed is None:
            continue
        text = number(speed) + ("" if ratio is None else f"  ({times(ratio)})")
        bars.append(Bar(row_name("segment", row), speed, text, colours.of(row), bool(row.get("default"))))
    log = _far_apart([bar.value for bar in bars])
    return Bars(title, note, "images/s", tuple(bars), log) if bars else None


def _far_apart(values: list[float]) -> bool:
    return bool(values) and max(values) > _FAR_APART * min(values)


def _recipes(rows: list[Row]) -> Bars | None:
    """The recipes against the default: their own rates are of photographs of different sizes."""
    bars = []
    for row in rows:
        ratio = value(row, "default_times_as_fast")
        if ratio is None:
            continue
        ours = str(row["recipe"]).startswith(OURS)
        text = f"{times(ratio)}{_of_pixels(row)}"
        bars.append(Bar(row_name("label", row), ratio, text, int(not ours), bool(row.get("default"))))
    note = "How many times as long as the default takes for the same photographs, and how large these are."
    log = _far_apart([bar.value for bar in bars])
    return Bars("Labelling end to end", note, "times the default", tuple(bars), log) if bars else None


def _of_pixels(row: Row) -> str:
    pixels = value(row, "mean_pixels")
    return "" if pixels is None else f", {short(pixels)} pixels"


def _lines(title: str, rows: list[Row], colours: _Colours) -> list[Lines]:
    """Over pixels, batch and cores, where at least one row has two points."""
    made = []
    for curve, x, y, name, x_label, y_label in (
        ("sizes", "pixels", "latency_ms", "size", "pixels of the photograph", "ms"),
        ("batches", "batch", "images_per_second", "batch", "photographs in a batch", "images/s"),
        ("cores", "cores", "images_per_second", "cores", "cores", "images/s"),
    ):
        found = [(row, points(row, curve, x, y)) for row in rows]
        if not any(len(places) > 1 for _, places in found):
            continue
        series = tuple(
            colours.series(row, tuple(a for a, _ in places), tuple(b for _, b in places))
            for row, places in found
            if places
        )
        log_x, ideal = curve == "sizes", curve == "cores"
        log_y = log_x or _far_apart([b for _, places in found for _, b in places])
        note = "Thin: as many times as fast as there are cores." if ideal else ""
        made.append(
            Lines(f"{title}: scaling with {name}", note, x_label, y_label, series, log_x, log_y, ideal)
        )
    return made


def _stages(rows: list[Row]) -> Stacks | None:
    found = [(row, row["stages_ms"]) for row in rows if any((row.get("stages_ms") or {}).values())]
    if not found:
        return None
    names = list(dict.fromkeys(name for _, stages in found for name in stages))
    sums = [sum(stages.get(name) or 0 for name in names) for _, stages in found]
    return Stacks(
        "Where the time of labelling goes",
        "Shares of the time that all steps of one photograph take; at the end their sum and its size.",
        tuple(row_name("label", row) for row, _ in found),
        tuple(plain(name) for name in names),
        tuple(
            tuple((stages.get(name) or 0) / total for name in names)
            for (_, stages), total in zip(found, sums, strict=True)
        ),
        tuple(f"{number(total)} ms{_of_pixels(row)}" for (row, _), total in zip(found, sums, strict=True)),
    )


def _kernels(rows: list[Row]) -> Bars | None:
    bars = []
    for row in rows:
        ratio = value(row, "times_ours")
        if ratio is None or str(row["way"]).startswith(OURS):
            continue
        bars.append(Bar(full_name("kernels", row), ratio, times(ratio), 1))
    note = "How many times as long as the kernel of multisa; right of the line is slower than ours."
    return (
        Bars("Kernels against others", note, "times ours", tuple(bars), log=True, mark=1.0) if bars else None
    )


def _floors(stage: str, rows: list[Row], colours: _Colours) -> Bars | None:
    found = [(row, part) for row in rows if (part := value(row, "limit", "share")) is not None]
    bars = tuple(
        Bar(
            full_name(stage, row),
            100 * part,
            share(part),
            0 if stage == "kernels" else colours.of(row),
            bool(row.get("default")),
        )
        for row, part in found
    )
    note = "The floor is what the machine's measured peak would need for the same work; 100 % is the floor."
    title = f"{STAGES[stage]}: share of the floor"
    return Bars(title, note, "% of the floor", bars, mark=100.0) if bars else None
