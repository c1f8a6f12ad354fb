"""From a command to its first mask, in a new process each time: ours, PyTorch, and Python by itself.

    python benchmarks/start_up.py

The floor is what the interpreter takes to start and to import NumPy. torch.compile starts with an empty cache
each time. Writes benchmarks/results/start_up.json.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import environment, interleave, results_folder, save_results
from multisa.benchmarks.suite.contender import COMPILED, EAGER, REFERENCE, Contender
from multisa.benchmarks.suite.guest import Guest
from multisa.benchmarks.suite.setting import write_states
from multisa.runtime.bundle import default_bundle_path

PHOTOGRAPHS = Path(default_bundle_path()).parents[1] / "demo_images"
INTERPRETER, OURS = "Python and NumPy", "multisa segment, one photograph"
EAGER_START = "PyTorch eager, one photograph"
ON_CPUS = {"onnxruntime-cpu": "onnxruntime", "openvino": "openvino"}  # engines and their packages
# The same contender as in the suite, opened and run on one photograph.
_SEGMENT = (
    "import sys\n"
    "from pathlib import Path\n"
    "from multisa.benchmarks.suite.contender import Contender\n"
    "from multisa.benchmarks.suite.segment_contender import SegmentContender\n"
    "SegmentContender(Path(sys.argv[1]), Contender(*sys.argv[4:]), None, *map(Path, sys.argv[2:4]))\n"
)


def measure(repeats: int, bundle: Path, scratch: Path, *, compiled: bool) -> dict[str, Any]:
    """Times of each way to start, in turn, and how many times as long as ours it takes."""
    photograph, states = min(PHOTOGRAPHS.glob("*.jpg")), scratch / "states"
    with Guest(write_states, bundle, states):  # once: PyTorch's start is that of its own file of weights
        pass

    def program(contender: Contender) -> list[str]:
        words = [contender.backend, contender.precision, contender.device]
        return ["-c", _SEGMENT, str(bundle), str(photograph), str(states), *words]

    out = scratch / "out"
    command = ["segment", str(photograph), "-o", str(out), "--bundle", str(bundle), "--report", "0"]
    engines = [name for name, package in ON_CPUS.items() if importlib.util.find_spec(package)]
    ways = {
        INTERPRETER: ["-c", "import numpy"],
        "multisa --help": ["-m", "multisa.runtime.cli.main", "--help"],
        "multisa inspect": ["-m", "multisa.runtime.cli.main", "inspect", str(bundle)],
        OURS: ["-m", "multisa.runtime.cli.main", *command],
        **{
            on_engine(name): ["-m", "multisa.runtime.cli.main", *command, "--backend", name]
            for name in engines
        },
        "the engine alone, one photograph": program(REFERENCE),
        EAGER_START: program(Contender(EAGER, "fp32", "cpu")),
    }
    if compiled:
        ways["torch.compile, one photograph"] = program(Contender(COMPILED, "fp32", "cpu"))
    cases: dict[str, Callable[[], object]] = {
        name: partial(_start, words, out, scratch / "compiled") for name, words in ways.items()
    }
    slow = {name: 2 for name in cases if name.startswith("torch.compile")}
    times = interleave(cases, repeats=repeats, slow=slow)
    ours = times[OURS].median
    rows = {
        name: {**taken.to_json(), "times_ours": round(taken.median / ours, 2)}
        for name, taken in times.items()
    }
    share = round(times[INTERPRETER].median / ours, 3)
    limit = {"floor_ms": rows[INTERPRETER]["median_ms"], "share": share, "text": INTERPRETER}
    return {"ways": rows, "limit": limit}


def on_engine(name: str) -> str:
    """The way to start that asks for this engine instead of leaving it to `multisa segment`."""
    return f"multisa segment --backend {name}, one photograph"


def _start(words: Sequence[str], out: Path, compiled: Path) -> None:
    for folder in (out, compiled):
        shutil.rmtree(folder, ignore_errors=True)
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=variables)


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument("--quick", action="store_true", help="fewer repeats, without torch.compile")
    results_folder(parser)
    options = parser.parse_args()
    described = environment("onnxruntime", "openvino", "torch", quick=options.quick)
    repeats = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(repeats, options.bundle, Path(scratch), compiled=not options.quick)
    save_results("start_up", {"environment": described, **measured}, options.results)


if __name__ == "__main__":
    main()
