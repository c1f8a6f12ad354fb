"""Write report.html of a run: figures, and pictures of the images to review."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.report.page import (
    Card,
    Page,
    Picture,
    join_sections,
    render_backends,
    render_balance,
    render_failures,
    render_stages,
    render_totals,
    render_uncertainty,
    write_page,
)
from multisa.runtime.report.pictures import (
    OVERLAY,
    PAGE,
    PHOTO,
    clear_pictures,
    picture_path,
    write_image,
    write_overlay,
)
from multisa.runtime.report.summary import (
    Record,
    RunStatistics,
    collect_statistics,
    figures_from_run,
    group_failures,
)

UInt8 = npt.NDArray[np.uint8]

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
        render_balance(found, dict(zip(manifest.classes, manifest.palette, strict=True))),
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
