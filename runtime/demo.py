"""The demonstration: label and segment the photographs of the package, side by side on one page."""

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from multisa.runtime.bulk import RunOptions, RunSummary, check_failures
from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.choice import EngineRequest
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
COLUMN_WIDTH = 360  # pixels of the contact sheet, as the following
CAPTION_HEIGHT = 32
CAPTION_SIZE = 18
GAP = 4  # between rows and between columns


def run_demo(out: Path, bundle: Bundle, request: EngineRequest | None = None) -> dict[str, RunSummary]:
    """Write OUT/label, OUT/segment, OUT/index.html and the contact sheet OUT/demo.jpg.

    Returns a summary for each run. A bundle of other classes labels from its own scores. Raises
    TooManyFailures, before it makes page and sheet, if any photograph failed.
    """
    options = RunOptions(gallery=True, tell_other_files=False)  # they are the package's own
    try:
        labels = read_image_labels(PHOTOGRAPHS / "labels.csv", bundle.manifest.foreground)
    except UsageError as error:
        say(f"{error}; the photographs are labelled from scores")
        labels = None
    summaries = {
        "label": label_images(
            PHOTOGRAPHS, out / "label", bundle=bundle, labels=labels, options=options, request=request
        ),
        "segment": segment_images(
            PHOTOGRAPHS, out / "segment", bundle=bundle, options=options, request=request
        ),
    }
    for name, summary in summaries.items():
        check_failures(summary, "0", out / name)
    lines = (out / "segment" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    write_gallery(out, records, bundle.manifest, title="multisa demo", panels=PANELS)
    _write_contact_sheet(out, [Path(record["image"]).stem for record in records])
    return summaries


def _write_contact_sheet(out: Path, names: list[str]) -> None:
    """Write one picture: a captioned column for each panel, a row for each photograph."""
    rows = [[_read_picture(out, panel, name) for panel in PANELS] for name in names]
    height = CAPTION_HEIGHT + sum(row[0].height for row in rows) + GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (COLUMN_WIDTH * len(PANELS) + GAP * (len(PANELS) - 1), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=CAPTION_SIZE)
    for column, panel in enumerate(PANELS):
        left, top = column * (COLUMN_WIDTH + GAP), CAPTION_HEIGHT
        middle = (left + COLUMN_WIDTH / 2, CAPTION_HEIGHT / 2)
        draw.text(middle, panel.caption, fill="black", font=font, anchor="mm")
        for row in rows:
            sheet.paste(row[column], (left, top))
            top += row[column].height + GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    write_bytes_atomically(out / "demo.jpg", buffer.getvalue())


def _read_picture(out: Path, panel: Panel, name: str) -> Image.Image:
    """One panel of one photograph, as wide as its column."""
    with Image.open(out / panel.run / "overlays" / f"{name}.{panel.kind}.jpg") as picture:
        height = round(picture.height * COLUMN_WIDTH / picture.width)
        return picture.resize((COLUMN_WIDTH, height), Image.Resampling.LANCZOS)
