"""What a Python without the compiled kernels of the multisa that it imports says, and what to do."""

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ", which needs a C++17 compiler and Python.h (apt-get install g++ python3-dev)"
OURS = f"_native{EXTENSION_SUFFIXES[0]}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a folder with the name of the package, where nothing is compiled."""
    clone = tmp_path / "multisa"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "csrc", "bundles")
    for package in ("kernels", "runtime"):
        shutil.copytree(ROOT / package, clone / package, ignore=ignored)
    for file in ("__init__.py", "__main__.py", "pyproject.toml"):
        shutil.copy(ROOT / file, clone / file)
    return clone


def run_beside(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the folder of the clone; the folder `site` comes next on sys.path."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, 'site'); {arguments[0]}", *arguments[1:]]
    return subprocess.run(command, cwd=clone.parent, capture_output=True, text=True, check=False)


def reason(clone: Path) -> str:
    return run_beside(clone, "import multisa.kernels").stderr.splitlines()[-1].removeprefix("ImportError: ")


def test_a_clone_that_hides_the_installed_package(clone: Path) -> None:
    installed = clone.parent / "site/multisa"
    (installed / "kernels").mkdir(parents=True)
    (installed / "kernels" / OURS).touch()
    assert reason(clone) == (
        f"multisa.kernels: got the sources in {clone}, which hide the multisa installed in {installed}, expected the "
        f"installed one: keep {clone.parent} off sys.path (run Python in another folder or as python -P), or "
        f"pip install -e {clone}"
    )


@pytest.mark.parametrize(
    ("has", "named"), [(None, "no compiled module"), ("_native.pypy39.so", "got _native.pypy39.so")]
)
def test_kernels_that_are_not_compiled_for_this_python(clone: Path, has: str | None, named: str) -> None:
    if has:
        (clone / "kernels" / has).touch()
    folder = clone / "kernels"
    start = f"multisa.kernels: {named} in {folder}, expected {OURS}: "
    assert reason(clone) == f"{start}pip install -e {clone}{NEEDS}"
    (clone / "pyproject.toml").unlink()  # as an installed package, whose module was deleted
    assert reason(clone) == f"{start}pip install --force-reinstall . in a clone of the project{NEEDS}"


def test_kernels_that_do_not_load(clone: Path) -> None:
    (clone / "kernels" / OURS).write_bytes(b"no library")
    text = reason(clone)
    assert text.startswith("multisa.kernels: got the error '") and "file too short" in text
    assert text.endswith(f"', expected a module that loads: pip install -e {clone}{NEEDS}")


def test_the_command_line_says_it_in_one_line(clone: Path) -> None:
    program = "import runpy; sys.argv[0] = 'multisa'; runpy.run_module('multisa', run_name='__main__', alter_sys=True)"
    result = run_beside(clone, program, "segment", str(ROOT / "runtime/demo_images"), "-o", "out")
    assert result.returncode == 5
    assert result.stderr == f"error: {reason(clone)}\n"


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "multisa", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("multisa, version ")
