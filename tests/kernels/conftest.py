"""Lets the tests of this folder import each other's helpers, and gives them a device that is the CPU."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from multisa.kernels.cuda.build import BuildError, find_nvcc

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cuda_on_cpu")]

if TYPE_CHECKING:
    from cpu_device import CpuDevice


@pytest.fixture(scope="session")
def nvcc() -> Path:
    """The compiler of the CUDA kernels."""
    try:
        return find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Path:
    """The CUDA kernels compiled for the CPU: all, or those of the header that a test module names MAIN."""
    from cpu_device import build

    return build(main=getattr(request.module, "MAIN", "kernels.cu"))


@pytest.fixture
def device(library: Path) -> "CpuDevice":
    """A device that carries out launches of the library on the CPU."""
    from cpu_device import CpuDevice

    return CpuDevice(library)
