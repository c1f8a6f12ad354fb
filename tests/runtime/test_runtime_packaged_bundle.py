"""The bundle that comes with the package does what it is there for, on a photograph that comes with it."""

import json
from pathlib import Path

from bulk_runs import run_label, run_segment

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.cli.main import commands
from multisa.runtime.imaging.decode import read_mask

PHOTOGRAPHS = Path(commands.__file__).parent / "demo_images"


def test_the_cat_is_found(tmp_path: Path) -> None:
    bundle = load_bundle(default_bundle_path())
    cat, photograph = bundle.manifest.classes.index("cat"), PHOTOGRAPHS / "chelsea.jpg"
    run_segment(photograph, tmp_path / "segment", bundle)
    run_label(photograph, tmp_path / "label", bundle, labels=PHOTOGRAPHS / "labels.csv")
    for run in ("segment", "label"):
        assert not (tmp_path / run / "failed.jsonl").exists()
        assert "cat" in json.loads((tmp_path / run / "labels.jsonl").read_text())["classes"]
        mask = read_mask(tmp_path / run / "masks" / "chelsea.png")
        # The cat fills most of the photograph, its head the middle of it.
        assert (mask == cat).mean() > 0.1
