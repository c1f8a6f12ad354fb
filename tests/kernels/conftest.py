"""Lets the tests of this folder import each other's helpers and those that run CUDA kernels on the CPU."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cuda_on_cpu")]
