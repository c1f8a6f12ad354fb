"""Shared parts of all benchmarks: interleaved timing, the machine's description, peak rates, results files.

    times = interleave({"ours": ours, "theirs": theirs}, repeats=7)
    ratio = times["theirs"].median / times["ours"].median

A shared machine slows down and speeds up. Cases that run alternately are slowed down alike, so their ratio is
reliable even where the absolute times are not.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.kernels.cpu import native
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.files import write_json_atomically
from multisa.runtime.system import installed_versions, processor_name, usable_cpus

RESULTS = Path(__file__).parent / "results"
CLI = ("-m", "multisa.runtime.cli.main")  # arguments of Python that start the `multisa` command
_COPIED_BYTES = 1 << 28  # 256 MiB: larger than every cache
_PROGRAM_SECONDS = 10  # for nvidia-smi and git


@dataclass(frozen=True)
class Times:
    """Seconds of one case, one value per repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Median, minimum and maximum in milliseconds, and the number of repeats."""
        return {
            "median_ms": round(1000 * self.median, 3),
            "min_ms": round(1000 * min(self.seconds), 3),
            "max_ms": round(1000 * max(self.seconds), 3),
            "repeats": len(self.seconds),
        }


def interleave(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, slow: Mapping[str, int] | None = None
) -> dict[str, Times]:
    """Time the cases alternately: one warm-up round that does not count, then `repeats` rounds.

    slow: repeats of cases that take seconds; they get no warm-up.
    """
    slow = slow or {}
    rounds = {name: slow.get(name, repeats) for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name in (name for name in cases if name not in slow):
        cases[name]()
    for index in range(max(rounds.values())):
        for name in (name for name in cases if index < rounds[name]):
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def with_ratios(times: Mapping[str, Times], ours: str) -> dict[str, dict[str, float | int]]:
    """`Times.to_json` of each case, plus "times_ours": its median over that of the case `ours`."""
    base = times[ours].median
    return {name: {**taken.to_json(), "times_ours": round(taken.median / base, 2)} for name, taken in times.items()}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs, for two rates that were measured in the same rounds."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def make_parser(description: str | None, *, quick: str = "", bundle: bool = False) -> argparse.ArgumentParser:
    """A parser with `--results`, and `--quick` (for which the help is given) and `--bundle`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder for the JSON: benchmarks/results"
    )
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    if bundle:
        parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    return parser


def save_results(subject: str, results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write SUBJECT.json in `folder` and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / f"{subject}.json", results)
    print(json.dumps(results, indent=2))


def environment(*packages: str, quick: bool = False) -> dict[str, Any]:
    """Describe the machine, its current load and package versions. Call it before measuring.

    quick: whether the run has fewer repeats or parts than a full one.
    """
    return {
        "processor": processor_name(),
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


def roofline_share(roofline: float, taken: float, text: str) -> dict[str, Any]:
    """The roofline (seconds), its share of the seconds taken, and what it is made of."""
    return {"roofline_ms": round(1000 * roofline, 3), "share": round(roofline / taken, 3), "text": text}


def peaks() -> dict[str, float]:
    """Peak rates of one thread: float32 multiply-adds per second, and bytes per second of a large copy."""
    return {
        "multiply_adds_per_second": native.peak_multiply_adds(0.5),
        "copied_bytes_per_second": copied_bytes_per_second(_COPIED_BYTES),
    }


def copied_bytes_per_second(working_set: int) -> float:
    """Bytes per second that a copy reads and writes, repeated over `working_set` bytes.

    A working set that fits a cache is copied at that cache's rate.
    """
    source = np.ones(working_set // 8, dtype=np.float32)
    target = np.empty_like(source)
    copies = max((1 << 26) // working_set, 1)  # enough for the resolution of the clock
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(copies):
            np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return copies * 2 * source.nbytes / min(seconds)


def peak_memory_mib(pid: int | str | None = "self") -> float | None:
    """Peak resident memory of a running process in MiB; None outside Linux or after its end.

    Not from getrusage, where a process inherits the peak of the process that started it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    _, found, rest = status.partition("VmHWM:")
    return round(int(rest.split()[0]) / 1024, 1) if found else None


def gpu_memory_mib() -> float | None:
    """GPU memory of this process in MiB; None where nvidia-smi is missing or does not list the process."""
    listed = _output("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in (listed or "").splitlines()]
    used = [float(row[1]) for row in rows if row[0] == str(os.getpid()) and row[1].isdigit()]
    return sum(used) if used else None


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1)


def _commit() -> str | None:
    """Commit of the checkout, with a plus where files differ; None for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    words = ("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    return _output("git", "-C", str(folder), *words)


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    words = [shutil.which(program) or program, *arguments]
    try:
        return subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True, timeout=_PROGRAM_SECONDS).strip()
    except (OSError, subprocess.SubprocessError):
        return None
