"""Graphs and engines against the bundle's fp32 graphs on ONNX Runtime's CPU; no PyTorch, no onnx.

`multisa parity BUNDLE --backend tensorrt-rtx --precision fp16 --photographs FOLDER`
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.export.parity import Compared, Outputs, ParityReport
from multisa.export.photographs import Photograph, Photographs, add_pseudo_mask, truth_of, working_image
from multisa.runtime.backends.base import (
    AFFINITY,
    CAM,
    CONTRACTS,
    SEGMENTER,
    Backend,
    GraphContract,
    graph_file,
)
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import (
    BackendRequest,
    backend_precisions,
    describe_selection,
    select_backend,
)
from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.progress import Progress, log, pluralize

UInt8 = npt.NDArray[np.uint8]

_TOGETHER = (CAM, AFFINITY)  # pseudo-masks are made of both, and cam is compared where they have classes


@dataclass(frozen=True)
class Variant:
    """Graphs of one precision as one way of running them: what one report compares."""

    title: str
    precision: str
    contracts: tuple[GraphContract, ...]  # of the graphs there are
    open: Callable[[GraphContract], Backend]


def on_cpu(graphs: Mapping[str, bytes], threads: int) -> Callable[[GraphContract], Backend]:
    """Open graphs, by the name of their contract, on ONNX Runtime's CPU."""
    return lambda contract: OnnxRuntimeBackend(graphs[contract.name], threads=threads, contract=contract)


def compare_variants(
    bundle: Bundle, variants: Sequence[Variant], photographs: Photographs, *, threads: int
) -> dict[str, ParityReport]:
    """Compare every variant with the bundle's fp32 graphs, pseudo-masks and ground truth included."""
    reports = {variant.title: ParityReport(variant.precision) for variant in variants}
    n_classes, label = len(bundle.manifest.classes), bundle.manifest.parameters.label
    for contracts, chosen in ((_TOGETHER, photographs.labelled), ((SEGMENTER,), photographs.segmented)):
        taking = [v for v in variants if all(contract in v.contracts for contract in contracts)]
        if not taking:
            continue
        graphs = {contract.name: bundle.read_file(graph_file(contract)) for contract in contracts}
        names = ", ".join(graphs)
        with ExitStack() as stack, Progress(len(chosen), f"parity of {names}") as bar:
            reference = _opened(stack, on_cpu(graphs, threads), contracts)
            engines = {variant.title: _opened(stack, variant.open, contracts) for variant in taking}
            for photograph in chosen:
                image = working_image(photograph, bundle.manifest.parameters.long_side)
                expected = _answers(reference, image)
                classes = _classes(bundle.manifest, photograph, expected)
                add_pseudo_mask(image, classes, expected, label)
                truth = truth_of(photograph.mask, image)
                for title, runners in engines.items():
                    got = _answers(runners, image)
                    add_pseudo_mask(image, classes, got, label)
                    reports[title].add(Compared(expected, got, truth), n_classes=n_classes)
                bar.advance()
    return reports


def compare_engine(
    bundle: Bundle, request: BackendRequest, photographs: Photographs, *, threads: int
) -> tuple[str, ParityReport]:
    """Compare the bundle's graphs in one precision, on one engine, with its fp32 graphs on the CPU.

    Returns what was compared, "fp16 on tensorrt-rtx", and the report, which says whether every figure is
    within the limits of the precision. Raises as `select_backend` does, ParityError for outputs that are
    missing or of another shape.
    """
    there = [c for c in CONTRACTS if request.precision in backend_precisions(bundle, c, request.backend)]
    alone = [c for c in there if c in _TOGETHER]
    if len(alone) == 1:
        log.info(f"{alone[0].name}: left out, cam and affinity are compared by the masks that both make")
        there.remove(alone[0])
    with ExitStack() as stack:
        choices = []
        for contract in there or CONTRACTS:  # without any, what is missing is said by the first
            choices.append(select_backend(bundle, contract, request, threads=threads))
            stack.callback(choices[-1].backend.close)
        for line in describe_selection(choices):
            log.info(line)
        opened = {choice.graph: choice.backend for choice in choices}
        title = f"{request.precision} on {choices[0].backend.name}"
        variant = Variant(title, request.precision, tuple(there), lambda contract: opened[contract.name])
        return title, compare_variants(bundle, [variant], photographs, threads=threads)[title]


def describe_figures(report: ParityReport) -> str:
    """A line of figures for each output, for people."""

    def text(key: str, value: float) -> str:
        if not math.isfinite(value):
            return f"{key} unknown"
        return f"{key} {value:.4%}" if key.endswith("agreement") else f"{key} {value:.4g}"

    return "\n".join(
        f"{name:<12} {', '.join(text(*pair) for pair in difference.figures().items())} "
        f"({pluralize(difference.photographs, 'photograph')})"
        for name, difference in report.differences.items()
    )


def _opened(
    stack: ExitStack, open_one: Callable[[GraphContract], Backend], contracts: Sequence[GraphContract]
) -> list[Backend]:
    return [stack.enter_context(open_one(contract)) for contract in contracts]


def _answers(engines: Sequence[Backend], image: UInt8) -> Outputs:
    return {name: values for backend in engines for name, values in backend.run(image[None]).items()}


def _classes(manifest: Manifest, photograph: Photograph, reference: Outputs) -> tuple[int, ...]:
    """Classes of the photograph's label; without one, those the reference scores above their thresholds."""
    if photograph.classes is not None or "scores" not in reference:
        return photograph.classes or ()
    thresholds = [manifest.parameters.score_thresholds[name] for name in manifest.foreground]
    found = np.asarray(reference["scores"], np.float32)[0] >= thresholds
    return tuple((np.flatnonzero(found) + 1).tolist())
