"""Roofline of the networks: how long the multiply-adds alone take at the machine's measured peak."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import roofline_share
from multisa.benchmarks.suite.candidates import Candidate
from multisa.benchmarks.suite.context import BenchContext
from multisa.benchmarks.worker_process import WorkerFailedError, WorkerProcess
from multisa.kernels import stencil_offsets
from multisa.kernels.common.walk import chebyshev_degree
from multisa.kernels.cpu import native
from multisa.runtime.bundle import load_bundle
from multisa.runtime.system import usable_cpus

_PEAK_SECONDS = 0.5  # spent on measuring the peak


@dataclass(frozen=True)
class Roofline:
    """Multiply-adds of one image over what all cores can do per second."""

    seconds: float | None  # None where they cannot be counted: torch is not installed
    problem: str = ""

    def limit(self, candidate: Candidate, seconds: float) -> dict[str, Any] | None:
        """How close `seconds` per image come to the roofline; only for fp32 on the CPU, whose peak is
        measured."""
        if candidate.device != "cpu" or candidate.precision != "fp32":
            return None
        if self.seconds is None:
            return {"roofline_ms": None, "share": None, "text": f"not counted: {self.problem}"}
        text = "multiply-adds alone over the measured float32 peak of all cores"
        return roofline_share(self.seconds, seconds, text)


def peak_of_all_cores() -> float:
    """Measured float32 multiply-adds per second with a thread on every core."""
    cores = usable_cpus()
    with ThreadPoolExecutor(cores) as pool:  # the kernel releases the GIL
        return sum(pool.map(native.peak_multiply_adds, [_PEAK_SECONDS] * cores))


def mean_roofline(context: BenchContext, method: str, inputs: Sequence[object]) -> Roofline:
    """The mean over `inputs`: sizes (height, width) for "segmenting"; (size, number of labelled classes) for
    "labelling", which counts the networks and the walk but not the CRF."""
    if context.pytorch_problem:
        return Roofline(None, context.pytorch_problem)
    try:
        with WorkerProcess(_Counter, context.bundle.path, context.weights) as worker:
            counts = [worker.call(method, given) for given in inputs]
    except WorkerFailedError as error:
        return Roofline(None, str(error))
    return Roofline(sum(counts) / len(counts) / peak_of_all_cores())


class _Counter:
    """Counts the multiply-adds of one image; needs torch."""

    def __init__(self, bundle: Path, weights: Path) -> None:
        from multisa.benchmarks.suite.pytorch import load_affinity, load_cam, load_segmenter
        from multisa.export.cost import cost_of
        from multisa.export.fold import FoldedMultiSACAM

        opened = load_bundle(bundle)
        self._parameters = opened.manifest.parameters
        self._segmenter = load_segmenter(opened, weights)
        self._cam = FoldedMultiSACAM(load_cam(opened, weights))
        self._affinity = load_affinity(opened, weights).backbone
        self._cost_of = cost_of

    def segmenting(self, size: tuple[int, int]) -> int:
        """The segmenter on an image of `size` (height, width)."""
        return self._cost_of(self._segmenter, size).multiply_adds

    def labelling(self, image: tuple[tuple[int, int], int]) -> int:
        """The folded cam at every scale with its mirror image, affinity, and the walk."""
        (height, width), classes = image
        scaled = [(math.ceil(height * s), math.ceil(width * s)) for s in self._parameters.cam_scales]
        cam = sum(2 * self._cost_of(self._cam, size).multiply_adds for size in scaled)
        affinity = self._cost_of(self._affinity, (height, width)).multiply_adds
        label = self._parameters.label
        stride = self._parameters.walk_stride
        points = -(-height // stride) * -(-width // stride)
        pairs = 2 * len(stencil_offsets(label.walk_radius)) + 1
        return cam + affinity + chebyshev_degree(label.walk_steps) * points * classes * pairs
