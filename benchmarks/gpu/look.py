"""The first step: what this machine has, before anything is installed and without asking the driver.

python -P benchmarks/gpu/start.py look --environment .venv-gpu --output look.json
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from multisa.runtime.files import write_json_atomically

# PyTorch with CUDA's libraries, TensorRT-RTX and ONNX Runtime, unpacked, and what pip holds meanwhile.
INSTALLED_BYTES = 15 << 30
RESULT_BYTES = 2 << 30  # plans
TOOLKIT = Path("/usr/local/cuda/bin")  # where NVIDIA's packages put it, not always on PATH
WHEELS = "lib/python*/site-packages/nvidia"  # of an environment: what NVIDIA's wheels bring
_RELEASE = re.compile(r'^PRETTY_NAME="?(.*?)"?$', re.MULTILINE)
_VERSION = re.compile(r"\bV(\d+\.\d+\.\d+)")


def find_nvcc(environment: Path) -> Path | None:
    """The CUDA compiler to use: of CUDA_HOME, PATH, /usr/local/cuda or the environment; None without one."""
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(on_path)] if on_path else []
    candidates += [TOOLKIT / "nvcc", *sorted(environment.glob(f"{WHEELS}/cu*/bin/nvcc"))]
    return next((path for path in candidates if path.is_file()), None)


def look(environment: Path, results: Path) -> dict[str, Any]:
    """Describe the machine; "problems" has a sentence for each thing that the steps cannot do without."""
    nvcc, compiler = find_nvcc(environment), shutil.which("g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found: dict[str, Any] = {
        "system": _first(Path("/etc/os-release"), _RELEASE) or platform.platform(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "g++": _said([compiler, "--version"]).partition("\n")[0] if compiler else None,
        "nvcc": f"{_version(nvcc)} ({nvcc})" if nvcc else None,
        "disk_free_bytes": {
            str(path): shutil.disk_usage(_there(path)).free for path in (environment, results)
        },
        "driver_files": driver_files(),
    }
    found["problems"] = problems = []
    if sys.platform != "linux":
        problems.append(f"the system is {sys.platform}, expected Linux")
    if not compiler:
        problems.append("no g++: apt-get install g++, or your system's package of it")
    if not header.is_file():
        problems.append(f"no {header}: apt-get install python3-dev, or your system's package of it")
    if importlib.util.find_spec("ensurepip") is None:
        problems.append("this Python has no ensurepip: apt-get install python3-venv")
    # What is installed already, or in part, takes nothing more.
    left = 0 if (environment / "ready").exists() else max(INSTALLED_BYTES - _size(environment), 0)
    needed = {environment: left, results: RESULT_BYTES}
    for path, size in needed.items():
        free = found["disk_free_bytes"][str(path)]
        if free < size:
            problems.append(
                f"{path}: got {free / 1e9:.1f} GB of free disk, expected {size / 1e9:.1f} GB: make room"
            )
    return found


def driver_files() -> list[str]:
    """Files that the NVIDIA driver leaves; that they are there does not say that it works."""
    places = [*Path("/dev").glob("nvidia*"), Path("/dev/dxg"), Path("/proc/driver/nvidia/version")]
    program = shutil.which("nvidia-smi")
    return sorted(str(path) for path in places if path.exists()) + ([program] if program else [])


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where it is not there."""
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files)


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _first(path: Path, pattern: re.Pattern[str]) -> str:
    try:
        found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""


def _version(nvcc: Path) -> str:
    found = _VERSION.search(_said([str(nvcc), "--version"]))
    return found[1] if found else "of an unknown version"


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return f"cannot be started: {error.strerror}"


def make_parser() -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(prog="look", description=__doc__)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def main(arguments: list[str]) -> int:
    """Look, print, write; 1 where something is missing."""
    options = make_parser().parse_args(arguments)
    found = look(options.environment, options.output.parent)
    write_json_atomically(options.output, found)
    for name, value in found.items():
        print(f"{name}: {value}")
    if found["problems"]:
        print(f"error: {'; '.join(found['problems'])}")
    return 1 if found["problems"] else 0
