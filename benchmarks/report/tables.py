"""A report as tables of text: what the page, the Markdown and the terminal show is made here once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multisa.benchmarks.report.cells import (
    NOTHING,
    Row,
    count,
    end_to_end,
    engine_name,
    number,
    plain,
    points,
    rate,
    row_name,
    rows_of,
    share,
    times,
    value,
)
from multisa.benchmarks.report.schema import STAGES


@dataclass(frozen=True)
class Column:
    """One column: how its cells are made, and where they are shown."""

    title: str
    cell: Callable[[Row], str]
    brief: bool = False  # also in the few lines at the end of the command
    words: bool = False  # text, to be set flush left


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row. `strong` are the rows of what a user gets who chooses nothing."""

    stage: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()

    def brief(self) -> "Table":
        """The table with the columns that the end of the command shows."""
        kept = [index for index, column in enumerate(self.columns) if column.brief]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        columns = tuple(self.columns[index] for index in kept)
        return Table(self.stage, self.title, self.note, columns, rows, self.strong)


def all_tables(bench: Mapping[str, Any]) -> list[Table]:
    """Every table that the report has figures for: of the stages, of what did not run, of the curves."""
    return [*stage_tables(bench), *missing_tables(bench), *curve_tables(bench)]


def stage_tables(bench: Mapping[str, Any]) -> list[Table]:
    """One table for each stage that ran."""
    return [
        *_stage("segment", _SEGMENT_NOTE, rows_of(bench, "segment"), _SEGMENT),
        *_stage("label", _LABEL_NOTE, rows_of(bench, "label"), _LABEL),
        *_stage("kernels", _KERNEL_NOTE, rows_of(bench, "kernels"), _KERNELS),
    ]


def _stage(stage: str, note: str, rows: Sequence[Row], columns: Sequence[Column]) -> list[Table]:
    """The table; below its note, what the floors are."""
    floors = dict.fromkeys(text for row in rows if (text := _floor_text(row)))
    said = f" Floor: {'; '.join(floors)}." if floors else ""
    return _made(stage, STAGES[stage], note + said, rows, columns)


def _made(stage: str, title: str, note: str, rows: Sequence[Row], columns: Sequence[Column]) -> list[Table]:
    """The table, without columns in which no row has a value; none without rows."""
    if not rows:
        return []
    cells = {column: [column.cell(row) for row in rows] for column in columns}
    kept = tuple(column for column in columns if any(cell != NOTHING for cell in cells[column]))
    lines = tuple(tuple(cells[column][index] for column in kept) for index in range(len(rows)))
    strong = frozenset(index for index, row in enumerate(rows) if row.get("default"))
    return [Table(stage, title, note, kept, lines, strong)]


def _figure(*keys: str, digits: int = 3) -> Callable[[Row], str]:
    return lambda row: number(value(row, *keys), digits)


def _ratio(*keys: str) -> Callable[[Row], str]:
    return lambda row: times(value(row, *keys))


def _named(stage: str) -> Callable[[Row], str]:
    def name(row: Row) -> str:
        marks = [word for word in ("default", "baseline") if row.get(word)]
        return row_name(stage, row) + (f" ({', '.join(marks)})" if marks else "")

    return name


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: plain(str(row.get(key) or "")) or NOTHING


def _megabytes(row: Row) -> str:
    size = value(row, "model_bytes")
    return number(None if size is None else size / 1e6)


def _points_of_miou(row: Row) -> str:
    found = value(row, "miou")
    return NOTHING if found is None else f"{found:.2f}"


def _agreement(row: Row) -> str:
    return share(value(row, "label_agreement"), 3)


def _floor_text(row: Row) -> str:
    return plain(str((row.get("limit") or {}).get("text") or ""))


def _range(row: Row) -> str:
    low, high = value(row, "min_ms"), value(row, "max_ms")
    return NOTHING if low is None or high is None else f"{number(low)} to {number(high)}"


