"""The demonstration: label and segment the photographs of the package, side by side on one page."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from multisa.runtime.bulk import RunOptions, RunSummary
from multisa.runtime.bundle import Bundle
from multisa.runtime.gallery import Panel, write_gallery
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.label import label_images
from multisa.runtime.segment import segment_images

PHOTOGRAPHS = Path(__file__).parent / "demo_photos"
PANELS = (
    Panel("photograph", "photo", "segment/"),
    Panel("multisa label", "overlay", "label/"),
    Panel("multisa segment", "overlay", "segment/"),
)
SHEET_HEIGHT = 240  # pixels of each row of the contact sheet


def run_demo(out: Path, bundle: Bundle) -> dict[str, RunSummary]:
    """Write OUT/label, OUT/segment, OUT/index.html and the contact sheet OUT/demo.jpg.

    Returns a summary for each run. A bundle of other classes labels from its own scores.
    """
    options = RunOptions(gallery=True)
    foreground = bundle.manifest.foreground
    table = PHOTOGRAPHS / "labels.csv"
    labels = read_image_labels(table, foreground) if _named_classes(table) <= set(foreground) else None
    summaries = {
        "label": label_images(PHOTOGRAPHS, out / "label", bundle=bundle, labels=labels, options=options),
        "segment": segment_images(PHOTOGRAPHS, out / "segment", bundle=bundle, options=options),
    }
    lines = (out / "segment" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    write_gallery(out, records, bundle.manifest, title="multisa demo", panels=PANELS)
    _write_contact_sheet(out, [Path(record["image"]).stem for record in records])
    return summaries


def _named_classes(table: Path) -> set[str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {name for row in csv.DictReader(file) for name in row["labels"].split()}


def _write_contact_sheet(out: Path, names: list[str]) -> None:
    """Paste the panels of every photograph into one row, the rows into one picture."""
    rows = []
    for name in names:
        pictures = [Image.open(out / p.run / "overlays" / f"{name}.{p.kind}.jpg") for p in PANELS]
        width = round(pictures[0].width * SHEET_HEIGHT / pictures[0].height)
        rows.append(np.hstack([np.asarray(picture.resize((width, SHEET_HEIGHT))) for picture in pictures]))
    widest = max(row.shape[1] for row in rows)
    sheet = np.vstack(
        [np.pad(row, ((0, 4), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
    Image.fromarray(sheet).save(out / "demo.jpg", quality=90)
