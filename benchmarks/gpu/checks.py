"""Runs tests that need the GPU and counts them: all skipped is not a success.

python -m multisa.benchmarks.gpu.checks --output tests-gpu.json tests/gpu
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from multisa.runtime.errors import ParityError
from multisa.runtime.files import write_json_atomically

_FAILED = 1  # pytest's exit code where tests failed; beyond it pytest itself did not get through
COUNTS = ("tests", "failures", "errors", "skipped")


def count(report: Path) -> dict[str, int]:
    """Add up a JUnit report: tests, failures, errors, skipped, passed."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(COUNTS, 0)
    for suite in suites:
        for name in COUNTS:
            counts[name] += int(suite.get(name, 0))
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return counts


def make_parser() -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("tests", nargs="+")
    return parser


def main(arguments: list[str]) -> int:
    """Run, count, write; 3 where a test failed or none passed, 1 where pytest did not get through."""
    options = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        code = subprocess.run([*command, *options.tests], check=False).returncode
        if code not in (0, _FAILED) or not report.is_file():
            print(f"error: pytest ended with exit code {code}, expected 0 or {_FAILED}: see above")
            return 1
        counts = count(report)
    write_json_atomically(options.output, counts)
    told = ", ".join(f"{number} {name}" for name, number in counts.items())
    if code or not counts["passed"]:
        print(f"error: {told}; expected none that fails and some that pass")
        return ParityError.exit_code
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
