"""Floors: what the arithmetic alone would take at the rate that this machine reaches."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.benchmarks.suite.contender import Contender
from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.kernels.native import native
from multisa.runtime.bundle import load_bundle
from multisa.runtime.cpus import usable_cpus

_SECONDS = 0.5  # of measuring the peak


@dataclass(frozen=True)
class SegmentingFloor:
    """Multiply-adds of one photograph over what all cores can do in a second."""

    seconds: float | None  # None where nobody can count: torch is not there
    problem: str = ""

    def limit(self, contender: Contender, seconds: float) -> dict[str, Any] | None:
        """How far from the floor `seconds` for one photograph are, for what computes in fp32 on the CPU."""
        if contender.device != "cpu" or contender.precision != "fp32":
            return None  # other arithmetic, whose peak is not measured
        if self.seconds is None:
            return {"floor_ms": None, "share": None, "text": f"not counted: {self.problem}"}
        return {
            "floor_ms": round(1000 * self.seconds, 3),
            "share": round(self.seconds / seconds, 3),
            "text": "multiply-adds of the network over the measured float32 peak of all cores",
        }


def peak_of_all_cores() -> float:
    """Multiply-adds a second in float32 with a thread on every core, measured."""
    cores = usable_cpus()
    with ThreadPoolExecutor(cores) as pool:  # the kernel runs without the interpreter's lock
        return sum(pool.map(native.peak_multiply_adds, [_SECONDS] * cores))


def segmenting_floor(bundle: Path, sizes: Sequence[tuple[int, int]]) -> SegmentingFloor:
    """The mean floor over photographs of `sizes` (height, width)."""
    try:
        with Guest(_Counter, bundle) as guest:
            counts = [guest.call("multiply_adds", size) for size in sizes]
    except GuestFailedError as error:
        return SegmentingFloor(None, str(error))
    return SegmentingFloor(sum(counts) / len(counts) / peak_of_all_cores())


class _Counter:
    """Counts a segmenter's multiply-adds, where torch is."""

    def __init__(self, bundle: Path) -> None:
        from multisa.export.unfold import segmenter_from_bundle

        self._network = segmenter_from_bundle(load_bundle(bundle))

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """Of one photograph."""
        from multisa.export.cost import cost_of

        return cost_of(self._network, size).multiply_adds
