"""Render the report as one static file.

It loads nothing but the pictures beside it, and works without scripts. Styles and script are inlined, under a
content security policy that lets no other script run, whatever the names of images and classes contain.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.png import display_palette
from multisa.runtime.progress import pluralize
from multisa.runtime.report.summary import (
    BINS,
    MIN_SHARE,
    ReasonGroup,
    RunFigures,
    RunStatistics,
    busy_shares,
    describe_duration,
    describe_limit,
)

Colours = Mapping[str, Sequence[int]]


_ASSETS = Path(__file__).parent
# Characters that could end a script element or, in older parsers, a line of script.
_UNSAFE_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Picture:
    """One picture of a card."""

    caption: str
    kind: str  # "photo" or "overlay": what the page's "show" control toggles
    path: str  # relative to the page's folder, with "/"


@dataclass(frozen=True)
class Card:
    """One image on the page."""

    record: Mapping[str, Any]  # its line of labels.jsonl
    pictures: tuple[Picture, ...]
    mask: str  # path of the mask relative to the page's folder; empty if there is no file to link to
    sample: bool = False  # sampled from all images, not among the most uncertain


@dataclass(frozen=True)
class Page:
    """The content of one page."""

    title: str
    subtitle: str  # one line under it, as text
    cards: tuple[Card, ...]
    images: int  # of the run; more than there are cards when only some are pictured
    sections: str = ""  # HTML, already escaped
    run_key: str = ""  # of the run, which decisions about its images are kept under; empty: the page takes none


def write_page(path: Path, page: Page, manifest: Manifest) -> None:
    """Write the page to `path` atomically; the pictures of its cards must lie beside it."""
    background = manifest.classes[0]
    colours = class_colours(manifest)
    shown = {name for card in page.cards for name in shown_shares(card.record, background)}
    script = _asset("page.js")
    text = Template(_asset("page.html")).substitute(
        title=escape(page.title),
        subtitle=escape(page.subtitle),
        style=_asset("page.css"),
        script=script,
        script_hash=script_hash(script),
        panels=max((len(card.pictures) for card in page.cards), default=1),
        legend="".join(render_chip(name, colours) for name in manifest.foreground if name in shown),
        options="".join(f"<option>{escape(name)}</option>" for name in manifest.foreground if name in shown),
        sections=page.sections,
        gallery=_gallery_title(page),
        run=escape(page.run_key),
        cards="\n".join(render_card(card, colours, background) for card in page.cards),
        facts=json_for_script([card_facts(card, background) for card in page.cards]),
    )
    write_bytes_atomically(path, text.encode(errors="replace"))


def class_colours(manifest: Manifest) -> Colours:
    """The colour of each class on the page and in the overlays."""
    return dict(zip(manifest.classes, display_palette(len(manifest.classes)).tolist(), strict=True))


def shown_shares(record: Mapping[str, Any], background: str) -> dict[str, float]:
    """The classes shown for an image and their shares of its pixels, largest first."""
    shares = record["pixel_shares"].items()
    named = [(n, share) for n, share in shares if n != background and share >= MIN_SHARE]
    return dict(sorted(named, key=lambda item: (-item[1], item[0])))


def render_card(card: Card, colours: Colours, background: str) -> str:
    """Render one <article>. colours: of every class of the bundle; background: the name of class 0."""
    record = card.record
    image = escape(str(record["image"]))
    shares = shown_shares(record, background)
    bar = "".join(f'<i style="width:{share:.2%};{_paint(colours, n)}"></i>' for n, share in shares.items())
    chips = "".join(render_chip(n, colours, f"{share:.1%}") for n, share in shares.items())
    missing = "".join(render_chip(str(n), colours) for n in record.get("missing", ()))
    not_found = f'<p class="chips missing"><span>labelled, not found</span>{missing}</p>' if missing else ""
    ratio = f"{int(record['width'])}/{int(record['height'])}"
    pictures = "".join(_picture(picture, image) for picture in card.pictures)
    return (
        f'<article id="card-{int(record["index"])}" tabindex="0" aria-label="{image}">'
        f'<div class="panels" style="--ratio:{ratio}">{pictures}</div><div class="bar">{bar}</div>'
        f'<h3 title="{image}">{image}</h3>{_marks(card)}'
        f'<p class="chips">{chips or "<span>background only</span>"}</p>{not_found}'
        f'<p class="facts">{_facts(card)}</p></article>'
    )


def render_chip(name: str, colours: Colours, amount: str = "") -> str:
    """Render the name of a class beside its colour, with an optional amount."""
    number = f" <b>{amount}</b>" if amount else ""
    return f'<span class="chip"><i style="{_paint(colours, name)}"></i>{escape(name)}{number}</span>'


def card_facts(card: Card, background: str) -> dict[str, Any]:
    """What the page's filters need to know about a card, as JSON values."""
    record = card.record
    return {
        "index": int(record["index"]),
        "id": str(record["image"]),
        "uncertainty": float(record["uncertainty"]),
        "confidence": float(record["confidence"]),
        "classes": [*shown_shares(record, background)],
        "missing": [str(name) for name in record.get("missing", ())],
    }


