"""Write report.html of a run: figures, and pictures of the images to review."""

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import display_palette, overlay_mask
from multisa.runtime.report.page import (
    Card,
    Page,
    Picture,
    class_colours,
    join_sections,
    render_backends,
    render_balance,
    render_failures,
    render_stages,
    render_totals,
    render_uncertainty,
    write_page,
)
from multisa.runtime.report.summary import Record, RunStatistics, collect_statistics, figures_from_run, group_failures

UInt8 = npt.NDArray[np.uint8]

FOLDER = "report"  # below OUT
PAGE = "report.html"  # below OUT
LONG_SIDE = 640  # pixels of a picture
PHOTO = "photo"  # kind of a picture: the image
OVERLAY = "overlay"  # kind of a picture: the mask over the image

_JPEG_QUALITY = 88
_GREY = 128  # background of a mask whose image is gone
_PICTURE_NAME = re.compile(r"[0-9]{6,20}\.[a-z]+\.jpg")


def picture_path(index: int, kind: str) -> str:
    """Path below OUT of a picture of image `index`. kind: a lower-case word; runs use PHOTO and OVERLAY."""
    return f"{FOLDER}/{index:06d}.{kind}.jpg"


def write_image(out: Path, index: int, rgb: UInt8, kind: str = PHOTO) -> None:
    """Write an image, uint8 [H, W, 3], shrunk to LONG_SIDE, as JPEG."""
    size = working_size(rgb.shape[0], rgb.shape[1], LONG_SIDE, enlarge=1)
    write_jpeg(out / picture_path(index, kind), Image.fromarray(resize_image(rgb, size)))


def write_overlay(
    out: Path, index: int, rgb: UInt8 | None, mask: UInt8, manifest: Manifest, kind: str = OVERLAY
) -> None:
    """Write a mask drawn over its image, or over grey without one, shrunk to LONG_SIDE, as JPEG.

    rgb: uint8 [H, W, 3] or None; mask: uint8 [H, W] of the same size.
    """
    size = working_size(mask.shape[0], mask.shape[1], LONG_SIDE, enlarge=1)
    under = np.full((*size, 3), _GREY, np.uint8) if rgb is None else resize_image(rgb, size)
    drawn = overlay_mask(under, resize_mask(mask, size), display_palette(len(manifest.classes)))
    write_jpeg(out / picture_path(index, kind), Image.fromarray(drawn))


def clear_pictures(out: Path) -> None:
    """Remove the pictures of earlier reports: every file in OUT/report with the name of a picture.

    Raises UsageError if OUT/report is a link or not a folder, where pictures would be written elsewhere.
    """
    folder = out / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: is a link or not a folder, expected the report's own folder: remove it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PICTURE_NAME.fullmatch(path.name):
            path.unlink()


def write_jpeg(path: Path, image: Image.Image, quality: int = _JPEG_QUALITY) -> None:
    """Write a picture as JPEG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    write_bytes_atomically(path, buffer.getvalue())


REPORT_IMAGES = 200  # pictured on the page, whatever the size of the run
FAILED_IDS = 20  # listed for each reason


@dataclass(frozen=True)
class ReportData:
    """What the page about a run is made from."""

    manifest: Manifest
    run: Mapping[str, Any]  # .multisa/run.json
    records: Iterable[Record]  # the lines of labels.jsonl, read once
    failures: Iterable[Mapping[str, Any]]  # the lines of failed.jsonl, read once
    read_image: Callable[[Record], UInt8 | None]  # uint8 [H, W, 3] of a record, upright; None if it is gone
    read_mask: Callable[[Record], UInt8]  # uint8 [H, W] of a record
    run_key: str = ""  # see Page


def write_report(out: Path, data: ReportData, *, report_images: int = REPORT_IMAGES) -> None:
    """Write OUT/report.html, and the pictures it shows to OUT/report; remove older pictures there.

    report_images: how many images the page pictures at most. The pictures are determined by records and
    images; the page also contains times. Memory does not grow with the number of records. Raises UsageError
    if OUT/report is not the report's own folder.
    """
    manifest, run = data.manifest, data.run
    found = collect_statistics(data.records, manifest.classes, report_images)
    cards = _draw_cards(out, found, data)
    figures = figures_from_run(run)
    sections = (
        render_balance(found, class_colours(manifest)),
        render_uncertainty(found),
        render_stages(figures),
        render_failures(group_failures(data.failures, FAILED_IDS)),
        render_backends(run),
    )
    backends = dict.fromkeys(str(choice.get("backend")) for choice in run.get("backends", {}).values())
    page = Page(
        title=f"multisa {figures.command}",
        subtitle=" · ".join([manifest.name, *backends]),
        cards=cards,
        images=found.images,
        sections=render_totals(figures, found) + join_sections(sections),
        run_key=data.run_key,
    )
    write_page(out / PAGE, page, manifest)


def _draw_cards(out: Path, found: RunStatistics, data: ReportData) -> tuple[Card, ...]:
    """Write the pictures of the selected images; return their cards."""
    clear_pictures(out)
    cards = []
    for record in found.report_images:
        index = int(record["index"])
        rgb = data.read_image(record)
        pictures = []
        if rgb is not None:
            write_image(out, index, rgb)
            pictures.append(Picture("image", PHOTO, picture_path(index, PHOTO)))
        write_overlay(out, index, rgb, data.read_mask(record), data.manifest)
        pictures.append(Picture("mask", OVERLAY, picture_path(index, OVERLAY)))
        cards.append(Card(record, tuple(pictures), _mask_link(out, record), index in found.samples))
    return tuple(cards)


def _mask_link(out: Path, record: Record) -> str:
    """The path of the record's mask if it is a file of the run; masks in tar shards cannot be linked to."""
    mask = PurePosixPath(str(record.get("mask") or ""))
    is_inside = mask.parts and not mask.is_absolute() and ".." not in mask.parts
    return str(mask) if is_inside and (out / mask).is_file() else ""
