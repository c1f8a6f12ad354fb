"""The demonstration: label and segment the photographs of the package, side by side on one page."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from multisa.runtime.bulk import RunOptions, RunSummary, check_failures
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.gallery import Panel, write_gallery
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.label import label_images
from multisa.runtime.progress import say
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

    Returns a summary for each run. A bundle of other classes labels from its own scores. Raises
    TooManyFailures, before it makes page and sheet, if any photograph failed.
    """
    options = RunOptions(gallery=True)
    try:
        labels = read_image_labels(PHOTOGRAPHS / "labels.csv", bundle.manifest.foreground)
    except UsageError as error:
        say(f"{error}; the photographs are labelled from scores")
        labels = None
    summaries = {
        "label": label_images(PHOTOGRAPHS, out / "label", bundle=bundle, labels=labels, options=options),
        "segment": segment_images(PHOTOGRAPHS, out / "segment", bundle=bundle, options=options),
    }
    for name, summary in summaries.items():
        check_failures(summary, "0", out / name)
    lines = (out / "segment" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    write_gallery(out, records, bundle.manifest, title="multisa demo", panels=PANELS)
    _write_contact_sheet(out, [Path(record["image"]).stem for record in records])
    return summaries


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
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "JPEG", quality=90)
    write_bytes_atomically(out / "demo.jpg", buffer.getvalue())
