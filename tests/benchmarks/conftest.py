"""The packaged images as a data set, and a made-up report."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from multisa import segment_images
from multisa.benchmarks.suite.context import BenchContext, BenchRequest, Effort, make_context
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.demo import IMAGES

sys.path.insert(0, str(Path(__file__).parent))  # for made_up.py

from made_up import made_up_report

TINY = Effort(
    latency_images=2,
    latency_rounds=2,
    masks=4,
    end_to_end=2,
    end_to_end_rounds=2,
    batches=(1, 2),
    sides=(96, 128),
    repeats=2,
    labelled=2,
    is_quick=True,
    dense_side=64,
)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged images in VOC layout; the masks are those of the packaged segmenter."""
    root = tmp_path_factory.mktemp("demo-voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    images = {"astronaut": ["person"], "chelsea": ["cat"]}
    labels = {}
    for use in ("train", "val"):
        for name, classes in images.items():
            shutil.copy(IMAGES / f"{name}.jpg", root / "JPEGImages" / f"{use}_{name}.jpg")
            labels[f"{use}_{name}"] = classes
        names = [f"{use}_{name}" for name in images]
        (root / "ImageSets" / "Segmentation" / f"{use}.txt").write_text("\n".join(names) + "\n")
    out = root / "segmented"
    segment_images(root / "JPEGImages", out, min_area=0)
    for mask in (out / "masks").glob("*.png"):
        shutil.copy(mask, root / "SegmentationClass" / mask.name)
    classes = load_bundle(default_bundle_path()).manifest.classes
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (root / "labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture
def make_tiny(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Make a context whose run takes seconds, on the given backends."""
    monkeypatch.setattr("multisa.benchmarks.suite.context.QUICK", TINY)

    def make(*backends: str) -> BenchContext:
        return make_context(BenchRequest(default_bundle_path(), demo_data, backends, quick=True), tmp_path)

    return make


@pytest.fixture
def made_up() -> dict[str, Any]:
    """A whole report; each test may change its own."""
    return made_up_report()
