"""docs/bundle-format.md: its programs run, and the format is as it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.cli.main import root

BUNDLE = default_bundle_path()
DEMO_IMAGES = BUNDLE.parents[1] / "demo_images"
PAGE = Path(__file__).parents[2] / "docs" / "bundle-format.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of the demo images as `multisa segment --min-area 0` writes them."""
    output = tmp_path_factory.mktemp("segment")
    result = CliRunner().invoke(root, ["segment", str(DEMO_IMAGES), "-o", str(output), "--min-area", "0"])
    assert result.exit_code == 0, result.output
    return output / "masks"


def assert_same_mask(got: Image.Image, expected: Image.Image) -> None:
    """Equal but for single pixels where two classes differ by less than rounding."""
    different = np.array(got) != np.array(expected)
    assert different.shape[:2] == (expected.height, expected.width)
    assert different.mean() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_the_example_writes_the_mask_of_multisa_segment(name: str, masks: Path, tmp_path: Path) -> None:
    (program,) = (program for program in PROGRAMS if "onnxruntime" in program)
    assert "multisa" not in program
    (tmp_path / "bundle").symlink_to(BUNDLE)
    shutil.copy(DEMO_IMAGES / f"{name}.jpg", tmp_path / "photo.jpg")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    with Image.open(tmp_path / "mask.png") as got, Image.open(masks / f"{name}.png") as expected:
        assert_same_mask(got, expected)
        assert_same_mask(got.convert("RGB"), expected.convert("RGB"))


def test_the_example_applies_the_orientation(masks: Path, tmp_path: Path) -> None:
    (program,) = (program for program in PROGRAMS if "onnxruntime" in program)
    (tmp_path / "bundle").symlink_to(BUNDLE)
    with Image.open(DEMO_IMAGES / "chelsea.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # stored rotated
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", "PNG", exif=exif)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    with Image.open(tmp_path / "mask.png") as got, Image.open(masks / "chelsea.png") as expected:
        assert_same_mask(got, expected)


def test_the_check_finds_an_altered_file(tmp_path: Path) -> None:
    (program,) = (program for program in PROGRAMS if "hashlib" in program)
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path).returncode == 0
    with (tmp_path / "bundle" / "cam.onnx").open("r+b") as file:
        file.write(b"x")
    check = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert check.returncode == 1 and check.stderr == "cam.onnx: the file was altered\n"


def test_every_key_of_the_manifest_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    manifest = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    parameters = manifest["parameters"]
    assert all(f"| `{key}` |" in page for key in manifest if key != "parameters")
    assert all(f"| `parameters.{key}` |" in page for key in parameters)
    numbers = (*parameters["label"], *parameters["label"]["crf"], *parameters["segmenter_label"])
    assert all(f"`{key}`" in page for key in numbers if key != "crf")
    assert str(load_bundle(BUNDLE).manifest.ignore_index) in page
