"""Convert one fp32 graph to fp16 or int8, except for the nodes that measurements show to need fp32.

int8 is post-training static quantization with ONNX Runtime's quantizer, in Q/DQ form: ONNX Runtime fuses it
into integer operators (VNNI on x86); TensorRT reads it as well. Weights have one scale per output channel,
activations one scale per tensor, from the smallest and largest value over the calibration images. There are
two forms:

- for CPUs, unsigned with zero points: the integer range then coincides with ReLU6's, so clipping needs no
  operator between two convolutions and all of them stay integer;
- symmetric, signed without zero points: the only form that TensorRT accepts.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from multisa.export.fp16 import (
    FLOAT,
    FP16_MAX,
    Fp32Graph,
    emulated_fp16_graph,
    fp16_candidates,
    fp16_graph,
    model_bytes,
    read_fp32_graph,
)
from multisa.export.output_masks import add_labels
from multisa.export.parity import Compared, Outputs, measure_parity
from multisa.export.sensitivity import SearchResult, find_sensitive_nodes
from multisa.runtime.backends.base import IMAGE, GraphContract
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from multisa.runtime.imaging.decode import UInt8

# A node stays in fp32 if it touches values above FP16_MAX / HEADROOM: other images may give larger values
# than the few that are measured.
HEADROOM = 8.0
MAX_INT8_RUNS = 24  # measurements of the int8 search, each of which quantizes the whole graph again
# Operators with integer kernels in ONNX Runtime that gain speed.
OPERATORS = ("Conv", "Clip", "Relu", "Add", "Concat", "MatMul")
PRODUCTS = ("Conv", "MatMul")


@dataclass(frozen=True)
class ConvertedGraph:
    """A graph in a lower precision."""

    data: bytes  # the ONNX file that ships
    emulated: bytes  # an ONNX file whose results on a CPU are those of hardware with that arithmetic
    search: SearchResult
    too_large: dict[str, float]  # nodes kept in fp32 without a trial -> the largest value they touch

    @property
    def fp32_nodes(self) -> int:
        """Number of nodes that stay in fp32 although the precision could hold their operator."""
        return len(self.search.kept) + len(self.too_large)

    def as_json(self) -> dict[str, object]:
        """JSON values for provenance: the nodes in fp32 and why."""
        peaks = {name: float(f"{peak:.4g}") for name, peak in self.too_large.items()}
        return {**self.search.as_json(), "too_large_for_fp16": peaks}


@dataclass(frozen=True)
class Reference:
    """The fp32 graph to convert, and the images that each conversion is compared with it on."""

    data: bytes  # the ONNX file
    contract: GraphContract
    images: Sequence[UInt8]  # [H, W, 3]
    threads: int


def convert_to_fp16(reference: Reference) -> ConvertedGraph:
    """Convert an fp32 graph to fp16, except for the nodes that its images show to need fp32.

    A node stays in fp32 if it touches values within HEADROOM of fp16's largest number, or if the search of
    sensitivity.py finds it harmful.
    """
    fp32 = read_fp32_graph(reference.data)
    candidates = fp16_candidates(fp32)
    too_large = _nodes_with_large_values(fp32, candidates, reference.images, reference.threads)
    small = [name for name in candidates if name not in too_large]

    def emulate(converted: Collection[str]) -> bytes:
        return model_bytes(emulated_fp16_graph(fp32, converted))

    search = find_sensitive_nodes(small, _share_of(emulate, reference, "fp16"))
    converted = [name for name in small if name not in search.kept]
    return ConvertedGraph(model_bytes(fp16_graph(fp32, converted)), emulate(converted), search, too_large)


def convert_to_int8(reference: Reference, calibration: Iterable[Sequence[UInt8]], *, symmetric: bool) -> ConvertedGraph:
    """Convert an fp32 graph to int8 (Q/DQ), except for the nodes that its images show to need fp32.

    calibration: images to take ranges from, in chunks of a few. symmetric: the form for TensorRT.
    """
    calibrated = calibrate_graph(reference.data, calibration, symmetric=symmetric)

    def quantize(converted: Collection[str]) -> bytes:
        return quantize_graph(calibrated, converted)

    share_of = _share_of(quantize, reference, "int8")
    search = find_sensitive_nodes(calibrated.candidates, share_of, max_runs=MAX_INT8_RUNS)
    result = quantize([name for name in calibrated.candidates if name not in search.kept])
    return ConvertedGraph(result, result, search, {})


def _share_of(
    convert: Callable[[Collection[str]], bytes], reference: Reference, precision: str
) -> Callable[[Sequence[str]], float]:
    def run(data: bytes) -> list[Outputs]:
        with OnnxRuntimeBackend(data, threads=reference.threads, contract=reference.contract) as backend:
            found: list[Outputs] = [backend.run(image[None]) for image in reference.images]
        for image, outputs in zip(reference.images, found, strict=True):
            add_labels(image, outputs)
        return found

    expected = run(reference.data)

    def share(converted: Sequence[str]) -> float:
        pairs = map(Compared, expected, run(convert(converted)))
        return measure_parity(pairs, precision).share()

    return share


def _nodes_with_large_values(
    fp32: Fp32Graph, candidates: Sequence[str], images: Sequence[UInt8], threads: int
) -> dict[str, float]:
    peaks = largest_values(fp32, images, threads=threads)
    limit = FP16_MAX / HEADROOM
    wanted = set(candidates)
    found = {}
    for node in fp32.model.graph.node:
        if node.name in wanted:
            values = [peaks[name] for name in (*node.input, *node.output) if name in peaks]
            # `not <=` rather than `>`: NaN counts as large.
            if any(not value <= limit for value in values):
                found[node.name] = max(values)
    return found


def largest_values(fp32: Fp32Graph, images: Sequence[UInt8], *, threads: int) -> dict[str, float]:
    """Largest absolute value, over `images`, of each float32 value that a node of the main graph produces."""
    onnxruntime = import_onnxruntime()
    model = onnx.ModelProto()
    model.CopyFrom(fp32.model)
    graph = model.graph
    names = [name for node in graph.node for name in node.output if fp32.types.get(name) == FLOAT]
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}.abs"], f"{name}.abs"))
        # ReduceMax without axes reduces all. An empty tensor has no maximum, so a zero is appended first.
        graph.node.append(helper.make_node("Reshape", [f"{name}.abs", "peak.flat"], [f"{name}.flat"]))
        graph.node.append(helper.make_node("Concat", [f"{name}.flat", "peak.zero"], [f"{name}.some"], axis=0))
        graph.node.append(helper.make_node("ReduceMax", [f"{name}.some"], [f"{name}.peak"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{name}.peak", FLOAT, []))
    graph.initializer.append(helper.make_tensor("peak.flat", onnx.TensorProto.INT64, [1], [-1]))
    graph.initializer.append(helper.make_tensor("peak.zero", FLOAT, [1], [0.0]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    peaks = np.zeros(len(names))
    for image in images:
        found = session.run([f"{name}.peak" for name in names], {IMAGE: image[None]})
        peaks = np.maximum(peaks, np.array(found, np.float64))  # NaN stays NaN
    return dict(zip(names, peaks.tolist(), strict=True))


@dataclass(frozen=True)
class CalibratedGraph:
    """A graph prepared for quantization, with the ranges of its values."""

    model: onnx.ModelProto
    ranges: Any  # onnxruntime.quantization.TensorsData
    candidates: tuple[str, ...]  # nodes that may be quantized, in the order they run
    symmetric: bool


def calibrate_graph(data: bytes, calibration: Iterable[Sequence[UInt8]], *, symmetric: bool) -> CalibratedGraph:
    """Fold constants, then run the graph to find the range of each value.

    calibration: images, uint8 [H, W, 3], in chunks of a few. symmetric: the form for TensorRT.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator, quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, images: Sequence[UInt8]) -> None:
            self._images = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {IMAGE: image[None]}

    fp32 = read_fp32_graph(data)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        first, prepared = Path(folder, "fp32.onnx"), Path(folder, "prepared.onnx")
        onnx.save(fp32.model, first)
        # Symbolic shape inference fails on computed sizes; types are enough.
        quant_pre_process(first, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        calibrator = create_calibrator(
            prepared, list(OPERATORS), augmented_model_path=str(Path(folder, "augmented.onnx"))
        )
        for images in calibration:
            calibrator.collect_data(Reader(images))  # in chunks: it holds all outputs of one call in memory
        ranges = calibrator.compute_data()
    known = set(ranges.keys())
    usable = {n.name for n in _up_to_the_last_product(model) if n.output[0] in known}
    candidates = tuple(node.name for node in model.graph.node if node.name in usable)
    return CalibratedGraph(model, ranges, candidates, symmetric)


def quantize_graph(calibrated: CalibratedGraph, converted: Collection[str]) -> bytes:
    """Quantize the nodes named in `converted`; the bytes of the ONNX file."""
    import_onnxruntime()
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    if not converted:  # the quantizer takes no name as all nodes
        return model_bytes(model)
    excluded = [name for name in calibrated.candidates if name not in set(converted)]
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if calibrated.symmetric else QuantType.QUInt8,
            tensors_range=calibrated.ranges,
            nodes_to_quantize=list(converted),
            nodes_to_exclude=excluded,
            op_types_to_quantize=list(OPERATORS),
            # Biases stay float32: TensorRT accepts no int32, and ONNX Runtime quantizes them when it loads.
            extra_options={"ActivationSymmetric": calibrated.symmetric, "QuantizeBias": False},
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    return model_bytes(quantizer.model.model)


def _up_to_the_last_product(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes of OPERATORS up to the last convolution or matrix product.

    What follows is small (the softmax), and quantizing it gains nothing.
    """
    read: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in PRODUCTS or read & set(node.output):
            read.update(node.input)
            if node.op_type in OPERATORS:
                yield node


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer, which prints and logs progress and advice."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
