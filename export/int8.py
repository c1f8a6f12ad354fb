"""Post-training static quantization to int8 with ONNX Runtime's quantizer, in Q/DQ form.

ONNX Runtime fuses the Q/DQ form into integer operators (VNNI on x86); TensorRT reads it as well. Weights have
one scale per output channel, activations one scale per tensor, from the smallest and largest value over the
calibration images. There are two forms:

- for CPUs, unsigned with zero points: the integer range then coincides with ReLU6's, so clipping needs no
  operator between two convolutions and all of them stay integer;
- symmetric, signed without zero points: the only form that TensorRT accepts.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from multisa.export.fp16 import model_bytes, read_fp32_graph
from multisa.runtime.backends.base import IMAGE

UInt8 = npt.NDArray[np.uint8]

# Operators with integer kernels in ONNX Runtime that gain speed. Not Resize: it decides the labels.
OPERATORS = ("Conv", "Clip", "Relu", "Add", "Concat", "MatMul")
PRODUCTS = ("Conv", "MatMul")


@dataclass(frozen=True)
class CalibratedGraph:
    """A graph prepared for quantization, with the ranges of its values."""

    model: onnx.ModelProto
    ranges: Any  # onnxruntime.quantization.TensorsData
    candidates: tuple[str, ...]  # nodes that may be quantized, in the order they run
    symmetric: bool


def calibrate_graph(
    data: bytes, calibration: Iterable[Sequence[UInt8]], *, symmetric: bool
) -> CalibratedGraph:
    """Fold constants, then run the graph to find the range of each value.

    calibration: images, uint8 [H, W, 3], in chunks of a few. symmetric: the form for TensorRT.
    """
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

    What follows is small (confidences), and quantizing its constants gains nothing.
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
