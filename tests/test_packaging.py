"""What is built is what is shipped: a wheel with the bundle, the presets and the images."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from multisa.runtime.bundle import default_bundle_path, load_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BUNDLE = 30_000_000  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: building leaves files behind, and those of earlier builds would get into the wheel.
    source = folder / "source"
    for package in ("kernels", "runtime", "training", "export", "benchmarks"):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels.fatbin")
        )
    for file in ("__init__.py", "py.typed", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    # The CUDA kernels have a test of their own, and take minutes.
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"MULTISA_CUDA": "0"})
    (path,) = folder.glob("multisa-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_carries_the_bundle(wheel: zipfile.ZipFile) -> None:
    prefix = "multisa/runtime/bundles/voc-animals/"
    files = {info.filename.removeprefix(prefix): info.file_size for info in wheel.infolist() if prefix in info.filename}
    assert set(files) == {"bundle.json", *load_bundle(default_bundle_path()).manifest.files}
    assert sum(files.values()) <= LARGEST_BUNDLE


def test_wheel_carries_presets_images_and_types(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, patterns in {
        "training/presets": "*.toml",
        "runtime/demo_images": "*.*",
        "runtime/report": "page.*",
        "kernels": "py.typed",
    }.items():
        for path in (ROOT / folder).glob(patterns):
            assert f"multisa/{folder}/{path.name}" in names


def test_wheel_carries_the_license(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_wheel_carries_the_compiled_kernels(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    (compiled,) = (name for name in names if name.startswith("multisa/kernels/_native") and ".pyi" not in name)
    assert compiled.endswith((".so", ".pyd"))
    assert "multisa/kernels/cuda/walk.py" in names


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    for file in ("__init__.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / file)
    for package in ("runtime", "training", "export", "benchmarks"):
        (tmp_path / package).mkdir()
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler", "MULTISA_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert "found no working C++17 compiler" in result.stderr and "apt-get install g++" in result.stderr


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"multisa"}
    assert not any("/tests/" in name for name in wheel.namelist())
    right_in_it = {name for name in wheel.namelist() if name.startswith("multisa/") and name.count("/") == 1}
    assert right_in_it == {"multisa/__init__.py", "multisa/py.typed"}


def test_base_install_brings_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {entry.split(">")[0].split("=")[0] for entry in project["dependencies"]}
    assert base == {"numpy", "onnxruntime", "pillow", "simplejpeg", "click", "tqdm", "filelock"}
