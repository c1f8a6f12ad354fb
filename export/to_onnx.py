"""Export a PyTorch module that takes uint8 images to one self-contained ONNX file."""

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from multisa.export.attention import OPSET, attention_translation, expand_attention
from multisa.export.fp16 import model_bytes, replace_values
from multisa.runtime.backends.base import IMAGE
from multisa.runtime.errors import ParityError
from multisa.runtime.imaging.decode import MINIMUM_SIDE

Float64 = npt.NDArray[np.float64]

EXAMPLE_SIZE = (224, 256)  # height and width the module is traced at; both are free in the graph
MIN_FLOAT16_VALUES = 1024  # smaller initializers stay float32: storing them as float16 saves nothing
_DEFAULT_EPSILON = 1e-5  # of ONNX's BatchNormalization, for nodes without the attribute


def onnx_from_module(
    module: nn.Module, outputs: Sequence[str], metadata: Mapping[str, Any], *, half_weights: bool
) -> bytes:
    """Export `module` with the input `image`, uint8 [batch, height, width, 3], all three sizes free.

    outputs: names of the module's outputs, in order. metadata: written into the file, values as JSON. With
    half_weights, large weights are stored as float16 and cast to float32 when the graph is loaded: half the
    size, all arithmetic in float32. Raises ParityError if the exporter wrote another opset than OPSET.
    """
    example = torch.randint(0, 256, (2, *EXAMPLE_SIZE, 3), dtype=torch.uint8)
    shapes = {
        0: torch.export.Dim("batch"),
        1: torch.export.Dim("height", min=MINIMUM_SIDE),
        2: torch.export.Dim("width", min=MINIMUM_SIDE),
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _plain_attention(module):
        # The exporter warns about its own deprecated internals; the checks below and the parity gate catch
        # what matters.
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=[IMAGE],
            output_names=list(outputs),
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
            custom_translation_table=attention_translation(),
        )
        model = onnx.load(path)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != OPSET:
        raise ParityError(
            f"the exporter wrote opset {opset}, expected {OPSET}; check the versions of torch and onnxscript"
        )
    fold_batch_norms(model.graph)
    model = expand_attention(model)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    _drop_source_locations(model)
    data = model_bytes(model)
    return with_half_weights(data) if half_weights else data


def with_half_weights(data: bytes) -> bytes:
    """Store the large weights of a graph as float16, with a cast to float32 for each."""
    model = onnx.load_from_string(data)
    _store_weights_as_float16(model.graph)
    return model_bytes(model)


@contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Within the block, timm's attention layers are products and a softmax, which every backend has.

    Their tokens are 16 pixels apart, so their matrices are small; those of Multi-SA are loops (attention.py).
    """
    layers = [layer for layer in module.modules() if getattr(layer, "fused_attn", False)]
    for layer in layers:
        layer.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True  # type: ignore[assignment]


def _store_weights_as_float16(graph: onnx.GraphProto) -> None:
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        limit = np.finfo(np.float16).max
        if values.size < MIN_FLOAT16_VALUES or np.abs(values).max() > limit:
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    for position, cast in enumerate(casts):
        graph.node.insert(position, cast)


def _drop_source_locations(model: onnx.ModelProto) -> None:
    # The exporter stores each node's source location, with paths of the machine it ran on.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")


def fold_batch_norms(graph: onnx.GraphProto) -> None:
    """Fold, in place, every BatchNormalization into the convolution before it.

        gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (s W) x + (s (b - mean) + beta)
        with s = gamma / sqrt(var + eps)

    computed once, in float64. The exporter's own optimizer folds only weights with a single reader; here
    several scales pass through one network, so folded weights are shared exactly as the original ones were.
    A batch normalization stays as it is where another node reads the convolution's output too, or where
    weights and statistics are not float32 initializers.
    """
    stored = {initializer.name: initializer for initializer in graph.initializer}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    folded: dict[tuple[str, ...], tuple[str, str]] = {}
    removed = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or node.input[0] not in convolutions:
            continue
        convolution = convolutions[node.input[0]]
        parameters = (*convolution.input[1:], *node.input[1:])
        if readers[node.input[0]] != 1 or not all(name in stored for name in parameters):
            continue
        if parameters not in folded:
            weight, bias = _fold(convolution, node, stored)
            names = (f"{parameters[0]}.folded_{len(folded)}", f"{parameters[0]}.folded_{len(folded)}.bias")
            for values, name in zip((weight, bias), names, strict=True):
                graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
            folded[parameters] = names
        data = convolution.input[0]
        del convolution.input[:]
        convolution.input.extend([data, *folded[parameters]])
        convolution.output[0] = node.output[0]
        removed.append(node)
    for node in removed:
        graph.node.remove(node)
    _drop_unread(graph)


def _fold(
    convolution: onnx.NodeProto, norm: onnx.NodeProto, stored: dict[str, onnx.TensorProto]
) -> tuple[Float64, Float64]:
    parameters = [_float64(stored[name]) for name in convolution.input[1:]]
    weight = parameters[0]
    bias = parameters[1] if len(parameters) > 1 else np.zeros(len(weight))
    gamma, beta, mean, variance = (_float64(stored[name]) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
    factor = gamma / np.sqrt(variance + epsilon)
    return weight * factor[:, None, None, None], factor * (bias - mean) + beta


def _float64(tensor: onnx.TensorProto) -> Float64:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    replace_values(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
    known = {name for node in graph.node for name in node.output}
    replace_values(graph.value_info, [value for value in graph.value_info if value.name in known])
