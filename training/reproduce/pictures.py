"""Drawing: heat maps over images, masks in the colours of a palette, sheets of captioned strips."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from multisa.runtime.imaging.decode import resize_image
from multisa.runtime.predict.postprocess import Float32, UInt8, resize_maps

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pixels of a sheet.
PANEL = (240, 240)  # width of a column, and maximum height of a panel
CAPTION_HEIGHT = 30
CAPTION_SIZE = 15  # of the font
NAME_HEIGHT = 22
NAME_SIZE = 13  # of the font
LEGEND_HEIGHT = 26  # of one line
SWATCH = 14  # side of a colour sample
SWATCH_GAP = 6  # above a swatch, and between it and its name
ENTRY_GAP = 18  # between the entries of a legend
GAP = 6  # between panels, and around the sheet

HEAT = 0.5  # opacity of the heat map over the image


@dataclass(frozen=True)
class Strip:
    """One row of a sheet."""

    name: str  # the id of the image, and its classes
    panels: tuple[UInt8, ...]  # RGB [H, W, 3], sized by `fitted`, one per column


@dataclass(frozen=True)
class Legend:
    """A colour and what it stands for."""

    name: str
    colour: tuple[int, int, int]


def heat_map(rgb: UInt8, scores: Float32) -> UInt8:
    """Blend class activations float32 [h, w] in [0, 1], blue to red, over an image uint8 [H, W, 3]."""
    full = resize_maps(scores[None], (rgb.shape[0], rgb.shape[1]))[0].clip(0, 1)
    # The "jet" colour map, usual for CAMs: three tents over 0..1, a quarter apart.
    colours = [1.5 - np.abs(4 * full - centre) for centre in (3, 2, 1)]
    heat = 255 * np.stack(colours, axis=-1).clip(0, 1)
    return np.asarray((1 - HEAT) * rgb + HEAT * heat + 0.5, dtype=np.uint8)


def coloured(mask: UInt8, palette: UInt8) -> UInt8:
    """Class ids uint8 [H, W] in the colours uint8 [256, 3]: RGB [H, W, 3]."""
    return palette[mask]


def fitted(panel: UInt8) -> UInt8:
    """Resize RGB [H, W, 3] to the width of a column, or less if it would be too high."""
    height, width = panel.shape[:2]
    scale = min(PANEL[0] / width, PANEL[1] / height)
    return resize_image(panel, (max(round(height * scale), 1), max(round(width * scale), 1)))


def sheet_size(columns: int, strips: Sequence[Strip], legend: Sequence[Legend] = ()) -> tuple[int, int]:
    """Width and height of the sheet in pixels."""
    width = columns * (PANEL[0] + GAP) + GAP
    height = CAPTION_HEIGHT + sum(NAME_HEIGHT + _height(strip) + GAP for strip in strips)
    return width, height + LEGEND_HEIGHT * len(_legend_lines(legend, width)) + GAP


def draw_sheet(captions: Sequence[str], strips: Sequence[Strip], legend: Sequence[Legend] = ()) -> bytes:
    """PNG bytes: a caption over each column, each strip below its name, the legend at the bottom."""
    size = sheet_size(len(captions), strips, legend)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font(CAPTION_SIZE)
    name_font = _font(NAME_SIZE)
    for column, caption in enumerate(captions):
        middle = (_left(column) + PANEL[0] / 2, CAPTION_HEIGHT / 2)
        draw.text(middle, _shortened(caption, font, PANEL[0]), fill="black", font=font, anchor="mm")
    top = CAPTION_HEIGHT
    for strip in strips:
        name = _shortened(strip.name, name_font, size[0] - 2 * GAP)
        draw.text((GAP, top + NAME_HEIGHT / 2), name, fill="black", font=name_font, anchor="lm")
        top += NAME_HEIGHT
        for column, panel in enumerate(strip.panels):
            picture = Image.fromarray(panel)
            left = _left(column) + (PANEL[0] - picture.width) // 2
            sheet.paste(picture, (left, top + (_height(strip) - picture.height) // 2))
        top += _height(strip) + GAP
    for line in _legend_lines(legend, size[0]):
        for left, entry in line:
            box = (left, top + SWATCH_GAP, left + SWATCH, top + SWATCH_GAP + SWATCH)
            draw.rectangle(box, fill=entry.colour, outline="black")
            start = (left + SWATCH + SWATCH_GAP, top + SWATCH_GAP + SWATCH / 2)
            draw.text(start, entry.name, fill="black", font=name_font, anchor="lm")
        top += LEGEND_HEIGHT
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _left(column: int) -> int:
    return GAP + column * (PANEL[0] + GAP)


def _height(strip: Strip) -> int:
    return int(max(panel.shape[0] for panel in strip.panels))


def _legend_lines(legend: Sequence[Legend], width: int) -> list[list[tuple[int, Legend]]]:
    """Entries with their left edges, broken into lines that fit."""
    lines: list[list[tuple[int, Legend]]] = []
    left = width
    for full in legend:
        entry = replace(full, name=_shortened(full.name, _font(NAME_SIZE), PANEL[0]))
        taken = SWATCH + SWATCH_GAP + int(_font(NAME_SIZE).getlength(entry.name)) + ENTRY_GAP
        if not lines or left + taken > width:
            lines.append([])
            left = GAP
        lines[-1].append((left, entry))
        left += taken
    return lines


def _shortened(text: str, font: Font, width: int) -> str:
    """The text on one line, or as much of its start as fits into `width` pixels before three dots."""
    text = " ".join(text[:width].split())  # a name may be of any length and hold line breaks
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda n: int(font.getlength(f"{text[:n]}...")))
    return f"{text[: max(fitting - 1, 0)]}..."


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
