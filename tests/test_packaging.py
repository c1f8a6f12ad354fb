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
    for file in (
        "__init__.py",
        "__main__.py",
        "py.typed",
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    # nvcc is here or not, and nobody asked for the CUDA kernels, which take minutes.
    subprocess.run(command, check=True, capture_output=True, env=without_cuda())
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
        "training": "t*.[hj]*",
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


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py needs to compile the kernels."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so", "kernels.fatbin"))
    for file in ("__init__.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / file)
    for package in ("runtime", "training", "export", "benchmarks"):
        (tmp_path / package).mkdir()
    return tmp_path


def without_cuda() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "MULTISA_CUDA"}


def build(sources: Path, program: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py build_ext after `program`, in the environment without CUDA."""
    run = f"{program}\nimport runpy, sys\nsys.argv = ['setup.py', 'build_ext', '--build-lib', 'out']\n"
    command = [sys.executable, "-c", f"{run}runpy.run_path('setup.py', run_name='__main__')"]
    environment = without_cuda() | environment
    return subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False, env=environment)


NO_HEADERS = "import sysconfig; sysconfig.get_path = lambda name: '/no-such-folder'"  # build_ext does not use it


@pytest.mark.parametrize(
    ("compiler", "program", "problem", "debian", "fedora"),
    [
        ("no-such-compiler", "", "no-such-compiler was not found, a compiler of C++17", "g++", "gcc-c++"),
        (
            "false",
            NO_HEADERS,
            "/no-such-folder/Python.h was not found, a header of Python",
            "python3-dev",
            "python3-devel",
        ),
        (
            "no-such-compiler",
            NO_HEADERS,
            "no-such-compiler was not found, a compiler of C++17; /no-such-folder/Python.h was not found",
            "g++ python3-dev",
            "gcc-c++ python3-devel",
        ),
        ("false", "", "false failed (see above); it must compile C++17", "g++ python3-dev", "gcc-c++ python3-devel"),
    ],
)
def test_without_what_compiles_the_build_says_what_to_install(
    sources: Path, compiler: str, program: str, problem: str, debian: str, fedora: str
) -> None:
    result = build(sources, program, CC=compiler, CXX=compiler)
    assert result.returncode != 0
    assert f"multisa compiles its kernels when it is installed: {problem}" in result.stderr
    assert f"  Debian, Ubuntu   sudo apt-get install {debian}\n" in result.stderr
    assert f"  Fedora           sudo dnf install {fedora}\n" in result.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        ("", ""),
        ("0", ""),
        ("1", "MULTISA_CUDA=1: nvcc of the test was run"),
        ("yes", "MULTISA_CUDA: got 'yes', expected 0, or 1 to compile the CUDA kernels: set one"),
    ],
)
def test_cuda_is_compiled_when_it_is_asked_for(sources: Path, value: str | None, expected: str) -> None:
    """With an nvcc that fails, and without compiling the kernels on the CPU."""
    (sources / "kernels/cuda/build.py").write_text(
        "from pathlib import Path\nFATBIN = Path('kernels.fatbin')\nclass BuildError(Exception): pass\n"
        "def find_nvcc(): pass\ndef build_fatbin(nvcc, target): raise BuildError('nvcc of the test was run')\n"
    )
    skip = "from setuptools.command.build_ext import build_ext; build_ext.run = lambda self: None"
    result = build(sources, skip, **({} if value is None else {"MULTISA_CUDA": value}))
    assert (result.returncode != 0, result.stderr.strip()) == (bool(expected), expected)


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"multisa"}
    assert not any("/tests/" in name for name in wheel.namelist())
    right_in_it = {name for name in wheel.namelist() if name.startswith("multisa/") and name.count("/") == 1}
    assert right_in_it == {"multisa/__init__.py", "multisa/__main__.py", "multisa/py.typed"}


def test_base_install_brings_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {entry.split(">")[0].split("=")[0] for entry in project["dependencies"]}
    assert base == {"numpy", "onnxruntime", "pillow", "simplejpeg", "click", "tqdm", "filelock"}
