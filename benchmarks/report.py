"""bench.json as a page with tables and figures (bench.html, figures/*.svg) and as text for the terminal."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from multisa.benchmarks.bench_file import (
    NOTHING,
    OURS,
    STAGES,
    Bench,
    Row,
    curve,
    end_to_end,
    loop_rate,
    number,
    one_line,
    row_name,
    rows_of,
    validate_bench,
    value,
)
from multisa.benchmarks.compare import aligned
from multisa.runtime.files import write_bytes_atomically

FIGURES = "figures"  # folder beside the page
_LEGEND: dict[str, Any] = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (0, -0.15), "ncols": 2}
_LONGEST_NAME = 48  # characters of a row's name in a figure
_FAR_APART = 20  # values further apart than this factor are drawn on a logarithmic axis
_STYLE = """
body { margin: 0 auto; max-width: 1400px; padding: 12px; color: #1c2127; background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }
h2 { margin-top: 36px; }
p { max-width: 75ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #dfe3e8; white-space: nowrap; }
th { white-space: normal; color: #5a636e; font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.long { text-align: left; white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
tr.default { background: #eaf1fa; font-weight: 600; }
figure { display: inline-block; margin: 8px 16px 8px 0; max-width: 100%; vertical-align: top; }
figure img { max-width: 100%; height: auto; }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>multisa bench</title>
<style>{style}</style>
</head>
<body>
<h1>multisa bench</h1>
{body}
</body>
</html>
"""
_NOTES = {
    "segment": "images/s is from the image file to the mask file, without opening the networks: ours by the "
    "command, PyTorch in a plain loop (Pillow reads, resizes and writes, one image after the other). Then "
    "all candidates, ours too, in that same loop. p50, p90 and p99 are latencies of one decoded image; × is "
    "the speedup over the baseline on the same device. Labels alike is the share of pixels with the label of "
    "the bundle's fp32 graph on ONNX Runtime.",
    "label": "images/s is from the image file to the mask file. Default faster by: how many times as long as "
    "the default a way takes for the same images. Slow recipes are measured on fewer and smaller images, and "
    "compared with the default on those. Labels alike is the share of pixels with the default's label.",
    "kernels": "× ours: how many times as long as the kernel of multisa a way takes. Cases that take seconds "
    "have no warm-up.",
}
_HOW = (
    "All ways of one comparison run alternately, so that a machine that slows down slows all of them; "
    "figures are medians after a warm-up. Ratios are reliable, absolute times are of this machine under its "
    "load at that time. The roofline is the time that the operations or bytes of the work take at the "
    "measured peak of the machine; its share is how much of the time taken that is."
)

# Columns as "title|key/key"; those with * are also shown in the terminal.
_SHARED = "*mIoU|miou;*labels alike|label_agreement;*peak MiB|peak_mib/host;device MiB|peak_mib/device"
_SHARED += ";start-up s|startup_seconds"
_ROOFLINE = ";roofline ms|limit/roofline_ms;*share of roofline|limit/share"
_COLUMNS = {
    "segment": "*images/s|images_per_second;*×|end_to_end/times_baseline;*images/s, loop|loop/median;"
    "*× loop|loop/times_baseline;*p50 ms|latency_ms/p50;p90 ms|latency_ms/p90;p99 ms|latency_ms/p99;"
    f"*× p50|times_baseline;{_SHARED};model bytes|model_bytes{_ROOFLINE}",
    "label": "*images/s|images_per_second;*default faster by|default_times_as_fast;images|images;"
    f"*pixels each|mean_pixels;{_SHARED}{_ROOFLINE}",
    "kernels": "*median ms|median_ms;min ms|min_ms;max ms|max_ms;repeats|repeats;*× ours|times_ours;"
    f"largest error|max_error{_ROOFLINE}",
}
# Significant digits: more where the last ones count, 1 for whole numbers.
_DIGITS = {"miou": 4, "label_agreement": 5, "images": 1, "repeats": 1, "model_bytes": 1}
_CURVES = (  # key, x, y, title, label of y
    ("batches", "batch", "images_per_second", "images/s by batch size", "images/s"),
    ("cores", "cores", "images_per_second", "images/s by cores", "images/s"),
    ("sizes", "pixels", "latency_ms", "ms by pixels of the image", "ms"),
)


@dataclass(frozen=True)
class Table:
    """A table of text. is_default: per row, whether it is what a user gets who chooses nothing."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_default: tuple[bool, ...] = ()
    brief: tuple[int, ...] = ()  # columns that the terminal shows


def write_report(bench: Bench, folder: Path) -> Path:
    """Write bench.html and its figures into `folder`; returns the page. Raises UsageError for no report."""
    validate_bench(bench)
    figures = draw(bench, folder / FIGURES)
    path = folder / "bench.html"
    write_bytes_atomically(path, page(bench, figures).encode("utf-8", "replace"))
    return path


def summary_lines(bench: Bench) -> list[str]:
    """A small table per stage for the terminal, and the reason of each row that did not run."""
    lines: list[str] = []
    for stage in STAGES:
        for table in stage_tables(bench, stage)[:1]:
            rows = [tuple(row[i] for i in (0, *table.brief)) for row in (table.head, *table.rows)]
            lines += [table.title, *aligned(rows), ""]
    missing = [(stage, row, reason) for stage in STAGES for row, reason in _problems(bench, stage)]
    return lines + [f"{stage}: {row_name(stage, row)}: not measured: {why}" for stage, row, why in missing]


def stage_tables(bench: Bench, stage: str) -> list[Table]:
    """The main table of a stage, and one for each curve; none for a stage that did not run."""
    rows = rows_of(bench, stage)
    specs = [spec.split("|") for spec in _COLUMNS[stage].split(";")]
    tables = [_table(stage, STAGES[stage], rows, [{title: _at(row, path) for title, path in specs} for row in rows])]
    for key, x, y, title, _ in _CURVES if stage == "segment" else ():
        curves = [curve(row, key, x, y) for row in rows]
        places = sorted({place for points in curves for place in points})
        cells = [{f"{place:,.0f}": number(points.get(place)) for place in places} for points in curves]
        tables.append(_table(stage, title, rows, cells))
    stages = [row.get("stages_ms") for row in rows]
    names = dict.fromkeys(name for found in stages if isinstance(found, Mapping) for name in found)
    steps = [{one_line(str(n)): number(value(row, "stages_ms", n)) for n in names} for row in rows]
    tables.append(_table(stage, "ms of work per image and step", rows, steps))
    return [table for table in tables if table.rows and (table is tables[0] or len(table.head) > 1)]


def _at(row: Row, path: str) -> str:
    if path == "loop/median":
        return number(loop_rate(row))
    return number(value(row, *path.split("/")), _DIGITS.get(path, 3))


def _table(stage: str, title: str, rows: Sequence[Row], cells: Sequence[Mapping[str, str]]) -> Table:
    """The table without columns that have no value."""
    kept = [name for name in (cells[0] if cells else ()) if {row[name] for row in cells} - {NOTHING}]
    names = []
    for row in rows:
        marks = ", ".join(mark for mark in ("default", "baseline") if row.get(mark))
        names.append(row_name(stage, row) + (f" ({marks})" if marks else ""))
    return Table(
        title,
        (stage, *(name.removeprefix("*") for name in kept)),
        tuple((name, *(row[key] for key in kept)) for name, row in zip(names, cells, strict=True)),
        tuple(bool(row.get("default")) for row in rows),
        tuple(index for index, name in enumerate(kept, 1) if name.startswith("*")),
    )


def _problems(bench: Bench, stage: str) -> list[tuple[Row, str]]:
    """Rows that did not run, and steps of others that failed, with the reason."""
    found = [(row, one_line(str(row["problem"]))) for row in bench.get(stage) or () if row.get("problem")]
    notes = [(row, row.get("notes")) for row in rows_of(bench, stage)]
    return found + [(row, one_line(str(n))) for row, some in notes if isinstance(some, list) for n in some]


def page(bench: Bench, figures: Sequence[tuple[str, str]]) -> str:
    """The page as HTML; every name in it is escaped. figures: (stage, file name) of each figure."""
    parts = []
    for stage, title in STAGES.items():
        if stage not in bench:
            continue
        parts += [f"<h2>{title}</h2>", f"<p>{escape(_NOTES[stage])}</p>"]
        texts = dict.fromkeys(str((row.get("limit") or {}).get("text", "")) for row in rows_of(bench, stage))
        parts += [f"<p>Roofline: {escape(one_line(text))}.</p>" for text in texts if text]
        for index, table in enumerate(stage_tables(bench, stage)):
            parts += [f"<h3>{escape(table.title)}</h3>" if index else "", _html_table(table)]
        missing = tuple((row_name(stage, row), reason) for row, reason in _problems(bench, stage))
        if missing:
            parts.append(_html_table(Table("", ("not measured", "reason"), missing), long=True))
        names = [escape(name) for of, name in figures if of == stage]
        parts += [f'<figure><img src="{FIGURES}/{name}" alt="{name}"></figure>' for name in names]
    if not figures:
        parts.append("<p>No figures: install matplotlib to draw them.</p>")
    facts = tuple((one_line(str(key)), _fact(fact)) for key, fact in bench["environment"].items())
    parts += ["<h2>How it was measured</h2>", f"<p>{escape(_HOW)}</p>", "<h2>Environment</h2>"]
    parts.append(_html_table(Table("", ("environment", ""), facts), long=True))
    return _PAGE.format(style=_STYLE, body="\n".join(filter(None, parts)))


def _fact(fact: object) -> str:
    if isinstance(fact, Mapping):
        return one_line(", ".join(f"{key} {_fact(value)}" for key, value in fact.items()))
    return one_line(", ".join(map(str, fact)) if isinstance(fact, list) else str(fact))


def _html_table(table: Table, *, long: bool = False) -> str:
    lines = ["".join(f"<th>{escape(title)}</th>" for title in table.head)]
    for cells in table.rows:
        texts = enumerate(map(escape, cells))
        lines.append("".join(f"<td{' class=long' * (long and i > 0)}>{text}</td>" for i, text in texts))
    marks = (False, *(table.is_default or (False,) * len(table.rows)))
    head, *body = (f"<tr{' class=default' * m}>{x}</tr>" for x, m in zip(lines, marks, strict=True))
    whole = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody>"
    return f"<div class=scroll><table>{whole}</table></div>"


def draw(bench: Bench, folder: Path) -> list[tuple[str, str]]:
    """Draw every figure that has data as SVG; (stage, file name) of each, [] without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn: list[tuple[str, str]] = []
    # Names from a file are no formulas; a fixed salt and no date give the same bytes for the same report.
    with (
        matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "multisa", "font.size": 9}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # names too long for the figure, or letters that the font lacks
        for stage, name, plot in _plots(bench):
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            plot(figure.add_subplot())
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            drawn.append((stage, f"{name}.svg"))
    return drawn


def _plots(bench: Bench) -> list[tuple[str, str, Callable[[Any], None]]]:
    """(stage, name, function that draws on axes) of every figure that has data."""
    segment = rows_of(bench, "segment")
    label = rows_of(bench, "label")
    found: list[tuple[str, str, Callable[[Any], None]]] = []

    def bars(stage: str, name: str, title: str, unit: str, pairs: list[tuple[Row, float | None]]) -> None:
        kept = [(row_name(stage, row), figure) for row, figure in pairs if figure]
        if kept:
            found.append((stage, name, lambda axes: _bars(axes, title, unit, kept)))

    rates = [(row, end_to_end(row)) for row in segment]
    bars("segment", "end-to-end", "Segmenting, file to file", "images/s", rates)
    loops = [(row, loop_rate(row)) for row in segment]
    bars("segment", "loop", "The same plain loop for all", "images/s", loops)
    points = [(r, value(r, "latency_ms", "p50"), value(r, "miou")) for r in segment]
    if any(latency and miou for _, latency, miou in points):
        found.append(("segment", "latency-miou", lambda axes: _scatter(axes, points)))
    for key, x, y, title, unit in _CURVES:
        lines = [(row_name("segment", row), curve(row, key, x, y)) for row in segment]
        if any(len(line) > 1 for _, line in lines):
            found.append(("segment", key, partial(_lines, title=title, x=x, unit=unit, lines=lines)))
    faster = [(row, value(row, "default_times_as_fast")) for row in label]
    bars("label", "recipes", "Labelling: times as long as the default", "×", faster)
    others = [r for r in rows_of(bench, "kernels") if not str(r["way"]).startswith(OURS)]
    ratios = [(row, value(row, "times_ours")) for row in others]
    bars("kernels", "kernels", "Kernels: times as long as ours", "×", ratios)
    for stage in STAGES:
        shares = [(r, value(r, "limit", "share")) for r in rows_of(bench, stage)]
        bars(stage, f"roofline-{stage}", "Share of the roofline (1 is the limit)", "", shares)
    return found


def _bars(axes: Any, title: str, unit: str, pairs: Sequence[tuple[str, float]]) -> None:
    names, figures = zip(*pairs, strict=True)
    drawn = axes.barh(range(len(names)), figures)
    axes.bar_label(drawn, [number(figure) for figure in figures], padding=3)
    axes.set_yticks(range(len(names)), [name[:_LONGEST_NAME] for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel=unit)
    if max(figures) > _FAR_APART * min(figures):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_plain_tick)


def _scatter(axes: Any, points: Sequence[tuple[Row, float | None, float | None]]) -> None:
    for row, latency, miou in points:
        if latency and miou:
            marker = "*" if row.get("default") else "o"
            axes.scatter(latency, miou, label=row_name("segment", row)[:_LONGEST_NAME], marker=marker)
    axes.set(title="Latency against mIoU (star: default)", xlabel="median ms of one image", ylabel="mIoU, %")
    axes.legend(**_LEGEND)


def _lines(axes: Any, title: str, x: str, unit: str, lines: Sequence[tuple[str, dict[float, float]]]) -> None:
    for name, points in lines:
        if points:
            axes.plot(*zip(*points.items(), strict=True), "o-", markersize=3, label=name[:_LONGEST_NAME])
    axes.set(title=title, xlabel=x, ylabel=unit)
    if x == "pixels":
        axes.loglog()
        axes.xaxis.set_major_formatter(_plain_tick)
        axes.yaxis.set(major_formatter=_plain_tick, minor_formatter=lambda *_: "")
    axes.legend(**_LEGEND)


def _plain_tick(tick: float, _: object) -> str:
    return f"{tick:,g}"
