"""A PyTorch module with uint8 photographs as input -> one self-contained ONNX file."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from multisa.export.attention import attention_translation, expand_attention
from multisa.export.batch_norm import fold_batch_norms
from multisa.runtime.backends.base import IMAGE
from multisa.runtime.errors import ParityError
from multisa.runtime.imaging.decode import MINIMUM_SIDE

# 18: the newest opset whose Resize every execution provider of ONNX Runtime has.
OPSET = 18
EXAMPLE_SIZE = (224, 256)
SMALLEST_HALF = 1024  # initialisers with fewer values stay float32: nothing to gain


def onnx_from_module(
    module: nn.Module, outputs: Sequence[str], metadata: Mapping[str, Any], *, half_weights: bool
) -> bytes:
    """Export `module` with the input `image`, uint8 [batch, height, width, 3], all three sizes free.

    metadata is written into the file as JSON values. With half_weights, large weights are stored as float16
    and cast to float32 when the graph is loaded: half the size, all arithmetic in float32.
    """
    example = torch.randint(0, 256, (2, *EXAMPLE_SIZE, 3), dtype=torch.uint8)
    shapes = {
        0: torch.export.Dim("batch"),
        1: torch.export.Dim("height", min=MINIMUM_SIDE),
        2: torch.export.Dim("width", min=MINIMUM_SIDE),
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The exporter warns of its own deprecated internals; what matters is checked below and by parity.
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
    if half_weights:
        _store_weights_as_half(model.graph)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    _drop_trace_notes(model)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _store_weights_as_half(graph: onnx.GraphProto) -> None:
    casts = []
    for initialiser in graph.initializer:
        if initialiser.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initialiser)
        limit = np.finfo(np.float16).max
        if values.size < SMALLEST_HALF or np.abs(values).max() > limit:
            continue
        name = initialiser.name
        initialiser.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT)
        )
    for position, cast in enumerate(casts):
        graph.node.insert(position, cast)


def _drop_trace_notes(model: onnx.ModelProto) -> None:
    # The exporter notes each node's source lines, with paths of the machine it ran on.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
