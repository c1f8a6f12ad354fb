"""A page to look at the results: OUT/index.html with photographs and masks laid over them.

The page is one static file with relative links to OUT/overlays/; nothing is loaded from elsewhere.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.images import resize_image, resize_mask, working_size
from multisa.runtime.manifest import Manifest
from multisa.runtime.progress import counted

UInt8 = npt.NDArray[np.uint8]

LONG_SIDE = 640  # of the pictures on the page
OPACITY = 0.5  # of the mask over the photograph
SMALLEST_SHARE = 0.0005  # of a photograph's pixels that the page names a class with: less would be 0.0 %

_JPEG_QUALITY = 88


@dataclass(frozen=True)
class Panel:
    """One picture of each image on the page."""

    caption: str
    kind: str  # "photo" or "overlay", as `write_overlay` writes them
    run: str = ""  # folder of the run below OUT, ending in "/", when the page shows several runs


RUN_PANELS = (Panel("photograph", "photo"), Panel("mask", "overlay"))


def overlay(rgb: UInt8, mask: UInt8, palette: UInt8) -> UInt8:
    """Lay the mask's colours over a photograph and draw each region's edge in a lighter tone.

    rgb: uint8 [H, W, 3]; mask: uint8 [H, W], background 0 stays as it is; palette: uint8 [n, 3].
    Returns uint8 [H, W, 3].
    """
    colours = palette[mask].astype(np.float32)
    region = (mask > 0)[..., np.newaxis]
    blended = np.where(region, rgb * (1 - OPACITY) + colours * OPACITY, rgb)
    edge = (_edges(mask) & (mask > 0))[..., np.newaxis]
    return np.asarray(np.where(edge, (colours + 255) / 2, blended).round(), dtype=np.uint8)


def write_overlay(out: Path, name: str, rgb: UInt8, mask: UInt8, manifest: Manifest) -> None:
    """Write the two pictures of one image that the page shows, shrunk to 640 pixels, as JPEG.

    name: the image's name below OUT/overlays/, without extension.
    """
    size = working_size(mask.shape[0], mask.shape[1], LONG_SIDE)
    small, small_mask = resize_image(rgb, size), resize_mask(mask, size)
    _write_jpeg(out / _picture(name, "photo"), small)
    _write_jpeg(out / _picture(name, "overlay"), overlay(small, small_mask, manifest.mask_palette()))


def write_gallery(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    manifest: Manifest,
    *,
    title: str,
    panels: Sequence[Panel] = RUN_PANELS,
) -> None:
    """Write OUT/index.html about the images of `records` (the lines of labels.jsonl of the last panel's run).

    Their pictures must have been written by `write_overlay`.
    """
    colours = dict(zip(manifest.classes, manifest.palette, strict=True))
    shown = {name for record in records for name in _shares(record, manifest.classes[0])}
    legend = "".join(_chip(name, colours[name]) for name in manifest.foreground if name in shown)
    page = _PAGE.substitute(
        title=escape(title),
        bundle=escape(manifest.name),
        count=counted(len(records), "image"),
        legend=legend,
        panels=len(panels),
        cards="\n".join(_card(record, panels, colours, manifest.classes[0]) for record in records),
    )
    write_bytes_atomically(out / "index.html", page.encode())


def picture_paths(name: str) -> tuple[str, ...]:
    """Paths below OUT of the pictures `write_overlay` writes for the image `name`."""
    return tuple(_picture(name, kind) for kind in ("photo", "overlay"))


def _edges(mask: UInt8) -> npt.NDArray[np.bool_]:
    edges = np.zeros(mask.shape, np.bool_)
    rows, columns = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    edges[1:] |= rows
    edges[:-1] |= rows
    edges[:, 1:] |= columns
    edges[:, :-1] |= columns
    return edges


def _write_jpeg(path: Path, rgb: UInt8) -> None:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    write_bytes_atomically(path, buffer.getvalue())


def _picture(name: str, kind: str) -> str:
    return f"overlays/{name}.{kind}.jpg"


def _card(
    record: Mapping[str, Any],
    panels: Sequence[Panel],
    colours: Mapping[str, Sequence[int]],
    background: str,
) -> str:
    name = str(record["mask"]).removeprefix("masks/").removesuffix(".png")
    image = escape(str(record["image"]))
    mask = escape(quote(f"{panels[-1].run}{record['mask']}"))
    pictures = "".join(
        f'<a href="{link}"><img loading="lazy" src="{link}" alt="{caption}: {image}">'
        f"<span>{caption}</span></a>"
        for link, caption in (
            (escape(quote(panel.run + _picture(name, panel.kind))), escape(panel.caption)) for panel in panels
        )
    )
    ordered = sorted(_shares(record, background).items(), key=lambda item: (-item[1], item[0]))
    chips = "".join(_chip(key, colours[key], f"{share:.1%}") for key, share in ordered)
    bar = "".join(
        f'<i style="width:{share:.2%};background:{_css(colours[key])}"></i>' for key, share in ordered
    )
    ratio = f"{record['width']}/{record['height']}"
    return (
        f'<article><div class="panels" style="--ratio:{ratio}">{pictures}</div>'
        f'<div class="bar">{bar}</div><h2 title="{image}">{image}</h2>'
        f'<p class="chips">{chips or "<span>background only</span>"}</p>'
        f'<p class="facts">{record["width"]} × {record["height"]} · confidence {record["confidence"]:.1%} · '
        f'<a href="{mask}">mask</a></p></article>'
    )


def _shares(record: Mapping[str, Any], background: str) -> dict[str, float]:
    """The classes that the page names of an image, and their shares of its pixels."""
    shares = record["pixel_shares"].items()
    return {name: share for name, share in shares if name != background and share >= SMALLEST_SHARE}


def _chip(name: str, colour: Sequence[int], share: str = "") -> str:
    amount = f" <b>{share}</b>" if share else ""
    return f'<span class="chip"><i style="background:{_css(colour)}"></i>{escape(name)}{amount}</span>'


def _css(colour: Sequence[int]) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --ink: #1c2127; --soft: #626b76;
        --line: #dfe3e8; --link: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111418; --card: #1a1e24; --ink: #e8ebef; --soft: #98a2ae; --line: #2b313a;
          --link: #79b4ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { position: sticky; top: 0; z-index: 1; padding: 14px clamp(16px, 3vw, 40px); background: var(--card);
         border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 8px 24px;
         align-items: center; }
h1 { margin: 0; font-size: 18px; }
header p { margin: 0; color: var(--soft); }
.chips, .legend { display: flex; flex-wrap: wrap; gap: 6px; }
.legend { margin-left: auto; }
.chip { display: inline-flex; align-items: center; gap: 6px; padding: 1px 10px 1px 6px; font-size: 13px;
        border: 1px solid var(--line); border-radius: 99px; }
.chip i { width: 11px; height: 11px; border-radius: 50%; box-shadow: 0 0 0 1px rgb(128 128 128 / .45); }
.chip b { font-weight: 600; font-variant-numeric: tabular-nums; }
main { display: grid; gap: 20px;
       grid-template-columns: repeat(auto-fill, minmax(min(100%, calc($panels * 210px)), 1fr));
       padding: 24px clamp(16px, 3vw, 40px); align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.panels { display: grid; grid-template-columns: repeat($panels, 1fr); gap: 2px; background: var(--line); }
.panels a { display: block; position: relative; }
.panels span { position: absolute; left: 8px; bottom: 8px; padding: 0 8px; border-radius: 99px;
               font-size: 12px; color: #fff; background: rgb(0 0 0 / .55); }
.panels img { display: block; width: 100%; aspect-ratio: var(--ratio); max-height: 70vh; object-fit: contain;
            background: var(--page); }
.bar { display: flex; height: 4px; background: var(--line); }
h2 { margin: 12px 16px 6px; font-size: 15px; font-weight: 600; overflow: hidden; text-overflow: ellipsis;
     white-space: nowrap; }
article p { margin: 0 16px 8px; }
.chips > span:not(.chip), .facts { color: var(--soft); font-size: 13px; }
.facts { padding-bottom: 6px; }
a { color: var(--link); }
</style>
</head>
<body>
<header><h1>$title</h1><p>$count · $bundle</p><div class="legend">$legend</div></header>
<main>
$cards
</main>
</body>
</html>
""")
