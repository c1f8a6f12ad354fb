"""Lets the tests of this folder import the modules that run CUDA kernels on the CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_on_cpu"))
