"""The report as one static file: it loads nothing, runs no script, and every name in it is escaped."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from multisa.benchmarks.report.cells import plain
from multisa.benchmarks.report.charts import Chart, all_charts
from multisa.benchmarks.report.schema import STAGES
from multisa.benchmarks.report.svg import draw
from multisa.benchmarks.report.tables import Table, curve_tables, missing_tables, stage_tables
from multisa.benchmarks.report.verdict import environment_facts, machine, verdict
from multisa.runtime.errors import BackendUnavailable

_ASSETS = Path(__file__).parent
_HOW = (
    "The ways of one comparison take turns, so that a machine which slows down slows all of them; figures "
    "are medians. Each has worked before, which does not count; kernels that take seconds have no such "
    "warm-up. The points of a curve are each engine's own repeats, one after the other. Ratios hold "
    "where times do not: times are of this machine as it was then, its load included.",
    "End to end is from the photograph's file to the mask's; to start and to open the networks is not "
    "counted. Ours is the command, a new process in each turn, with as many threads as it takes. PyTorch "
    "runs in a plain loop: Pillow reads, resizes and writes, one photograph after the other. In that same "
    "loop all engines run once more, ours too: that is what an engine alone gains.",
    "Latency is of one decoded photograph at a time; p50, p90 and p99 are over all that were timed, and p99 "
    "is given where they are a hundred at least. Start-up is of a new process until it can work; each has "
    "started once before, so that its files are in memory.",
    "In labelling each turn has photographs of its own, the same for all: its repeats are no scatter, ratios "
    "are medians over the turns, and two reports are compared turn by turn. The dense recipe repeats one "
    "photograph.",
    "A floor is the time that the operations, or the bytes, of the work would take at the measured peak of "
    "the machine; the share says how much of the time taken that is.",
)


def page(bench: Mapping[str, Any]) -> str:
    """The page as HTML. Where matplotlib is not installed it says so in the place of the plots."""
    charts, problem = _drawn(bench)
    tables = [*stage_tables(bench), *missing_tables(bench)], curve_tables(bench)
    parts = [_verdict(bench), f'<p class="note">{escape(problem)}</p>' if problem else ""]
    for stage in STAGES:
        wide, narrow = ([table for table in some if table.stage == stage] for some in tables)
        figures = [_figure(chart, svg) for of, chart, svg in charts if of == stage]
        if wide:
            parts += [f'<h2 id="{stage}">{STAGES[stage]}</h2>', *map(_table, wide)]
            parts += [_side_by_side(figures), _side_by_side([_table(table) for table in narrow])]
    parts += [
        '<h2 id="how">How it was measured</h2>',
        _section("".join(f"<p>{escape(text)}</p>" for text in _HOW)),
    ]
    parts += ['<h2 id="environment">Environment</h2>', _environment(bench)]
    return Template((_ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title="multisa bench",
        subtitle=escape(_subtitle(bench)),
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        body="\n".join(part for part in parts if part),
    )


def _drawn(bench: Mapping[str, Any]) -> tuple[list[tuple[str, Chart, str]], str]:
    """(stage, chart, svg) of each chart, and why there are none."""
    charts = all_charts(bench)
    try:
        drawn = draw([chart for _, chart in charts]) if charts else []
    except BackendUnavailable as error:
        return [], f"No plots: {error}"
    return [(stage, chart, svg) for (stage, chart), svg in zip(charts, drawn, strict=True)], ""


def _subtitle(bench: Mapping[str, Any]) -> str:
    environment = bench["environment"]
    started = environment.get("started")
    parts = [
        machine(bench),
        f"started {started}" if started else "",
        "quick" * bool(environment.get("quick")),
    ]
    return plain(" · ".join(part for part in parts if part))


def _section(content: str) -> str:
    return f"<section>{content}</section>"


def _side_by_side(parts: list[str]) -> str:
    return f'<div class="pairs">{"".join(parts)}</div>' if parts else ""


def _verdict(bench: Mapping[str, Any]) -> str:
    sentences = verdict(bench)
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<section class="verdict">{text}</section>' if sentences else ""


def _environment(bench: Mapping[str, Any]) -> str:
    facts = environment_facts(bench)
    return _section(
        f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in facts)}</dl>"
    )


def _table(table: Table) -> str:
    kinds = ["words" if column.words else "" for column in table.columns]
    head = "".join(
        f'<th class="{kind}">{escape(column.title)}</th>'
        for kind, column in zip(kinds, table.columns, strict=True)
    )
    lines = "".join(
        f"<tr{' class=strong' * (index in table.strong)}>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # The first table of a stage has its heading above it already.
    title = "" if table.title == STAGES[table.stage] else f"<h3>{escape(table.title)}</h3>"
    return _section(
        f"{title}{note}<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _figure(chart: Chart, svg: str) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f"<figure><h3>{escape(chart.title)}</h3>{note}{svg}</figure>"
