"""What every benchmark here shares: timings taken in turn, the machine, and its peaks.

    times = interleave({"ours": ours, "theirs": theirs}, repeats=7)
    ratio = times["theirs"].median / times["ours"].median

A machine that is shared slows down and speeds up; cases that run in turn are slowed alike, so their ratio
holds where their times do not.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.kernels.cpu import native
from multisa.runtime.files import write_json_atomically
from multisa.runtime.system import installed_versions, usable_cpus

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Times:
    """Seconds of one case, one for each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Milliseconds: the median, the least and the most, and how many repeats."""
        low, high = min(self.seconds), max(self.seconds)
        return {
            "median_ms": round(1000 * self.median, 3),
            "min_ms": round(1000 * low, 3),
            "max_ms": round(1000 * high, 3),
            "repeats": len(self.seconds),
        }


def interleave(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, slow: Mapping[str, int] | None = None
) -> dict[str, Times]:
    """Time the cases in turn, `repeats` rounds after one that does not count.

    `slow` gives some cases fewer rounds, and no warm-up: those that take seconds.
    """
    rounds = {name: (slow or {}).get(name, repeats) for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, case in cases.items():
        if name not in (slow or {}):
            case()
    for turn in range(max(rounds.values())):
        for name, case in cases.items():
            if turn >= rounds[name]:
                continue
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def results_folder(parser: argparse.ArgumentParser) -> None:
    """Add the option `--results`."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder to write to: benchmarks/results"
    )


def save_results(subject: str, results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write SUBJECT.json in `folder` and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / f"{subject}.json", results)
    print(json.dumps(results, indent=2))


def environment(*packages: str, quick: bool = False) -> dict[str, Any]:
    """Describe the machine, its load by now, and the versions that take part: ask before measuring.

    quick: is it a run with fewer repeats, or parts?
    """
    return {
        "processor": processor(),
        "cores": usable_cpus(),
        "memory_gib": _memory_gib(),
        "instruction_set": native.instruction_set(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed_versions(("multisa", "numpy", *packages)),
        "commit": _commit(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "quick": quick,
    }


def peaks() -> dict[str, float]:
    """Measure what one thread can do: multiply-adds a second in float32, and bytes a second of a copy."""
    return {
        "multiply_adds_per_second": native.peak_multiply_adds(0.5),
        "copied_bytes_per_second": copied_bytes_per_second(1 << 28),  # 256 MiB, beyond every cache
    }


def copied_bytes_per_second(working_set: int) -> float:
    """Measure the bytes that a copy reads and writes in a second, over `working_set` bytes again and again.

    A working set that fits a cache is copied at that cache's rate.
    """
    source = np.ones(working_set // 8, dtype=np.float32)
    target = np.empty_like(source)
    copies = max((1 << 26) // working_set, 1)  # enough of them for the clock
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(copies):
            np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return copies * 2 * source.nbytes / min(seconds)


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1)


def _commit() -> str | None:
    """Of the checkout that is run, with a plus where files differ; None for a package that was installed."""
    folder = Path(__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    try:
        asked = [git, "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
