"""The bundle that comes with the package does what it is there for, on an image that comes with it."""

import json
from pathlib import Path

from job_runs import run_label, run_segment

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.imaging.decode import read_mask

IMAGES = default_bundle_path().parents[1] / "demo_images"


def test_the_cat_is_found(tmp_path: Path) -> None:
    bundle = load_bundle(default_bundle_path())
    cat, image = bundle.manifest.classes.index("cat"), IMAGES / "chelsea.jpg"
    run_segment(image, tmp_path / "segment", bundle)
    run_label(image, tmp_path / "label", bundle, labels=IMAGES / "labels.csv")
    for run in ("segment", "label"):
        assert not (tmp_path / run / "failed.jsonl").exists()
        assert "cat" in json.loads((tmp_path / run / "labels.jsonl").read_text())["classes"]
        mask = read_mask(tmp_path / run / "masks" / "chelsea.png")
        # The cat fills most of the image, its head the middle of it.
        assert (mask == cat).mean() > 0.1