_SHARED = (
    Column("mIoU", _points_of_miou, brief=True),
    Column("labels alike", _agreement, brief=True),
    Column("peak MiB", _figure("peak_mib", "host"), brief=True),
    Column("device MiB", _figure("peak_mib", "device")),
    Column("start-up s", _figure("startup_seconds")),
)
_FLOOR = (
    Column("floor ms", _figure("limit", "floor_ms")),
    Column("of the floor", lambda row: share(value(row, "limit", "share")), brief=True),
)
_SEGMENT = (
    Column("engine", _named("segment"), brief=True, words=True),
    Column("device", _text("device"), words=True),
    Column("images/s", lambda row: number(end_to_end(row)), brief=True),
    Column("× baseline", _ratio("end_to_end", "times_baseline"), brief=True),
    Column("images/s, loop", lambda row: number(rate(row, "loop")), brief=True),
    Column("× baseline, loop", _ratio("loop", "times_baseline"), brief=True),
    Column("p50 ms", _figure("latency_ms", "p50"), brief=True),
    Column("p90 ms", _figure("latency_ms", "p90")),
    Column("p99 ms", _figure("latency_ms", "p99")),
    Column("× baseline, p50", _ratio("times_baseline"), brief=True),
    *_SHARED,
    Column("model MB", _megabytes),
    *_FLOOR,
)
_LABEL = (
    Column("recipe", _named("label"), brief=True, words=True),
    Column("images/s", lambda row: number(end_to_end(row)), brief=True),
    Column("× default", _ratio("default_times_as_fast"), brief=True),
    Column("photographs", lambda row: count(value(row, "photographs"))),
    Column("pixels each", lambda row: count(value(row, "mean_pixels")), brief=True),
    Column("p50 ms", _figure("latency_ms", "p50")),
    *_SHARED,
    *_FLOOR,
)
_KERNELS = (
    Column("kernel", _text("kernel"), brief=True, words=True),
    Column("size", _text("size"), brief=True, words=True),
    Column("way", _text("way"), brief=True, words=True),
    Column("threads", _text("threads"), brief=True),
    Column("median ms", _figure("median_ms"), brief=True),
    Column("min to max", _range),
    Column("repeats", lambda row: count(value(row, "repeats"))),
    Column("× ours", _ratio("times_ours"), brief=True),
    Column("largest error", lambda row: number(value(row, "max_error"), 2)),
    *_FLOOR,
)
_SEGMENT_NOTE = (
    "images/s is from the photograph's file to the mask's, opening not counted: ours by the command, "
    "PyTorch in a plain loop; then all in the same plain loop. × baseline: how many times as fast as the "
    "baseline of the same device; p50, of the latency of one photograph. Labels alike: the share of pixels "
    "with the label of the bundle's fp32 graphs on ONNX Runtime."
)
_LABEL_NOTE = (
    "× default: how many times as long as the default takes for the same photographs. Recipes that take long "
    "are measured on fewer and smaller ones, which are then those of the comparison: their images/s stand "
    "beside no other's. Labels alike: with the default's."
)
_KERNEL_NOTE = "× ours: how many times as long as the kernel of multisa takes, measured in turn."


def curve_tables(bench: Mapping[str, Any]) -> list[Table]:
    """What depends on the size of photographs, the batch and the cores, a column for each point."""
    made: list[Table] = []
    for stage in ("segment", "label"):
        rows = rows_of(bench, stage)
        for curve, x, y, title in (
            ("batches", "batch", "images_per_second", "images/s by batch"),
            ("cores", "cores", "images_per_second", "images/s by cores"),
            ("sizes", "pixels", "latency_ms", "ms by pixels of the photograph"),
        ):
            found = [(row, dict(points(row, curve, x, y))) for row in rows]
            lines = {id(row): line for row, line in found if line}
            drawn = [row for row in rows if id(row) in lines]
            at = sorted({place for line in lines.values() for place in line})
            columns = [
                Column("engine" if stage == "segment" else "recipe", _named(stage), words=True),
                *(Column(f"{place:,.0f}", _at(lines, place)) for place in at),
            ]
            made += _made(stage, f"{STAGES[stage]}: {title}", "", drawn, columns)
    rows = [row for row in rows_of(bench, "label") if row.get("stages_ms")]
    names = list(dict.fromkeys(name for row in rows for name in row["stages_ms"]))
    columns = [
        Column("recipe", _named("label"), words=True),
        *(Column(plain(name), _figure("stages_ms", name)) for name in names),
    ]
    return [*made, *_made("label", "Labelling: ms of each step for one photograph", "", rows, columns)]


def _at(lines: Mapping[int, Mapping[float, float]], place: float) -> Callable[[Row], str]:
    """The cell of one place on the curves, which are by the id of their row."""
    return lambda row: number(lines[id(row)].get(place))


def missing_tables(bench: Mapping[str, Any]) -> list[Table]:
    """What was asked for and did not run, with the reason."""
    made: list[Table] = []
    for stage in STAGES:
        rows = _missing(bench, stage)
        columns = [
            Column("not measured", _named(stage), words=True),
            Column("precision", _text("precision"), words=True),
            Column("reason", _text("problem"), words=True),
        ]
        if stage != "label":  # elsewhere the name has the precision, or there is none
            del columns[1]
        made += _made(stage, f"{STAGES[stage]}: not measured", "", rows, columns)
    return made


def describe_missing(bench: Mapping[str, Any]) -> list[str]:
    """A line for each row that did not run, and for each step of one that failed."""
    return [
        f"{stage}: {row_name(stage, row) or engine_name(row)}: not measured: {plain(str(row['problem']))}"
        for stage in STAGES
        for row in _missing(bench, stage)
    ]


def _missing(bench: Mapping[str, Any], stage: str) -> list[Row]:
    """The rows that did not run; those of which a step failed have what is in their notes as the reason."""
    rows = bench.get(stage) or ()
    notes = [{**row, "problem": note} for row in rows_of(bench, stage) for note in row.get("notes") or ()]
    return [*(row for row in rows if row.get("problem")), *notes]
