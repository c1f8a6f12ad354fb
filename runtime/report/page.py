"""The page as one static file: nothing is loaded but the pictures beside it, and it works without scripts.

Styles and script stand in the page, with a policy that lets no other script run, whatever a name holds.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.manifest import Manifest
from multisa.runtime.progress import counted
from multisa.runtime.report.cards import Card, card_facts, render_card, render_chip, shown_shares

_ASSETS = Path(__file__).parent
# What would end a script element or, in older parsers, a line of script.
_UNSAFE_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Page:
    """Everything on one page."""

    title: str
    subtitle: str  # one line under it, as text
    cards: tuple[Card, ...]
    images: int  # of the run; more than the cards when only some are pictured
    sections: str = ""  # HTML, already escaped


def write_page(path: Path, page: Page, manifest: Manifest) -> None:
    """Write the page to `path`, atomically; the pictures its cards name must lie beside it."""
    background = manifest.classes[0]
    colours = dict(zip(manifest.classes, manifest.palette, strict=True))
    shown = {name for card in page.cards for name in shown_shares(card.record, background)}
    script = _asset("page.js")
    text = Template(_asset("page.html")).substitute(
        title=escape(page.title),
        subtitle=escape(page.subtitle),
        style=_asset("page.css"),
        script=script,
        script_hash=_hash(script),
        panels=max((len(card.pictures) for card in page.cards), default=1),
        legend="".join(render_chip(name, colours) for name in manifest.foreground if name in shown),
        options="".join(f"<option>{escape(name)}</option>" for name in manifest.foreground if name in shown),
        sections=page.sections,
        gallery=_gallery_title(page),
        cards="\n".join(render_card(card, colours, background) for card in page.cards),
        facts=json_for_script([card_facts(card, background) for card in page.cards]),
    )
    write_bytes_atomically(path, text.encode(errors="replace"))


def json_for_script(value: Sequence[Any]) -> str:
    """JSON that can stand inside a script element: "</script>" in a name cannot end it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_UNSAFE_IN_SCRIPT)


def _gallery_title(page: Page) -> str:
    if len(page.cards) == page.images:
        return counted(len(page.cards), "image")
    if not page.cards:  # nobody asked for pictures, or the masks are in a form that is not read back
        return f"no pictures of {counted(page.images, 'image')} (they take the sinks masks or tar)"
    samples = sum(card.sample for card in page.cards)
    doubtful = len(page.cards) - samples
    return f"the {doubtful} most doubtful of {page.images:,} images, and {samples} of the others as a sample"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
