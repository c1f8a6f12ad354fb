"""The cards of the page, one for each pictured image; everything from data is escaped here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

Colours = Mapping[str, Sequence[int]]

SMALLEST_SHARE = 0.0005  # of a photograph's pixels that the page names a class with: less would be 0.0 %


@dataclass(frozen=True)
class Picture:
    """One picture of a card."""

    caption: str
    kind: str  # "photo" or "overlay": what the view of the page shows or hides
    path: str  # below the page's folder, "/" between its parts


@dataclass(frozen=True)
class Card:
    """One image on the page."""

    record: Mapping[str, Any]  # its line of labels.jsonl
    pictures: tuple[Picture, ...]
    mask: str  # path of the mask below the page's folder; empty where there is none to link to
    sample: bool = False  # stands for the images that are not doubtful


def shown_shares(record: Mapping[str, Any], background: str) -> dict[str, float]:
    """The classes that the page names of an image, and their shares of its pixels, the largest first."""
    shares = record["pixel_shares"].items()
    named = [(n, share) for n, share in shares if n != background and share >= SMALLEST_SHARE]
    return dict(sorted(named, key=lambda item: (-item[1], item[0])))


def render_card(card: Card, colours: Colours, background: str) -> str:
    """One <article>. colours: of every class of the bundle; background: the name of class 0."""
    record = card.record
    image = escape(str(record["image"]))
    shares = shown_shares(record, background)
    bar = "".join(f'<i style="width:{share:.2%};{_paint(colours, n)}"></i>' for n, share in shares.items())
    chips = "".join(render_chip(n, colours, f"{share:.1%}") for n, share in shares.items())
    missing = "".join(render_chip(str(n), colours) for n in record.get("missing", ()))
    lost = f'<p class="chips missing"><span>given, not found</span>{missing}</p>' if missing else ""
    ratio = f"{int(record['width'])}/{int(record['height'])}"
    pictures = "".join(_picture(picture, image) for picture in card.pictures)
    return (
        f'<article id="card-{int(record["index"])}" tabindex="0" aria-label="{image}">'
        f'<div class="panels" style="--ratio:{ratio}">{pictures}</div><div class="bar">{bar}</div>'
        f'<h3 title="{image}">{image}</h3>{_marks(card)}'
        f'<p class="chips">{chips or "<span>background only</span>"}</p>{lost}'
        f'<p class="facts">{_facts(card)}</p></article>'
    )


def render_chip(name: str, colours: Colours, amount: str = "") -> str:
    """The name of a class beside its colour, and an amount."""
    number = f" <b>{amount}</b>" if amount else ""
    return f'<span class="chip"><i style="{_paint(colours, name)}"></i>{escape(name)}{number}</span>'


def card_facts(card: Card, background: str) -> dict[str, Any]:
    """What the filters of the page need of a card, for JSON."""
    record = card.record
    return {
        "index": int(record["index"]),
        "id": str(record["image"]),
        "doubt": float(record["doubt"]),
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
    doubt = float(record["doubt"])
    sample = ' <em title="one of an even spread over the other images">sample</em>' if card.sample else ""
    return (
        f'<p class="marks"><i class="gauge" style="--doubt:{doubt:.1%}"></i>'
        f"<span>doubt <b>{doubt:.2f}</b></span><span>confidence <b>{record['confidence']:.1%}</b></span>"
        f"<span>disagreement <b>{record['disagreement']:.1%}</b></span>{sample}</p>"
    )


def _facts(card: Card) -> str:
    record = card.record
    facts = [f"{int(record['width'])} × {int(record['height'])}"]
    if record.get("labels_from"):
        facts.append(f"labels from {escape(str(record['labels_from']))}")
    if not any(picture.kind == "photo" for picture in card.pictures):
        facts.append("the photograph cannot be read any more")
    if card.mask:
        facts.append(f'<a href="{escape(quote(card.mask, errors="replace"))}" tabindex="-1">mask</a>')
    return " · ".join(facts)


def _paint(colours: Colours, name: str) -> str:
    red, green, blue = colours.get(name, (128, 128, 128))
    return f"background:rgb({int(red)} {int(green)} {int(blue)})"
