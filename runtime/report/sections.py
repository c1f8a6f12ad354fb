"""What stands above the gallery: totals, class balance, stages, doubt, failures. Data is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from multisa.runtime.progress import counted
from multisa.runtime.report.cards import Colours, render_chip
from multisa.runtime.report.gather import BINS, Gathered
from multisa.runtime.report.reasons import ReasonGroup
from multisa.runtime.report.summary import (
    RunFigures,
    busy_shares,
    describe_duration,
    describe_limit,
)


def render_totals(figures: RunFigures, found: Gathered) -> str:
    """The numbers of the run, large."""
    of = ", last sitting" if figures.kept else ""  # what was kept was done in another time
    numbers = {
        "images": f"{found.images:,}",
        "failed": f"{figures.failed:,}",
        "passed over": f"{figures.passed_over:,}",
        f"images/s{of}": f"{figures.images_per_second:.2f}",
        f"duration{of}": describe_duration(figures.seconds),
        "mean doubt": f"{found.doubt:.2f}",
        "mean confidence": f"{found.confidence:.1%}",
    }
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
    return f'<dl class="totals">{tiles}</dl>'


def render_balance(found: Gathered, colours: Colours) -> str:
    """Images and pixels of each class as bars, the class of most images first."""
    most = max(found.images_of_class.values(), default=0)
    widest = max((found.pixel_shares[name] for name in found.images_of_class), default=0.0)
    rows = "".join(
        f'<tr><th scope="row">{render_chip(name, colours)}</th>'
        f"{_bar(count, most, f'{count:,}')}"
        f"{_bar(found.pixel_shares[name], widest, f'{found.pixel_shares[name]:.2%}')}"
        f'<td class="number">{found.missing_of_class[name] or ""}</td></tr>'
        for name, count in sorted(found.images_of_class.items(), key=lambda item: (-item[1], item[0]))
    )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("class", "images with it", "of all pixels", "not found")
    )
    return _section("Class balance", f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def render_stages(figures: RunFigures) -> str:
    """The share of its workers' time that each stage was busy; which stage is the limit."""
    workers = {stage.name: stage.workers for stage in figures.stages}
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{workers[name]}</td>'
        f"{_bar(share, 1.0, f'{share:.0%}')}</tr>"
        for name, share in busy_shares(figures).items()
    )
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("stage", "workers", "busy"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    limit = escape(describe_limit(figures))
    return _section("Stages", f"<p>{limit[:1].upper()}{limit[1:]}.</p>{table}")


def render_doubt(found: Gathered) -> str:
    """The histogram of doubt over all images."""
    most = max(found.doubts, default=0)
    columns = "".join(
        f'<li title="doubt {i / BINS:.2f} to {(i + 1) / BINS:.2f}: {counted(n, "image")}">'
        f'<i style="height:{n / most if most else 0:.2%}"{" class=some" if n else ""}></i></li>'
        for i, n in enumerate(found.doubts)
    )
    scale = "<p class=scale><span>0</span><span>0.5</span><span>1</span></p>"
    label = f'aria-label="images by doubt, {BINS} bins from 0 to 1, at most {most} in one"'
    return _section("Doubt", f'<ol class="histogram" {label}>{columns}</ol>{scale}')


def render_failures(groups: Mapping[str, ReasonGroup]) -> str:
    """The reasons, and the first images of each."""
    items = "".join(
        f"<details><summary>{escape(reason)} <b>{counted(group.count, 'image')}</b></summary><ul>"
        + "".join(f"<li>{escape(image)}</li>" for image in group.ids)
        + (f"<li>and {group.count - len(group.ids):,} more</li>" if group.count > len(group.ids) else "")
        + "</ul></details>"
        for reason, group in groups.items()
    )
    return _section("Failures", items) if items else ""


def render_engines(run: Mapping[str, Any]) -> str:
    """Bundle, engines and why they are these, versions."""
    bundle = run.get("bundle", {})
    facts = [("bundle", f"{bundle.get('name', '')}, sha256 {str(bundle.get('sha256', ''))[:16]}")]
    for graph, choice in run.get("engines", {}).items():
        text = ", ".join(str(choice[key]) for key in ("engine", "precision", "reason") if choice.get(key))
        facts.append((str(graph), text))
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    facts += [("versions", versions)] if versions else []
    facts += [("started", str(run["started"]))] if run.get("started") else []
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return _section("Bundle and engines", f'<dl class="engines">{rows}</dl>')


def join_sections(sections: Sequence[str]) -> str:
    """The sections beside each other; those without content are left out."""
    return f'<div class="sections">{"".join(section for section in sections if section)}</div>'


def _bar(value: float, most: float, text: str) -> str:
    width = value / most if most else 0.0
    return f'<td class="amount"><i style="width:{min(width, 1):.2%}"></i><b>{text}</b></td>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"
