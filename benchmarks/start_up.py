"""From a command to its first mask, in a new process each time: ours, PyTorch, and Python by itself.

    python benchmarks/start_up.py

The lower bound is the interpreter's start plus the import of NumPy. torch.compile starts with an empty cache
each time. Writes benchmarks/results/start_up.json.
"""

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

from multisa.benchmarks.harness import (
    CLI,
    environment,
    interleave,
    make_parser,
    roofline_share,
    save_results,
    with_ratios,
)
from multisa.benchmarks.suite.candidates import COMPILED, EAGER, REFERENCE, Candidate
from multisa.benchmarks.suite.context import write_weights
from multisa.benchmarks.worker_process import WorkerProcess
from multisa.runtime.demo import IMAGES as DEMO_IMAGES

INTERPRETER = "Python and NumPy"
OURS = "multisa segment, one image"
EAGER_START = "PyTorch eager, one image"
COMPILE_REPEATS = 2
ON_CPUS = {"onnxruntime-cpu": "onnxruntime", "openvino": "openvino"}  # backends and their packages
# The same candidate as in the suite, opened and run on one image.
_SEGMENT = (
    "import sys\n"
    "from pathlib import Path\n"
    "from multisa.benchmarks.suite.candidates import Candidate\n"
    "from multisa.benchmarks.suite.segment_candidate import SegmentCandidate\n"
    "SegmentCandidate(Path(sys.argv[1]), Candidate(*sys.argv[4:]), None, *map(Path, sys.argv[2:4]))\n"
)


def measure(repeats: int, bundle: Path, scratch: Path, *, compiled: bool) -> dict[str, Any]:
    """Times of each way to start, run alternately, and their ratios to ours."""
    image = min(DEMO_IMAGES.glob("*.jpg"))
    weights = scratch / "weights"
    with WorkerProcess(write_weights, bundle, weights):  # once: PyTorch then starts from its file of weights
        pass

    def program(candidate: Candidate) -> list[str]:
        words = [candidate.backend, candidate.precision, candidate.device]
        return ["-c", _SEGMENT, str(bundle), str(image), str(weights), *words]

    out = scratch / "out"
    command = ["segment", str(image), "-o", str(out), "--bundle", str(bundle), "--report-images", "0"]
    backends = [name for name, package in ON_CPUS.items() if importlib.util.find_spec(package)]
    ways = {
        INTERPRETER: ["-c", "import numpy"],
        "multisa --help": [*CLI, "--help"],
        "multisa inspect": [*CLI, "inspect", str(bundle)],
        OURS: [*CLI, *command],
        **{f"multisa segment --backend {b}, one image": [*CLI, *command, "--backend", b] for b in backends},
        "the backend alone, one image": program(REFERENCE),
        EAGER_START: program(Candidate(EAGER, "fp32", "cpu")),
    }
    slow = {}
    if compiled:
        ways["torch.compile, one image"] = program(Candidate(COMPILED, "fp32", "cpu"))
        slow["torch.compile, one image"] = COMPILE_REPEATS
    cases: dict[str, Callable[[], object]] = {
        name: partial(_start, words, out, scratch / "compiled") for name, words in ways.items()
    }
    times = interleave(cases, repeats=repeats, slow=slow)
    limit = roofline_share(times[INTERPRETER].median, times[OURS].median, INTERPRETER)
    return {"ways": with_ratios(times, OURS), "limit": limit}


def _start(words: Sequence[str], out: Path, compiled: Path) -> None:
    for folder in (out, compiled):
        shutil.rmtree(folder, ignore_errors=True)
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=variables)


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__, quick="fewer repeats, without torch.compile", bundle=True)
    options = parser.parse_args()
    described = environment("onnxruntime", "openvino", "torch", quick=options.quick)
    repeats = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(repeats, options.bundle, Path(scratch), compiled=not options.quick)
    save_results("start_up", {"environment": described, **measured}, options.results)


if __name__ == "__main__":
    main()
