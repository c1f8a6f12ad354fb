"""Makes the CUDA compiler of NVIDIA's wheels look like an installed one: ENVIRONMENT/bin/nvcc, and libcudart.

.venv-gpu/bin/python -P benchmarks/gpu/start.py toolkit
"""

import sys
import sysconfig
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Link what is in the wheels to where it is looked for; 1 where they are not there."""
    compilers = sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*/bin/nvcc"))
    if not compilers:
        print("error: the package nvidia-cuda-nvcc has brought no nvcc, expected nvidia/cu*/bin/nvcc")
        return 1
    nvcc = compilers[-1]
    link(Path(sys.prefix) / "bin" / "nvcc", nvcc)
    # Linkers look for a name without a version, and in lib64; the wheels have neither.
    toolkit = nvcc.parents[1]
    for library in (toolkit / "lib").glob("libcudart.so.*"):
        link(toolkit / "lib" / "libcudart.so", library)
    link(toolkit / "lib64", toolkit / "lib")
    print(nvcc)
    return 0


def link(name: Path, target: Path) -> None:
    """Make `name` a link to `target`, unless something else has that name."""
    if name.is_symlink():
        name.unlink()
    if not name.exists():
        name.symlink_to(target)
