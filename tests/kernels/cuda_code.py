"""The CUDA kernels through nvcc, one architecture at a time; kept in build/cuda_resources by digest."""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from multisa.kernels.cuda import build
from multisa.kernels.cuda.build import SOURCES

CACHE = Path(__file__).parents[2] / "build" / "cuda_resources"
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")


@dataclass(frozen=True)
class Compiled:
    """The kernels for one architecture: machine code, and what ptxas tells about it."""

    cubin: Path
    log: str


def kernel_names() -> set[str]:
    """The names of all kernels, from the sources."""
    return {name for path in SOURCES.glob("*.cuh") for name in KERNEL.findall(path.read_text())}


def compiled(nvcc: Path, architecture: int) -> Compiled:
    """Compile the kernels with the flags of the fat binary, unless that was done before."""
    key = f"{build.nvcc_version(nvcc)} {build.source_digest()} {build.FLAGS} {architecture}"
    log = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.txt"
    cubin = log.with_suffix(".cubin")
    if not (log.exists() and cubin.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = [flag for flag in build.FLAGS if flag != "--fatbin"]
        flags += ["--cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made, written = Path(folder) / cubin.name, Path(folder) / log.name
            command = [str(nvcc), *flags, str(SOURCES / "kernels.cu"), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            written.write_text(result.stderr)
            made.replace(cubin)
            written.replace(log)
    return Compiled(cubin, log.read_text())
