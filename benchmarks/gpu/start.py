"""Runs a module of this folder before the package is installed: `multisa` is then this checkout.

python -P benchmarks/gpu/start.py main --plan
"""

import importlib
import sys
import types
from pathlib import Path


def start(module: str, arguments: list[str]) -> int:
    """Run main(arguments) of `multisa.benchmarks.gpu.MODULE` from this checkout; returns the exit code."""
    package = types.ModuleType("multisa")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["multisa"] = package
    code: int = importlib.import_module(f"multisa.benchmarks.gpu.{module}").main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(start(sys.argv[1], sys.argv[2:]))
