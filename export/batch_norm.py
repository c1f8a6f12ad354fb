"""Batch normalisations of an ONNX graph folded into the convolutions before them.

    gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (s W) x + (s (b - mean) + beta)
    with s = gamma / sqrt(var + eps)

taken once, in float64. The exporter's own optimiser does this only where nobody else reads the weights; here
several scales pass one network, and folded weights are shared as the given ones were.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Float64 = npt.NDArray[np.float64]
_DEFAULT_EPSILON = 1e-5  # of ONNX's BatchNormalization


def fold_batch_norms(graph: onnx.GraphProto) -> None:
    """Fold, in place, every BatchNormalization whose input is a convolution that nothing else reads.

    Weights and statistics must be float32 initialisers, as exported. Any other batch normalisation (one that
    comes before its convolution) stays as it is.
    """
    stored = {initialiser.name: initialiser for initialiser in graph.initializer}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    folded: dict[tuple[str, ...], tuple[str, str]] = {}
    gone = []
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
        gone.append(node)
    for node in gone:
        graph.node.remove(node)
    _drop_unread(graph)


def _fold(
    convolution: onnx.NodeProto, norm: onnx.NodeProto, stored: dict[str, onnx.TensorProto]
) -> tuple[Float64, Float64]:
    given = [_values(stored[name]) for name in convolution.input[1:]]
    weight, bias = given[0], given[1] if len(given) > 1 else np.zeros(len(given[0]))
    gamma, beta, mean, variance = (_values(stored[name]) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
    factor = gamma / np.sqrt(variance + epsilon)
    return weight * factor[:, None, None, None], factor * (bias - mean) + beta


def _values(tensor: onnx.TensorProto) -> Float64:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [initialiser for initialiser in graph.initializer if initialiser.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    known = {name for node in graph.node for name in node.output}
    shapes = [value for value in graph.value_info if value.name in known]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
