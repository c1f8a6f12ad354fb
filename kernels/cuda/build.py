"""Compiles kernels/csrc/cuda into kernels.fatbin, beside this file.

    python -m multisa.kernels.cuda.build              # needs nvcc, no GPU

Imports the standard library only, so that setup.py can run this file before the package is installed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installers put CUDA, not always on PATH
FATBIN = Path(__file__).resolve().with_name("kernels.fatbin")

# Machine code for Turing to Blackwell. Drivers compile the PTX for any later device.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX_ARCHITECTURES = (75, 120)
FLAGS = ("-O3", "-std=c++17", "--fatbin")


class BuildError(RuntimeError):
    """nvcc is missing, or refused the sources."""


@dataclass(frozen=True)
class FatbinRecord:
    """Sources and targets of a fatbin, stored as JSON beside it."""

    nvcc: str
    sources: str
    architectures: tuple[int, ...]
    ptx: tuple[int, ...]


def find_nvcc() -> Path:
    """Return nvcc from CUDA_HOME, PATH, /usr/local/cuda or the package nvidia-cuda-nvcc; raise BuildError."""
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(on_path)] if on_path else []
    candidates.append(TOOLKIT / "bin" / "nvcc")
    candidates += sorted(packages.glob("cu*/bin/nvcc"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BuildError(
        f"nvcc: not found in CUDA_HOME, on PATH, in {TOOLKIT} or as the package nvidia-cuda-nvcc; install "
        "CUDA 12.8 or later, or set CUDA_HOME"
    )


def source_digest(sources: Path = SOURCES) -> str:
    """Return the SHA-256 over names and contents of all CUDA sources."""
    digest = hashlib.sha256()
    for path in sorted(sources.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def nvcc_version(nvcc: Path) -> str:
    """Return the version that nvcc reports, such as "13.0.88"; raise BuildError."""
    text = _run([str(nvcc), "--version"])
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if not found:
        raise BuildError(f"{nvcc} --version: got {text!r}, expected a version such as V13.0.88")
    return found.group(1)


def build_fatbin(
    nvcc: Path,
    target: Path = FATBIN,
    *,
    sources: Path = SOURCES,
    architectures: tuple[int, ...] = ARCHITECTURES,
    ptx: tuple[int, ...] = PTX_ARCHITECTURES,
) -> FatbinRecord:
    """Compile kernels.cu of `sources` into `target`, and write its record beside it (.json).

    Both files appear complete or not at all. Raises BuildError with the messages of nvcc if it fails.
    """
    if not (sources / "kernels.cu").is_file():
        raise BuildError(f"{sources}: has no kernels.cu; compile the kernels in a checkout of the project")
    record = FatbinRecord(nvcc_version(nvcc), source_digest(sources), architectures, ptx)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fatbin = Path(folder) / target.name
        json_file = Path(folder) / "record.json"
        threads = f"--threads={os.cpu_count() or 1}"
        _run([str(nvcc), *FLAGS, threads, *codes, str(sources / "kernels.cu"), "-o", str(fatbin)])
        json_file.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        json_file.replace(target.with_suffix(".json"))
        fatbin.replace(target)
    return record


def _run(command: list[str]) -> str:
    """Run a compiler and return its output; raise BuildError with its messages if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: cannot be run: {error}") from error
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{result.stdout}{result.stderr}")
    return result.stdout


def main(arguments: list[str] | None = None) -> int:
    """Build from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels of multisa; needs no GPU.")
    parser.add_argument("--nvcc", type=Path, help="the compiler (default: CUDA_HOME, PATH, nvidia-cuda-nvcc)")
    parser.add_argument("--output", type=Path, default=FATBIN, help="the fat binary to write")
    options = parser.parse_args(arguments)
    try:
        record = build_fatbin(options.nvcc or find_nvcc(), options.output)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    architectures = ", ".join(f"sm_{arch}" for arch in record.architectures)
    print(f"{options.output}: nvcc {record.nvcc}, {architectures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
