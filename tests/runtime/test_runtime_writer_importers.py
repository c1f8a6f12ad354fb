"""Formats read back by libraries that live in an environment of their own (tests/importers)."""

import hashlib
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.review import FORMAT, review_run
from multisa.runtime.writers.base import LabelledImage, file_name

pytestmark = pytest.mark.slow

NAMES = ("plain", "deep/a.b", "deep/a", "deep%2Fa", "a.jpg", "# ü 日本", "y" * 180 + "/" + "z" * 180)
LABELS = ["background", "red thing", "green", "ignore"]

Write = Callable[..., Path]


@pytest.fixture
def importer() -> Callable[..., Any]:
    """Runs tests/importers/SCRIPT.py with the libraries that read our formats; returns the JSON it prints."""
    root = Path(__file__).resolve().parents[2]
    python = Path(os.environ.get("MULTISA_IMPORTERS", root / ".venv-importers/bin/python"))
    if not python.exists():
        pytest.skip("no environment with the importers: `make .venv-importers/ready`, or MULTISA_IMPORTERS")

    def run(script: str, *arguments: object) -> Any:
        command = [str(python), str(root / f"tests/importers/{script}.py"), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def images(labelled: Callable[..., LabelledImage], blocks: Callable[..., np.ndarray]) -> list[LabelledImage]:
    masks = [blocks(30 + 3 * i, 51 - 2 * i, seed=i) for i in range(len(NAMES))]
    masks[1][:4, :7] = 255
    return [labelled(name, mask, i) for i, (name, mask) in enumerate(zip(NAMES, masks, strict=True))]


def digest(mask: np.ndarray) -> str:
    """What the scripts print of a mask."""
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask != 0).tobytes()).hexdigest()


def digests(mask: np.ndarray, *, background: bool) -> dict[str, str]:
    ids = {i: name for i, name in enumerate(LABELS[:3]) if i or background}
    if background:
        ids[255] = "ignore"
    return {name: digest(mask == i) for i, name in ids.items() if (mask == i).any()}


def test_datumaro_reads_its_folder(images: list[LabelledImage], write_all: Write, importer: Callable[..., Any]) -> None:
    out = write_all(["datumaro"], images)
    read = importer("read_datumaro", "common_semantic_segmentation", out / "datumaro")
    assert read["labels"] == LABELS
    assert read["items"] == {file_name(i.name): digests(i.mask, background=True) for i in images}


def test_datumaro_reads_the_coco_annotations(
    images: list[LabelledImage], write_all: Write, importer: Callable[..., Any]
) -> None:
    out = write_all(["coco"], images)
    (out / "coco/images").mkdir()  # Datumaro wants it there, with images or without
    read = importer("read_datumaro", "coco_instances", out / "coco")
    assert set(LABELS[1:3]) <= set(read["labels"])
    assert read["items"] == {i.name: digests(i.mask, background=False) for i in images}


def test_what_cvat_imports_with_reads_the_zips(
    images: list[LabelledImage], write_all: Write, importer: Callable[..., Any], tmp_path: Path
) -> None:
    """CVAT's "Segmentation mask 1.1" is Datumaro's VOC import of the unpacked zip."""
    items = {}
    for path in sorted((write_all(["cvat"], images) / "cvat").iterdir()):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / path.stem)
        read = importer("read_datumaro", "voc_segmentation", tmp_path / path.stem)
        assert read["labels"] == LABELS
        items.update(read["items"])
    expected = {image.name: digests(image.mask, background=False) for image in images}
    expected["deep%252Fa"] = expected.pop("deep%2Fa")
    expected["%23 ü 日本"] = expected.pop("# ü 日本")
    assert items == expected


def test_label_studio_reads_the_brushes_and_writes_the_same(
    images: list[LabelledImage], write_all: Write, importer: Callable[..., Any]
) -> None:
    read: dict[str, Any] = {}
    for path in sorted((write_all(["label-studio"], images) / "label-studio").glob("*.json")):
        read |= importer("read_brushes", path)
    assert read == {image.id: digests(image.mask, background=False) for image in images}


def test_tasks_of_a_review_are_read(photos: Path, bundle: Bundle, importer: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle)
    (key,) = re.findall(r'data-run="(\w+)"', (out / "report.html").read_text())
    decisions = tmp_path / "decisions.json"
    decided = {"a.jpg": "reject", "deep/c.jpg": "reject", "b.png": "accept"}
    decisions.write_text(json.dumps({"format": FORMAT, "run": key, "decisions": decided}))
    review_run(out, decisions, tmp_path / "review", bundle)
    masks = {name: read_mask(out / f"masks/{name}.png") for name in ("a", "deep/c")}
    expected = {name: digests(mask, background=False) for name, mask in masks.items()}
    with zipfile.ZipFile(tmp_path / "review/cvat/000000.zip") as archive:
        archive.extractall(tmp_path / "voc")
    assert importer("read_datumaro", "voc_segmentation", tmp_path / "voc")["items"] == expected
    brushes = importer("read_brushes", tmp_path / "review/label-studio/000000.json")
    assert brushes == {f"{name}.jpg": found for name, found in expected.items()}
