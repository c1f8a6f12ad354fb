"""Read the layers with weights from a bundle's graph, in the order they run, and check every value.

    stored = read_graph(bundle, SEGMENTER)
    stored.layers[0].weights          # ("network.backbone.network.conv_stem.weight", "... .weight_bias")
    stored.values(name, (32, 3, 3, 3))

A bundle may come from anywhere, so every value is checked against what the network expects.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from multisa.runtime.backends.base import GraphContract, graph_file
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError, BundleError

Float32 = npt.NDArray[np.float32]

CONVOLUTION = "Conv"
BATCH_NORM = "BatchNormalization"
GROUP_NORM = "GroupNorm"

PREFIX = "network."  # of the names of weights: the network inside the module that is exported

_STORED_TYPES: Mapping[int, type[np.floating]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}


@dataclass(frozen=True)
class StoredLayer:
    """One convolution or normalization of a graph.

    weights are names of initializers: weight and perhaps bias of a convolution; scale, bias, mean and
    variance of a batch norm; scale and bias of a group norm.
    """

    kind: str
    weights: tuple[str, ...]
    reads: str  # name of its input
    output: str
    attributes: Mapping[str, tuple[float, ...]]  # of the ONNX node


@dataclass(frozen=True)
class StoredGraph:
    """Layers and initializers of one file of a bundle."""

    path: Path  # for messages
    layers: tuple[StoredLayer, ...]
    tensors: Mapping[str, TensorProto]

    def error(self, problem: str) -> BundleError:
        """Return the error to raise for a problem of this file."""
        return BundleError(
            f"{self.path}: {problem}; its PyTorch network cannot be rebuilt: get the bundle again, or export "
            "it with this version of multisa"
        )

    def values(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Values of an initializer as float32 [*shape]; its own shape may have trailing ones.

        Raises BundleError for another shape or type, a wrong number of bytes, or values that are not finite.
        """
        tensor = self.tensors[name]
        kind = _STORED_TYPES.get(tensor.data_type)
        if kind is None:
            raise self.error(f"{name}: got ONNX data type {tensor.data_type}, expected float32 or float16")
        dims = tuple(tensor.dims)
        if dims[: len(shape)] != shape or any(size != 1 for size in dims[len(shape) :]):
            raise self.error(f"{name}: got shape {list(dims)}, expected {list(shape)}")
        expected = math.prod(shape) * np.dtype(kind).itemsize
        if len(tensor.raw_data) != expected:
            raise self.error(f"{name}: got {len(tensor.raw_data)} bytes, expected {expected}")
        numbers = np.frombuffer(tensor.raw_data, np.dtype(kind).newbyteorder("<")).astype(np.float32)
        if not np.isfinite(numbers).all():
            raise self.error(f"{name}: got numbers that are not finite")
        return numbers.reshape(shape)

    def named(self, name: str) -> str | None:
        """Name of the initializer that holds the parameter `name` as float32 or float16, if there is one."""
        return next((stored for stored in (name, f"{name}.half") if stored in self.tensors), None)

    def weight_names(self) -> list[str]:
        """Initializers that hold weights rather than constants of the arithmetic.

        These are the ones named after a parameter, and all others with several floating-point values.
        """
        return [
            name
            for name, tensor in self.tensors.items()
            if tensor.data_type in _STORED_TYPES
            and (name.startswith(PREFIX) or max(tensor.dims, default=1) > 1)
        ]


def read_graph(bundle: Bundle, contract: GraphContract) -> StoredGraph:
    """Read the fp32 graph of `contract` out of a bundle, its digest verified.

    Raises BundleError for a file that is not an ONNX graph or has layers that no trained network has.
    """
    file = graph_file(contract)
    path = bundle.path / file
    data = bundle.read_file(file)
    try:
        check_onnx(data, file)
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except (BackendError, DecodeError, onnx.checker.ValidationError) as error:
        raise BundleError(f"{path}: is not an ONNX graph ({error}): get the bundle again") from error
    return _stored(model.graph, path)


def _stored(graph: onnx.GraphProto, path: Path) -> StoredGraph:
    stored = StoredGraph(path, (), {tensor.name: tensor for tensor in graph.initializer})
    reader = _Reader(graph, stored)
    return StoredGraph(
        path,
        tuple(reader.layers()),
        {name: tensor for name, tensor in stored.tensors.items() if name not in reader.constants},
    )


class _Reader:
    """Finds the layers of a graph; `constants` are initializers that are not weights."""

    def __init__(self, graph: onnx.GraphProto, stored: StoredGraph) -> None:
        self.graph = graph
        self.stored = stored
        self.constants: set[str] = set()
        self.casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def layers(self) -> Iterator[StoredLayer]:
        for node in self.graph.node:
            if node.op_type in (CONVOLUTION, BATCH_NORM):
                yield self._layer(
                    node.op_type, node, [name for name in node.input[1:] if name], node.output[0]
                )
            elif node.op_type == "InstanceNormalization":
                yield self._group_norm(node)

    def _layer(self, kind: str, node: onnx.NodeProto, weights: list[str], output: str) -> StoredLayer:
        attributes: dict[str, tuple[float, ...]] = {}
        for attribute in node.attribute:
            single = {onnx.AttributeProto.INT: (attribute.i,), onnx.AttributeProto.FLOAT: (attribute.f,)}
            attributes[attribute.name] = single.get(attribute.type, tuple(attribute.ints))
        names = tuple(self._initializer(name, node) for name in weights)
        return StoredLayer(kind, names, node.input[0], output, attributes)

    def _group_norm(self, node: onnx.NodeProto) -> StoredLayer:
        # The exporter reshapes groups to channels, normalizes them, reshapes back, then scales and shifts.
        ones, zeros = (self._initializer(name, node) for name in node.input[1:3])
        groups = tuple(self.stored.tensors[ones].dims)
        plain = self.stored.values(ones, groups), self.stored.values(zeros, groups)
        if len(groups) != 1 or (plain[0] != 1).any() or plain[1].any():
            raise self.stored.error(f"{node.output[0]}: an instance norm with weights, expected none")
        self.constants |= {ones, zeros}
        restored = self._reader_of(node.output[0], "Reshape", node)
        scaled = self._reader_of(restored.output[0], "Mul", node)
        shifted = self._reader_of(scaled.output[0], "Add", node)
        layer = self._layer(GROUP_NORM, node, [scaled.input[1], shifted.input[1]], shifted.output[0])
        return StoredLayer(
            layer.kind, layer.weights, layer.reads, layer.output, {**layer.attributes, "groups": groups}
        )

    def _reader_of(self, name: str, operator: str, norm: onnx.NodeProto) -> onnx.NodeProto:
        readers = self.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type != operator:
            raise self.stored.error(
                f"{norm.output[0]}: an instance norm outside a group norm, expected {operator} after {name}"
            )
        return readers[0]

    def _initializer(self, name: str, node: onnx.NodeProto) -> str:
        stored: str = self.casts.get(name, name)
        if stored not in self.stored.tensors:
            raise self.stored.error(f"{node.op_type} {node.output[0]}: {name or 'a weight'} is not stored")
        return stored
