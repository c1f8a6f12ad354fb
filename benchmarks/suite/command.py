"""A command of multisa in a process of its own, as a user starts it: its record, and the memory it took."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multisa.benchmarks.suite.contender import Contender
from multisa.benchmarks.suite.guest import GuestFailedError
from multisa.benchmarks.suite.sample import Photograph, copy_images
from multisa.benchmarks.suite.setting import Setting

_LIMIT = 1800.0  # seconds
# Not by getrusage: a process inherits the largest memory of the one that has started it.
_PROGRAM = """
import sys
from pathlib import Path
from multisa.runtime.cli.main import main
try:
    main()
finally:
    status = Path("/proc/self/status")
    if status.exists():
        print("peak", status.read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""


def run_on_photographs(
    command: str,
    setting: Setting,
    contender: Contender,
    photographs: Sequence[Photograph],
    out: Path,
    *arguments: str,
) -> dict[str, Any]:
    """Run a command on these photographs as this contender; see `run_command`."""
    source = copy_images(photographs, setting.scratch / "photographs")
    words = ["--bundle", str(setting.bundle.path), "--backend", contender.backend]
    words += ["--precision", contender.precision]
    words += ["--engine-cache", str(setting.plans)] if setting.plans else []
    return run_command(command, source, out, *words, *arguments)


def run_command(command: str, source: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run `multisa COMMAND SOURCE -o OUT ARGUMENTS` anew, without its page.

    Returns its record (`OUT/.multisa/run.json`) and "peak_mib", None where the system does not tell. Raises
    GuestFailedError, with the command's own last words, where it fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    words = [command, str(source), "-o", str(out), "--report", "0", *arguments]
    program = [sys.executable, "-c", _PROGRAM]
    try:
        done = subprocess.run([*program, *words], capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise GuestFailedError(f"multisa {command}: not done within {_LIMIT:.0f} s, and ended") from None
    said = done.stderr.splitlines()
    if done.returncode != 0:
        last = next((line for line in reversed(said) if line.startswith("error:")), said[-1] if said else "")
        raise GuestFailedError(f"multisa {command}: exit code {done.returncode}: {last}")
    record: dict[str, Any] = json.loads((out / ".multisa" / "run.json").read_text(encoding="utf-8"))
    peaks = [int(line.split()[1]) / 1024 for line in said if line.startswith("peak ")]
    return record | {"peak_mib": round(peaks[-1], 1) if peaks else None}
