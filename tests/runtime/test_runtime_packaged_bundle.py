"""The bundle that comes with the package does what it is there for, on a photograph that comes with it."""

import json
from pathlib import Path

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.demo import PHOTOGRAPHS
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.images import read_mask
from multisa.runtime.label import label_images
from multisa.runtime.segment import segment_images


def test_the_cat_is_found(tmp_path: Path) -> None:
    bundle = load_bundle(default_bundle_path())
    cat, photograph = bundle.manifest.classes.index("cat"), PHOTOGRAPHS / "chelsea.jpg"
    labels = read_image_labels(PHOTOGRAPHS / "labels.csv", bundle.manifest.foreground)
    segment_images(photograph, tmp_path / "segment", bundle=bundle)
    label_images(photograph, tmp_path / "label", bundle=bundle, labels=labels)
    for run in ("segment", "label"):
        assert not (tmp_path / run / "failed.jsonl").exists()
        assert "cat" in json.loads((tmp_path / run / "labels.jsonl").read_text())["classes"]
        mask = read_mask(tmp_path / run / "masks" / "chelsea.png")
        # The cat fills most of the photograph, its head the middle of it.
        assert (mask == cat).mean() > 0.1
