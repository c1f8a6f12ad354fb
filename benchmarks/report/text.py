"""Tables as text: Markdown to paste into a comment, columns for a terminal, and one tidy CSV."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from multisa.benchmarks.report.cells import Row, plain
from multisa.benchmarks.report.schema import STAGES
from multisa.benchmarks.report.tables import Table, all_tables, describe_missing, stage_tables
from multisa.benchmarks.report.verdict import environment_facts, verdict

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$@!&])")
_FORMULA = ("=", "+", "-", "@")  # what makes a spreadsheet compute a cell
_NAMES = ("stage", "engine", "precision", "device", "recipe", "kernel", "way", "threads", "size")


def markdown(bench: Mapping[str, Any]) -> str:
    """The report in Markdown: the verdict, every table, the machine."""
    parts = ["# multisa bench", *(markdown_text(sentence) for sentence in verdict(bench))]
    for table in all_tables(bench):
        parts += [f"## {markdown_text(table.title)}", markdown_text(table.note), markdown_table(table)]
    facts = [f"- {markdown_text(name)}: {markdown_text(text)}" for name, text in environment_facts(bench)]
    return "\n\n".join(part for part in [*parts, "## Environment", "\n".join(facts)] if part) + "\n"


def markdown_table(table: Table) -> str:
    """One table; numbers flush right, the rows of what is chosen by default in bold."""
    lines = [
        _line([markdown_text(column.title) for column in table.columns]),
        _line([":--" if column.words else "--:" for column in table.columns]),
    ]
    for index, row in enumerate(table.rows):
        cells = [markdown_text(cell) for cell in row]
        lines.append(
            _line([f"**{cell}**" if cell else "" for cell in cells] if index in table.strong else cells)
        )
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """`text` as itself: nothing in it is markup."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def summary_lines(bench: Mapping[str, Any]) -> list[str]:
    """What the command prints at its end: the verdict, a small table of each stage, what is missing."""
    lines = verdict(bench)
    for table in stage_tables(bench):
        lines += ["", table.title, *columns_of_text(table.brief())]
    missing = describe_missing(bench)
    return [*lines, *([""] if missing and lines else []), *missing]


def columns_of_text(table: Table) -> list[str]:
    """The table in columns of one width, for a terminal."""
    rows = [tuple(column.title for column in table.columns), *table.rows]
    return aligned(rows, words={index for index, column in enumerate(table.columns) if column.words})


def aligned(rows: Sequence[tuple[str, ...]], *, words: Set[int]) -> list[str]:
    """Cells padded to columns; the columns of `words` flush left, others right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index in words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def tidy_csv(bench: Mapping[str, Any]) -> str:
    """One row for each figure: names of what was measured, metric, place on its curve, value, unit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_NAMES, "metric", "at", "value", "unit"])
    for stage in STAGES:
        for row in bench.get(stage) or ():
            names = [stage, *(_cell(row.get(key)) for key in _NAMES[1:])]
            if row.get("problem"):
                writer.writerow([*names, "problem", "", _cell(row["problem"]), ""])
                continue
            for metric, at, figure, unit in _figures(row):
                writer.writerow([*names, metric, _cell(at), repr(figure), unit])
            for index, note in enumerate(row.get("notes") or ()):
                writer.writerow([*names, "note", str(index + 1), _cell(note), ""])
    return out.getvalue()


def _figures(row: Row) -> Iterator[tuple[str, str, float, str]]:
    """(metric, where on its curve, value, unit) of everything measured in a row."""
    for metric, unit in _SINGLE:
        *path, last = metric.split(".")
        inside: Any = row
        for key in path:
            inside = inside.get(key) or {}
        if inside.get(last) is not None:
            yield metric, "", inside[last], unit
    for name, curve, unit in (
        ("end_to_end.images_per_second", (row.get("end_to_end") or {}).get("images_per_second"), "1/s"),
        ("loop.images_per_second", (row.get("loop") or {}).get("images_per_second"), "1/s"),
        ("latency_ms.p50", (row.get("latency_ms") or {}).get("repeats"), "ms"),
    ):
        for index, figure in enumerate(curve or ()):
            yield name, f"repeat {index + 1}", figure, unit
    for curve_name, at, metric, unit in _CURVES:
        for point in row.get(curve_name) or ():
            if point.get(metric) is not None:
                yield metric, f"{at} {point[at]:g}", point[metric], unit
    for step, figure in (row.get("stages_ms") or {}).items():
        if figure is not None:
            yield "stages_ms", step, figure, "ms"


_CURVES = (
    ("batches", "batch", "images_per_second", "1/s"),
    ("sizes", "pixels", "latency_ms", "ms"),
    ("cores", "cores", "images_per_second", "1/s"),
)
_SINGLE = (
    ("images_per_second", "1/s"),
    ("end_to_end.times_baseline", "1"),
    ("end_to_end.photographs", "1"),
    ("loop.times_baseline", "1"),
    *((f"latency_ms.{key}", "ms") for key in ("p50", "p90", "p99", "min", "max", "mean")),
    ("latency_ms.count", "1"),
    ("times_baseline", "1"),
    ("default_times_as_fast", "1"),
    ("peak_mib.host", "MiB"),
    ("peak_mib.device", "MiB"),
    ("model_bytes", "B"),
    ("startup_seconds", "s"),
    ("miou", "%"),
    ("label_agreement", "1"),
    ("photographs", "1"),
    ("mean_pixels", "1"),
    ("median_ms", "ms"),
    ("min_ms", "ms"),
    ("max_ms", "ms"),
    ("repeats", "1"),
    ("times_ours", "1"),
    ("max_error", "1"),
    ("limit.floor_ms", "ms"),
    ("limit.share", "1"),
)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: object) -> str:
    """A name for a cell: in one line, and never a formula."""
    text = plain("" if name is None else str(name))
    return f"'{text}" if text.startswith(_FORMULA) else text
