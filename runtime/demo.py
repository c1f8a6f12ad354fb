"""The demonstration: label and segment the images of the package, side by side on one page."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.imaging.decode import read_image, read_mask
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.monitor import check_failures
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.run import run as run_job
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.progress import log
from multisa.runtime.report.page import Card, Page, Picture, write_page
from multisa.runtime.report.pictures import (
    OVERLAY,
    PHOTO,
    clear_pictures,
    picture_path,
    write_image,
    write_overlay,
)

IMAGES = Path(__file__).parent / "demo_images"
RUNS = ("label", "segment")
CAPTIONS = {PHOTO: "image", "label": "multisa label", "segment": "multisa segment"}
COLUMN_WIDTH = 360  # pixels of the contact sheet, as the following
CAPTION_HEIGHT = 32
CAPTION_SIZE = 18
GAP = 4  # between rows and between columns


def run_demo(out: Path, bundle: Bundle, request: BackendRequest | None = None) -> dict[str, RunSummary]:
    """Write OUT/label, OUT/segment, OUT/index.html and the contact sheet OUT/demo.jpg.

    Returns a summary for each run. A bundle of other classes labels from its own scores. Raises
    TooManyFailures, before it makes page and sheet, if any image failed.
    """
    # The other files of the folder are the package's own; the page is about both runs.
    options = RunOptions(log_other_files=False, overwrite=True, report_images=0)
    labels: Path | None = IMAGES / "labels.csv"
    try:
        read_image_labels(IMAGES / "labels.csv", bundle.manifest.foreground)
    except UsageError as error:
        log.info(f"{error}; the images are labelled from scores")
        labels = None
    summaries = {
        run: run_job(
            make_job(run, str(IMAGES), out / run, bundle.path, request or BackendRequest(), options),
            options,
            LocalExecutor,
            labels=labels if run == "label" else None,
        )
        for run in RUNS
    }
    for name, summary in summaries.items():
        check_failures(summary.failures, summary.images, None, out / name)
    lines = (out / "segment" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    _write_page(out, records, bundle.manifest)
    _write_contact_sheet(out, [int(record["index"]) for record in records])
    return summaries


def _write_page(out: Path, records: list[dict[str, Any]], manifest: Manifest) -> None:
    """Write OUT/index.html: the images with the masks of both runs; facts are those of `segment`."""
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
    """Write one picture: a captioned column for each panel, a row for each image."""
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
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    write_bytes_atomically(out / "demo.jpg", buffer.getvalue())


def _read_picture(out: Path, index: int, kind: str) -> Image.Image:
    """One panel of one image, as wide as its column."""
    with Image.open(out / picture_path(index, kind)) as picture:
        height = round(picture.height * COLUMN_WIDTH / picture.width)
        return picture.resize((COLUMN_WIDTH, height), Image.Resampling.LANCZOS)