def _picture(picture: Picture, image: str) -> str:
    link, caption = escape(quote(picture.path, errors="replace")), escape(picture.caption)
    return (
        f'<a class="{escape(picture.kind)}" href="{link}" tabindex="-1">'
        f'<img loading="lazy" src="{link}" alt="{caption}: {image}"><span>{caption}</span></a>'
    )


def _marks(card: Card) -> str:
    record = card.record
    uncertainty = float(record["uncertainty"])
    sample = ' <em title="sampled evenly from all images">sample</em>' if card.sample else ""
    return (
        f'<p class="marks"><i class="gauge" style="--uncertainty:{uncertainty:.1%}"></i>'
        f"<span>uncertainty <b>{uncertainty:.2f}</b></span>"
        f"<span>confidence <b>{record['confidence']:.1%}</b></span>"
        f"<span>disagreement <b>{record['disagreement']:.1%}</b></span>{sample}</p>"
    )


def _facts(card: Card) -> str:
    record = card.record
    facts = [f"{int(record['width'])} × {int(record['height'])}"]
    if record.get("labels_from"):
        facts.append(f"labels from {escape(str(record['labels_from']))}")
    if not any(picture.kind == "photo" for picture in card.pictures):
        facts.append("the image can no longer be read")
    if card.mask:
        facts.append(f'<a href="{escape(quote(card.mask, errors="replace"))}" tabindex="-1">mask</a>')
    return " · ".join(facts)


def _paint(colours: Colours, name: str) -> str:
    red, green, blue = colours.get(name, (128, 128, 128))
    return f"background:rgb({int(red)} {int(green)} {int(blue)})"


def render_totals(figures: RunFigures, found: RunStatistics) -> str:
    """Render the main numbers of the run."""
    scope = ", this run" if figures.kept else ""  # images of earlier, interrupted runs took other time
    numbers = {
        "images": f"{found.images:,}",
        "failed": f"{figures.failed:,}",
        "skipped": f"{figures.skipped:,}",
        f"images/s{scope}": f"{figures.images_per_second:.2f}",
        f"duration{scope}": describe_duration(figures.seconds),
        "mean uncertainty": f"{found.uncertainty:.2f}",
        "mean confidence": f"{found.confidence:.1%}",
    }
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
    return f'<dl class="totals">{tiles}</dl>'


