"""What every benchmark here shares: timings taken in turn, the machine, and its peaks.

    times = interleave({"ours": ours, "theirs": theirs}, repeats=7)
    ratio = times["theirs"].median / times["ours"].median

A machine that is shared slows down and speeds up; cases that run in turn are slowed alike, so their ratio
holds where their times do not.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from multisa.kernels.native import native
from multisa.runtime.files import write_json_atomically

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


def save_results(subject: str, results: dict[str, Any]) -> None:
    """Write results/SUBJECT.json and print it."""
    write_json_atomically(RESULTS / f"{subject}.json", results)
    print(json.dumps(results, indent=2))


def environment(*packages: str) -> dict[str, Any]:
    """Describe the machine and the versions that took part."""
    versions = {}
    for package in ("multisa", "numpy", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instruction_set": native.instruction_set(),
        "python": platform.python_version(),
        "versions": versions,
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
