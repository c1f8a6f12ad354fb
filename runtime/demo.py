"""`multisa demo`: label and segment the images of the package, and show both results on one page."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from multisa.runtime.api import RunSettings, label_images, segment_images
from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.imaging.decode import read_image, read_mask
from multisa.runtime.jobs.monitor import check_failures
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.progress import log
from multisa.runtime.report.page import Card, Page, Picture, write_page
from multisa.runtime.report.report import (
    OVERLAY,
    PHOTO,
    clear_pictures,
    picture_path,
    write_image,
    write_jpeg,
    write_overlay,
)

IMAGES = Path(__file__).parent / "demo_images"
RUNS = ("label", "segment")
CAPTIONS = {PHOTO: "image", "label": "multisa label", "segment": "multisa segment"}
COLUMN_WIDTH = 360  # pixels of the contact sheet, like those below
CAPTION_HEIGHT = 32
CAPTION_SIZE = 18
GAP = 4  # between rows and between columns


def run_demo(out: Path, bundle: Bundle, request: BackendRequest) -> dict[str, RunSummary]:
    """Write OUT/label, OUT/segment, OUT/index.html and the contact sheet OUT/demo.jpg.

    Returns the summary of each run. With a bundle of other classes than those of the demo's labels, `label`
    predicts the classes. Raises TooManyFailures, before writing page and sheet, if any image failed.
    """
    labels: Path | None = IMAGES / "labels.csv"
    try:
        read_image_labels(IMAGES / "labels.csv", bundle.manifest.foreground)
    except UsageError as error:
        log.info(f"{error}; the classes are predicted")
        labels = None
    settings = RunSettings(
        bundle=bundle,
        backend=request.backend,
        precision=request.precision,
        engine_cache=request.engine_cache,
        overwrite=True,
        report_images=0,  # the page of the demo is about both runs
    )
    summaries = {
        "label": label_images(IMAGES / "*.jpg", out / "label", labels, **settings),
        "segment": segment_images(IMAGES / "*.jpg", out / "segment", **settings),
    }
    for name, summary in summaries.items():
        check_failures(summary.failures, summary.images, None, out / name)
    lines = (out / "segment" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    _write_page(out, records, bundle.manifest)
    _write_contact_sheet(out, [int(record["index"]) for record in records])
    return summaries


def _write_page(out: Path, records: list[dict[str, Any]], manifest: Manifest) -> None:
    """Write OUT/index.html: the images with the masks of both runs, and the figures of `segment`."""
    clear_pictures(out)
    cards = []
    for record in sorted(records, key=lambda record: (-record["uncertainty"], record["index"])):
        index = record["index"]
        rgb = read_image(IMAGES / record["image"]).rgb
        write_image(out, index, rgb)
        for run in RUNS:
            write_overlay(out, index, rgb, read_mask(out / run / record["mask"]), manifest, kind=run)
        pictures = tuple(
            Picture(caption, PHOTO if kind == PHOTO else OVERLAY, picture_path(index, kind))
            for kind, caption in CAPTIONS.items()
        )
        cards.append(Card(record, pictures, f"segment/{record['mask']}"))
    write_page(out / "index.html", Page("multisa demo", manifest.name, tuple(cards), len(cards)), manifest)


def _write_contact_sheet(out: Path, indices: list[int]) -> None:
    """Write one picture: a captioned column for each kind of picture, a row for each image."""
    rows = [[_read_picture(out, index, kind) for kind in CAPTIONS] for index in indices]
    height = CAPTION_HEIGHT + sum(row[0].height for row in rows) + GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (COLUMN_WIDTH * len(CAPTIONS) + GAP * (len(CAPTIONS) - 1), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=CAPTION_SIZE)
    for column, caption in enumerate(CAPTIONS.values()):
        left, top = column * (COLUMN_WIDTH + GAP), CAPTION_HEIGHT
        middle = (left + COLUMN_WIDTH / 2, CAPTION_HEIGHT / 2)
        draw.text(middle, caption, fill="black", font=font, anchor="mm")
        for row in rows:
            sheet.paste(row[column], (left, top))
            top += row[column].height + GAP
    write_jpeg(out / "demo.jpg", sheet, quality=90)


def _read_picture(out: Path, index: int, kind: str) -> Image.Image:
    """Read one picture of one image, scaled to the column's width."""
    with Image.open(out / picture_path(index, kind)) as picture:
        height = round(picture.height * COLUMN_WIDTH / picture.width)
        return picture.resize((COLUMN_WIDTH, height), Image.Resampling.LANCZOS)
