"""The Python parts of benchmarks/gpu.sh: examine the driver, run and count the tests, write the summary.

python -m multisa.benchmarks.gpu_report driver --output driver.json
python -m multisa.benchmarks.gpu_report summary gpu-results
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.backends.tensorrt_runtime import LIBRARIES, import_library
from multisa.runtime.errors import BackendUnavailable, MultisaError, ParityError
from multisa.runtime.files import write_bytes_atomically, write_json_atomically

_INSTALL = "install NVIDIA's driver for this GPU; start a container with the GPU (--gpus all)"
_NO_CAM = "sm75"  # TensorRT-RTX builds no cam for it: attention needs float32 matrix products
_CUDA_PROVIDER = "onnxruntime-cuda"
_TESTS_FAILED = 1  # pytest's exit code; higher ones mean that pytest itself did not run
_MEANING = {0: "all passed", 3: "a gate failed", 5: "no usable GPU, driver or backend"}


def driver(output: Path) -> int:
    """Write which GPU is here and why a backend cannot use it; exit code 5 without a usable GPU."""
    from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError
    from multisa.kernels.cuda.pycuda_device import PycudaDevice

    probe = probe_gpus()
    try:
        if probe.problem:
            raise BackendUnavailable(probe.problem, remedy=_INSTALL)
        try:
            device = PycudaDevice()
        except DeviceUnavailableError as error:
            raise BackendUnavailable(f"{probe.gpus[0].name}: {error}") from error
    except BackendUnavailable as error:
        print(f"error: {error}")
        return error.exit_code
    target = "sm{}{}".format(*device.compute_capability)
    problems = {name: _library_problem(name, target) for name in LIBRARIES}
    no_wheel = f"onnxruntime-gpu has no wheel for {platform.machine()}"
    problems[_CUDA_PROVIDER] = "" if platform.machine() == "x86_64" else no_wheel
    found = {
        "gpu": device.name,
        "target": target,
        "gpus": [f"{gpu.name} ({gpu.target})" for gpu in probe.gpus],
        "driver_runs_cuda": probe.driver,
        "problems": problems,
    }
    write_json_atomically(output, found)
    print(json.dumps(found, indent=2))
    return 0


def _library_problem(name: str, target: str) -> str:
    """Why a TensorRT builds no engines for the GPU; empty where it does."""
    from multisa.export.tensorrt.builder import check_targets

    try:
        library = import_library(name)
        check_targets(library, (target,))
    except MultisaError as error:
        return " ".join(str(error).split())
    return f"it builds no cam for {target}" if library.is_rtx and target == _NO_CAM else ""


def tests(output: Path, arguments: Sequence[str]) -> int:
    """Run pytest and write the counts; 3 where a test failed or none passed, 1 where pytest did not run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        code = subprocess.run([*command, *arguments], check=False).returncode
        if code not in (0, _TESTS_FAILED) or not report.is_file():
            print(f"error: pytest ended with exit code {code}, expected 0 or {_TESTS_FAILED}")
            return 1
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
    counts["passed"] = 2 * counts["tests"] - sum(counts.values())
    write_json_atomically(output, counts)
    if code or not counts["passed"]:
        print(f"error: got {counts}, expected some that pass and none that fails")
        return ParityError.exit_code
    return 0


def summary(output: Path, ended: int | None = None) -> int:
    """Write summary.md and results.json from the steps and their files; returns the exit code of the run.

    ended: exit code of the step that ended the run early.
    """
    with (output / "steps.tsv").open(encoding="utf-8", newline="") as file:
        steps = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    code = ended if ended is not None else exit_code(steps)
    results: dict[str, Any] = {"exit_code": code, "steps": steps}
    for path in sorted([*output.glob("*.json"), *output.glob("bench/bench.json")]):
        if path.name != "results.json":
            results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    write_json_atomically(output / "results.json", results)
    lines = ["# multisa on a GPU", "", f"Exit code {code}: {_MEANING.get(code, 'a step failed')}."]
    gpu = results.get("driver", {})
    lines += [f"GPU: {gpu.get('gpu', 'none')}, {gpu.get('target', '')}", ""]
    lines += _table(("step", "exit code", "seconds", "remark"), steps)
    reports = [report for name, report in results.items() if name.startswith("parity-")]
    found = [(title, r) for report in reports for title, r in report.items() if isinstance(r, dict)]
    parity = [(title, r.get("passed"), "; ".join(r.get("problems", ()))) for title, r in found]
    lines += _table(("parity with fp32 on the CPU", "passed", "problems"), parity)
    names: Sequence[str] = ("kernel", "shape", "max_error", "label_agreement", "ways")
    lines += _table(names, [[row.get(n) for n in names] for row in results.get("kernels", {}).get("rows", ())])
    names = ("backend", "precision", "device", "images_per_second", "miou", "label_agreement", "problem")
    rows = results.get("bench", {}).get("segment", ())
    lines += _table(names, [[row.get(name) for name in names] for row in rows])
    write_bytes_atomically(output / "summary.md", "\n".join(lines).encode())
    print(output / "summary.md")
    return code


def exit_code(steps: Sequence[Sequence[str]]) -> int:
    """3 where a gate failed, else 1 where a step failed, else 5 where no backend passed parity, else 0."""
    codes = {name: code for name, code, *_ in steps if code != "skipped"}
    if str(ParityError.exit_code) in codes.values():
        return ParityError.exit_code
    if set(codes.values()) - {"0", str(BackendUnavailable.exit_code)}:
        return 1
    passed = any(code == "0" for name, code in codes.items() if name.startswith("parity-"))
    return 0 if passed else BackendUnavailable.exit_code


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [["" if cell is None else str(cell).replace("|", "/") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
    return [*lines, ""] if rows else []


def main(arguments: Sequence[str] | None = None) -> int:
    """One of the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("driver", "tests", "why-not", "summary"))
    parser.add_argument("names", nargs="*", help="why-not: driver.json and a backend; summary: the folder")
    parser.add_argument("--output", type=Path, help="file of driver and tests")
    parser.add_argument("--exit-code", default="", help="of the step that ended the run early")
    options, rest = parser.parse_known_args(arguments)
    names = options.names
    if options.part == "driver":
        return driver(options.output)
    if options.part == "tests":
        return tests(options.output, [*names, *rest])
    if options.part == "why-not":
        print(json.loads(Path(names[0]).read_text(encoding="utf-8"))["problems"][names[1]])
        return 0
    return summary(Path(names[0]), int(options.exit_code) if options.exit_code else None)


if __name__ == "__main__":
    sys.exit(main())
