"""The photographs of the package as a data set, and a report of made-up figures."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.suite.setting import Effort, Setting, make_setting
from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.demo import PHOTOGRAPHS
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import RunOptions, make_job

sys.path.insert(0, str(Path(__file__).parent))  # for made_up.py

from made_up import made_up_report

TINY = Effort(
    latency_photographs=2,
    rounds=2,
    masks=4,
    end_to_end=2,
    turns=2,
    batches=(1, 2),
    sides=(96, 128),
    repeats=2,
    labelled=2,
    is_quick=True,
    dense_side=64,
)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged photographs in VOC layout; the masks are what the packaged segmenter says of them."""
    root = tmp_path_factory.mktemp("demo-voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    photographs, labels = {"astronaut": ["person"], "chelsea": ["cat"]}, {}
    for use in ("train", "val"):
        for name, classes in photographs.items():
            shutil.copy(PHOTOGRAPHS / f"{name}.jpg", root / "JPEGImages" / f"{use}_{name}.jpg")
            labels[f"{use}_{name}"] = classes
        names = [f"{use}_{name}" for name in photographs]
        (root / "ImageSets" / "Segmentation" / f"{use}.txt").write_text("\n".join(names) + "\n")
    out = root / "segmented"
    options = RunOptions()
    images = str(root / "JPEGImages")
    job = make_job("segment", images, out, default_bundle_path(), BackendRequest(), options)
    run(job, options, LocalExecutor)
    for mask in (out / "masks").glob("*.png"):
        shutil.copy(mask, root / "SegmentationClass" / mask.name)
    classes = load_bundle(default_bundle_path()).manifest.classes
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (root / "labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture
def make_tiny(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A setting of seconds, on these engines."""
    monkeypatch.setattr("multisa.benchmarks.suite.setting.QUICK", TINY)

    def make(*engines: str) -> Setting:
        return make_setting(
            default_bundle_path(), demo_data, tmp_path, engines=engines, plans=None, quick=True
        )

    return make


@pytest.fixture
def made_up() -> dict[str, Any]:
    """A whole report; each test has its own to change."""
    return made_up_report()
