"""Floors: what the arithmetic alone would take at the rate that this machine reaches."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.benchmarks.suite.contender import Contender
from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.benchmarks.suite.setting import Setting
from multisa.kernels import stencil_offsets
from multisa.kernels.common.walk import chebyshev_degree
from multisa.kernels.cpu import native
from multisa.runtime.bundle import load_bundle
from multisa.runtime.system import usable_cpus

_SECONDS = 0.5  # of measuring the peak


@dataclass(frozen=True)
class Floor:
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
            "text": "multiply-adds alone over the measured float32 peak of all cores",
        }


def peak_of_all_cores() -> float:
    """Multiply-adds a second in float32 with a thread on every core, measured."""
    cores = usable_cpus()
    with ThreadPoolExecutor(cores) as pool:  # the kernel runs without the interpreter's lock
        return sum(pool.map(native.peak_multiply_adds, [_SECONDS] * cores))


def segmenting_floor(setting: Setting, sizes: Sequence[tuple[int, int]]) -> Floor:
    """The mean floor over photographs of `sizes` (height, width)."""
    return _floor(setting, "segmenting", sizes)


def labelling_floor(setting: Setting, photographs: Sequence[tuple[tuple[int, int], int]]) -> Floor:
    """The mean floor over photographs (size, how many classes are labelled): networks and walk, no CRF."""
    return _floor(setting, "labelling", photographs)


def _floor(setting: Setting, method: str, inputs: Sequence[object]) -> Floor:
    if setting.pytorch_problem:
        return Floor(None, setting.pytorch_problem)
    try:
        with Guest(_Counter, setting.bundle.path, setting.states) as guest:
            counts = [guest.call(method, given) for given in inputs]
    except GuestFailedError as error:
        return Floor(None, str(error))
    return Floor(sum(counts) / len(counts) / peak_of_all_cores())


class _Counter:
    """Counts the multiply-adds of one photograph, where torch is."""

    def __init__(self, bundle: Path, states: Path) -> None:
        from multisa.benchmarks.suite.eager_state import load_affinity, load_cam, load_segmenter
        from multisa.export.fold import FoldedMultiSACAM

        opened = load_bundle(bundle)
        self._parameters = opened.manifest.parameters
        self._segmenter = load_segmenter(opened, states)
        self._cam = FoldedMultiSACAM(load_cam(opened, states))
        self._affinity = load_affinity(opened, states)

    def segmenting(self, size: tuple[int, int]) -> int:
        """Of the segmenter on a photograph of `size` (height, width)."""
        from multisa.export.cost import cost_of

        return cost_of(self._segmenter, size).multiply_adds

    def labelling(self, photograph: tuple[tuple[int, int], int]) -> int:
        """Of cam at every scale with its mirror image, folded, of affinity, and of the walk."""
        from multisa.export.cost import cost_of

        (height, width), classes = photograph
        scaled = [(math.ceil(height * s), math.ceil(width * s)) for s in self._parameters.cam_scales]
        cam = sum(2 * cost_of(self._cam, size).multiply_adds for size in scaled)
        affinity = cost_of(self._affinity.backbone, (height, width)).multiply_adds
        label, stride = self._parameters.label, self._parameters.walk_stride
        points = -(-height // stride) * -(-width // stride)
        pairs = 2 * len(stencil_offsets(label.walk_radius)) + 1
        return cam + affinity + chebyshev_degree(label.walk_steps) * points * classes * pairs