def render_balance(found: RunStatistics, colours: Colours) -> str:
    """Render images and pixels of each class as bars, most frequent class first."""
    most = max(found.images_of_class.values(), default=0)
    widest = max((found.pixel_shares[name] for name in found.images_of_class), default=0.0)
    rows = "".join(
        f'<tr><th scope="row">{render_chip(name, colours)}</th>'
        f"{_bar(count, most, f'{count:,}')}"
        f"{_bar(found.pixel_shares[name], widest, f'{found.pixel_shares[name]:.2%}')}"
        f'<td class="number">{found.missing_of_class[name] or ""}</td></tr>'
        for name, count in sorted(found.images_of_class.items(), key=lambda item: (-item[1], item[0]))
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("class", "images", "share of pixels", "not found"))
    return render_section("Class balance", f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def render_stages(figures: RunFigures) -> str:
    """Render how busy each stage's workers were, and which stage is the bottleneck."""
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
    return render_section("Stages", f"<p>{limit[:1].upper()}{limit[1:]}.</p>{table}")


def render_uncertainty(found: RunStatistics) -> str:
    """Render the histogram of uncertainty over all images."""
    most = max(found.uncertainties, default=0)
    columns = "".join(
        f'<li title="uncertainty {i / BINS:.2f} to {(i + 1) / BINS:.2f}: {pluralize(n, "image")}">'
        f'<i style="height:{n / most if most else 0:.2%}"{" class=some" if n else ""}></i></li>'
        for i, n in enumerate(found.uncertainties)
    )
    scale = "<p class=scale><span>0</span><span>0.5</span><span>1</span></p>"
    label = f'aria-label="images by uncertainty, {BINS} bins from 0 to 1, at most {most} in one"'
    return render_section("Uncertainty", f'<ol class="histogram" {label}>{columns}</ol>{scale}')


def render_failures(groups: Mapping[str, ReasonGroup]) -> str:
    """Render the reasons of failures, with the first images of each."""
    items = "".join(
        f"<details><summary>{escape(reason)} <b>{pluralize(group.count, 'image')}</b></summary><ul>"
        + "".join(f"<li>{escape(image)}</li>" for image in group.ids)
        + (f"<li>and {group.count - len(group.ids):,} more</li>" if group.count > len(group.ids) else "")
        + "</ul></details>"
        for reason, group in groups.items()
    )
    return render_section("Failures", items) if items else ""


def render_backends(run: Mapping[str, Any]) -> str:
    """Render the bundle, the method, the backends and why they were selected, and versions."""
    bundle = run.get("bundle", {})
    facts = [("bundle", f"{bundle.get('name', '')}, sha256 {str(bundle.get('sha256', ''))[:16]}")]
    facts += [
        (key.replace("_", " "), str(run[key])) for key in ("label_method", "min_area") if run.get(key) is not None
    ]
    for graph, choice in run.get("backends", {}).items():
        text = ", ".join(str(choice[key]) for key in ("backend", "precision", "reason") if choice.get(key))
        facts.append((str(graph), text))
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    facts += [("versions", versions)] if versions else []
    facts += [("started", str(run["started"]))] if run.get("started") else []
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return render_section("Bundle and backends", f'<dl class="backends">{rows}</dl>')


def join_sections(sections: Sequence[str]) -> str:
    """Lay out the sections side by side, without the empty ones."""
    return f'<div class="sections">{"".join(section for section in sections if section)}</div>'


def _bar(value: float, most: float, text: str) -> str:
    width = value / most if most else 0.0
    return f'<td class="amount"><i style="width:{min(width, 1):.2%}"></i><b>{text}</b></td>'


def render_section(title: str, content: str) -> str:
    """Render a titled section; both are HTML, already escaped."""
    return f"<section><h2>{title}</h2>{content}</section>"


def json_for_script(value: Sequence[Any]) -> str:
    """JSON that is safe inside a script element: "</script>" in a name cannot end it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_UNSAFE_IN_SCRIPT)


def _gallery_title(page: Page) -> str:
    if len(page.cards) == page.images:
        return pluralize(len(page.cards), "image")
    if not page.cards:  # no pictures requested, or no writer whose masks can be read back
        return f"no pictures of {pluralize(page.images, 'image')} (they need the writer masks or tar)"
    samples = sum(card.sample for card in page.cards)
    uncertain = len(page.cards) - samples
    return f"the {uncertain} most uncertain of {page.images:,} images, and a sample of {samples} others"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """What the content security policy of a page names its script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
