"""report.html of a run: one pass over its records, pictures of the images to look at, one static page."""

from collections.abc import Callable, Iterable, Mapping
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
    render_balance,
    render_engines,
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
from multisa.runtime.report.summary import Gathered, figures_from_run, gather, group_failures

UInt8 = npt.NDArray[np.uint8]
Record = Mapping[str, Any]

REPORT_IMAGES = 200  # images on the page, of a run of any size
FAILED_IDS = 20  # named for each reason


def write_report(
    out: Path,
    *,
    records: Iterable[Record],
    run: Mapping[str, Any],
    failures: Iterable[Mapping[str, Any]],
    manifest: Manifest,
    read_image: Callable[[Record], UInt8 | None],
    read_mask: Callable[[Record], UInt8],
    report_images: int = REPORT_IMAGES,
    path: Path | None = None,
) -> None:
    """Write the page about a run, and the pictures it shows to OUT/report; older pictures there go.

    records, failures: the lines of labels.jsonl and failed.jsonl, each read once. run: .multisa/run.json.
    read_image: uint8 [H, W, 3] of a record's image, upright, None when it cannot be had any more;
    read_mask: uint8 [H, W]. report_images: images on the page at most. path: of the page, in OUT itself;
    OUT/report.html when not given. The pictures are determined by records and images; the page holds times.
    Memory does not grow with the number of records. Raises UsageError where OUT/report is not the report's
    own folder.
    """
    path = path or out / PAGE
    found = gather(records, manifest.classes, report_images)
    cards = _draw(out, found, manifest, read_image, read_mask)
    figures = figures_from_run(run)
    sections = (
        render_totals(figures, found),
        render_balance(found, dict(zip(manifest.classes, manifest.palette, strict=True))),
        render_uncertainty(found),
        render_stages(figures),
        render_failures(group_failures(failures, FAILED_IDS)),
        render_engines(run),
    )
    backends = dict.fromkeys(str(choice.get("engine")) for choice in run.get("engines", {}).values())
    page = Page(
        title=f"multisa {figures.command}",
        subtitle=" · ".join([manifest.name, *backends]),
        cards=cards,
        images=found.images,
        sections=sections[0] + join_sections(sections[1:]),
    )
    write_page(path, page, manifest)


def _draw(
    out: Path,
    found: Gathered,
    manifest: Manifest,
    read_image: Callable[[Record], UInt8 | None],
    read_mask: Callable[[Record], UInt8],
) -> tuple[Card, ...]:
    clear_pictures(out)
    cards = []
    for record in found.report_images:
        index = int(record["index"])
        rgb = read_image(record)
        pictures = []
        if rgb is not None:
            write_image(out, index, rgb)
            pictures.append(Picture("image", PHOTO, picture_path(index, PHOTO)))
        write_overlay(out, index, rgb, read_mask(record), manifest)
        pictures.append(Picture("mask", OVERLAY, picture_path(index, OVERLAY)))
        cards.append(Card(record, tuple(pictures), _mask_link(out, record), index in found.samples))
    return tuple(cards)


def _mask_link(out: Path, record: Record) -> str:
    """The record's mask where it is a file of the run; in a shard there is none to link to."""
    mask = PurePosixPath(str(record.get("mask") or ""))
    plain = mask.parts and not mask.is_absolute() and ".." not in mask.parts
    return str(mask) if plain and (out / mask).is_file() else ""
