"""Post-training static quantisation to int8 with ONNX Runtime's quantiser, in Q/DQ form.

The Q/DQ form is read by ONNX Runtime, which fuses it into integer operators (VNNI on x86), and by TensorRT.
Weights have a scale for each output channel; activations one scale a tensor, from the smallest and largest
value over the calibration photographs. Two forms:

- for a CPU, unsigned with zero points: the integers' own range is then that of ReLU6, so that the clipping
  needs no operator between two convolutions and all of them stay integer;
- symmetric, signed and without zero points, which is all that TensorRT takes.
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

from multisa.export.half import model_bytes, plain_graph
from multisa.runtime.backends.base import IMAGE

UInt8 = npt.NDArray[np.uint8]

# What the integer kernels of ONNX Runtime take and is worth it. Not Resize: labels are decided there.
OPERATORS = ("Conv", "Clip", "Relu", "Add", "Concat", "MatMul")
PRODUCTS = ("Conv", "MatMul")


@dataclass(frozen=True)
class Calibrated:
    """A graph ready to be quantised: prepared, with the ranges of its values."""

    model: onnx.ModelProto
    ranges: Any  # onnxruntime.quantization.TensorsData
    candidates: tuple[str, ...]  # nodes that may be quantised, in the order they run
    symmetric: bool


def calibrated_graph(data: bytes, calibration: Iterable[Sequence[UInt8]], *, symmetric: bool) -> Calibrated:
    """Fold what can be folded, and run the graph to find the range of each value.

    calibration: photographs, uint8 [H, W, 3], a few at a time.
    """
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator, quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, images: Sequence[UInt8]) -> None:
            self._images = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {IMAGE: image[None]}

    plain = plain_graph(data)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        first, prepared = Path(folder, "plain.onnx"), Path(folder, "prepared.onnx")
        onnx.save(plain.model, first)
        # Its symbolic shape inference gives up on sizes that are computed; types are all that is needed.
        quant_pre_process(first, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        calibrator = create_calibrator(
            prepared, list(OPERATORS), augmented_model_path=str(Path(folder, "augmented.onnx"))
        )
        for images in calibration:
            calibrator.collect_data(Reader(images))  # a few at a time: it keeps what it has not yet reduced
        ranges = calibrator.compute_data()
    known = set(ranges.keys())
    usable = {n.name for n in _up_to_the_last_product(model) if n.output[0] in known}
    candidates = tuple(node.name for node in model.graph.node if node.name in usable)
    return Calibrated(model, ranges, candidates, symmetric)


def quantised_graph(calibrated: Calibrated, lowered: Collection[str]) -> bytes:
    """Quantise the nodes named by `lowered`."""
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    if not lowered:  # to the quantiser, no name means all nodes
        return model_bytes(model)
    excluded = [name for name in calibrated.candidates if name not in set(lowered)]
    with _quiet():
        quantiser = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if calibrated.symmetric else QuantType.QUInt8,
            tensors_range=calibrated.ranges,
            nodes_to_quantize=list(lowered),
            nodes_to_exclude=excluded,
            op_types_to_quantize=list(OPERATORS),
            # Biases stay float32: TensorRT takes no int32, and ONNX Runtime quantises them on loading.
            extra_options={"ActivationSymmetric": calibrated.symmetric, "QuantizeBias": False},
        )
        quantiser.quantize_model()
    quantiser.model.topological_sort()
    return model_bytes(quantiser.model.model)


def _up_to_the_last_product(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes of OPERATORS that a convolution or matrix product still follows, or that are one.

    What comes after them is small: confidences, whose constants would become integers for nothing.
    """
    read: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in PRODUCTS or read & set(node.output):
            read.update(node.input)
            if node.op_type in OPERATORS:
                yield node


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints and logs its own progress and advice."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
