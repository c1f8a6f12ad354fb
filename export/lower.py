"""One fp32 graph of a bundle -> its fp16 or int8 form, with what must stay in fp32 found by measurement."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from multisa.export.half import (
    FLOAT,
    HALF_LIMIT,
    PlainGraph,
    half_candidates,
    half_graph,
    model_bytes,
    plain_graph,
    rounded_graph,
)
from multisa.export.parity import Compared, ParityReport, measure_parity
from multisa.export.quantise import Calibrated, calibrated_graph, quantised_graph
from multisa.export.sensitivity import SelectedBackend, choose_kept
from multisa.runtime.backends.base import IMAGE, GraphContract
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend

UInt8 = npt.NDArray[np.uint8]

# Values this much below the largest fp16 number over the calibrated photographs may be larger on others.
HEADROOM = 8.0


@dataclass(frozen=True)
class Lowered:
    """A graph in a lower precision."""

    data: bytes  # what ships
    measured: bytes  # what answers on a CPU as the graph does on an engine with that arithmetic
    choice: SelectedBackend
    too_large: dict[str, float]  # nodes kept in fp32 before any trial -> the largest value they touch

    def as_json(self) -> dict[str, object]:
        """What stays in fp32 and why, for provenance."""
        peaks = {name: float(f"{peak:.4g}") for name, peak in self.too_large.items()}
        return {**self.choice.as_json(), "too_large_for_fp16": peaks}


def half_of(data: bytes, contract: GraphContract, images: Sequence[UInt8], *, threads: int) -> Lowered:
    """Make the fp16 graph of an fp32 one, with the nodes that `images`, uint8 [H, W, 3], show to need fp32.

    A node keeps fp32 when it touches values within HEADROOM of what fp16 holds, or when the search of
    sensitivity.py finds it to be at fault.
    """
    plain = plain_graph(data)
    candidates = half_candidates(plain)
    too_large = _nodes_with_large_values(plain, candidates, images, threads)
    small = [name for name in candidates if name not in too_large]

    def made(lowered: Collection[str]) -> bytes:
        return model_bytes(rounded_graph(plain, lowered))

    choice = choose_kept(small, _share_of(made, data, contract, images, "fp16", threads))
    lowered = [name for name in small if name not in choice.kept]
    return Lowered(model_bytes(half_graph(plain, lowered)), made(lowered), choice, too_large)


def int8_of(
    data: bytes,
    contract: GraphContract,
    images: Sequence[UInt8],
    calibration: Iterable[Sequence[UInt8]],
    *,
    symmetric: bool,
    threads: int,
) -> Lowered:
    """Make the int8 graph (Q/DQ) of an fp32 one, with the nodes that `images` show to need fp32.

    calibration: photographs to take ranges from, a few at a time; symmetric: see quantise.py.
    """
    calibrated: Calibrated = calibrated_graph(data, calibration, symmetric=symmetric)

    def made(lowered: Collection[str]) -> bytes:
        return quantised_graph(calibrated, lowered)

    choice = choose_kept(
        calibrated.candidates, _share_of(made, data, contract, images, "int8", threads), max_runs=24
    )
    result = made([name for name in calibrated.candidates if name not in choice.kept])
    return Lowered(result, result, choice, {})


def _share_of(
    made: Callable[[Collection[str]], bytes],
    data: bytes,
    contract: GraphContract,
    images: Sequence[UInt8],
    precision: str,
    threads: int,
) -> Callable[[Sequence[str]], float]:
    with OnnxRuntimeBackend(data, threads=threads, contract=contract) as backend:
        expected = [backend.run(image[None]) for image in images]

    def share(lowered: Sequence[str]) -> float:
        with OnnxRuntimeBackend(made(lowered), threads=threads, contract=contract) as backend:
            report: ParityReport = measure_parity(
                (Compared(e, backend.run(i[None])) for e, i in zip(expected, images, strict=True)), precision
            )
        return report.share()

    return share


def _nodes_with_large_values(
    plain: PlainGraph, candidates: Sequence[str], images: Sequence[UInt8], threads: int
) -> dict[str, float]:
    peaks = largest_values(plain, images, threads=threads)
    limit = HALF_LIMIT / HEADROOM
    found = {}
    for node in plain.model.graph.node:
        if node.name in set(candidates):
            values = [peaks[name] for name in (*node.input, *node.output) if name in peaks]
            # A NaN is no value that is known to be small.
            if any(not value <= limit for value in values):
                found[node.name] = max(values)
    return found


def largest_values(plain: PlainGraph, images: Sequence[UInt8], *, threads: int) -> dict[str, float]:
    """Largest absolute value of every float32 value of the main graph that a node gives, over `images`."""
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(plain.model)
    graph = model.graph
    names = [name for node in graph.node for name in node.output if plain.types.get(name) == FLOAT]
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}.abs"], f"{name}.abs"))
        # Without axes all are reduced; the maximum of no value at all (an empty tensor) is an error, so it
        # is joined with a zero first.
        graph.node.append(helper.make_node("Reshape", [f"{name}.abs", "peak.flat"], [f"{name}.flat"]))
        graph.node.append(helper.make_node("Concat", [f"{name}.flat", "peak.zero"], [f"{name}.some"], axis=0))
        graph.node.append(helper.make_node("ReduceMax", [f"{name}.some"], [f"{name}.peak"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{name}.peak", FLOAT, []))
    graph.initializer.append(helper.make_tensor("peak.flat", onnx.TensorProto.INT64, [1], [-1]))
    graph.initializer.append(helper.make_tensor("peak.zero", FLOAT, [1], [0.0]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    peaks = np.zeros(len(names))
    for image in images:
        found = session.run([f"{name}.peak" for name in names], {IMAGE: image[None]})
        peaks = np.maximum(peaks, np.array(found, np.float64))  # NaN stays NaN
    return dict(zip(names, peaks.tolist(), strict=True))
