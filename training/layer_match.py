"""Find the weights of a module in the graph that was exported from it.

    stored = read_graph(bundle, SEGMENTER)
    stored.layers[0].weights          # ("network.backbone.network.conv_stem.weight", "... .weight_bias")
    state_of_graph(module, layers_run(module, stored), stored)

A graph lists its layers with weights in the order they run, and so does a module that runs on PyTorch's meta
device. A bundle may come from anywhere, so every value is checked against what the network expects.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from torch import Tensor, nn

from multisa.runtime.backends.base import GraphContract, graph_file
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError, BundleError
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.runtime.predict.postprocess import Float32
from multisa.training.backbones import FixedSameConv2d

CONVOLUTION = "Conv"
BATCH_NORM = "BatchNormalization"
GROUP_NORM = "GroupNorm"
LINEAR = "MatMul"  # by a stored matrix; its bias is found by name

PREFIX = "network."  # of the names of weights: the network inside the module that is exported

_STORED_TYPES: Mapping[int, type[np.floating]] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}

# What to_onnx.py appends to the name of a weight.
_APPENDED = re.compile(r"(\.folded_\d+)?(\.half)?$")
# ONNX's defaults for attributes that a node leaves out.
_DEFAULTS = {"strides": (1, 1), "dilations": (1, 1), "group": (1,), "epsilon": (1e-5,), "groups": (0,)}
_BUFFERS = (f"{PREFIX}backbone.mean", f"{PREFIX}backbone.std")  # the module has its own
_PYRAMID = f"{PREFIX}backbone.pyramid."
_COUNTER = "num_batches_tracked"  # of batch norms; only training reads it
_KINDS = {CONVOLUTION: nn.Conv2d, BATCH_NORM: nn.BatchNorm2d, GROUP_NORM: nn.GroupNorm, LINEAR: nn.Linear}
_NORM = nn.BatchNorm2d | nn.GroupNorm


@dataclass(frozen=True)
class StoredLayer:
    """One convolution, normalization or product with a matrix of a graph.

    weights are names of initializers: weight and perhaps bias of a convolution; scale, bias, mean and
    variance of a batch norm; scale and bias of a group norm; the matrix of a linear layer.
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
            if tensor.data_type in _STORED_TYPES and (name.startswith(PREFIX) or max(tensor.dims, default=1) > 1)
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
    stored = StoredGraph(path, (), {tensor.name: tensor for tensor in model.graph.initializer})
    reader = _Reader(model.graph, stored)
    layers = tuple(reader.layers())
    weights = {name: tensor for name, tensor in stored.tensors.items() if name not in reader.constants}
    return StoredGraph(path, layers, weights)


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
                weights = [name for name in node.input[1:] if name]
                yield self._layer(node.op_type, node, weights, node.output[0])
            elif node.op_type == "InstanceNormalization":
                yield self._group_norm(node)
            elif node.op_type == LINEAR and self.casts.get(node.input[1], node.input[1]) in self.stored.tensors:
                yield self._layer(LINEAR, node, [node.input[1]], node.output[0])

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
        return replace(layer, attributes={**layer.attributes, "groups": groups})

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


@dataclass(frozen=True)
class RunLayer:
    """One call of a layer that has weights."""

    name: str
    kind: str
    module: nn.Module
    follows: str | None  # the convolution whose output a norm reads


def state_of_graph(module: nn.Module, run: Sequence[RunLayer], stored: StoredGraph) -> dict[str, Tensor]:
    """Read the float32 `state_dict` of a module from the graph exported from it.

    run: the module's layers, from `layers_run`. A folded batch norm becomes one that only adds its bias:
    scale 1, mean 0, variance 1 - eps. Raises BundleError, naming layers and what was expected, unless the
    graph has exactly the module's layers, each with its shapes and settings, and no other weights.
    """
    match = _Match(stored)
    norms = {layer.follows: layer for layer in run if layer.kind == BATCH_NORM and layer.follows is not None}
    folded: set[str] = set()
    for layer in run:
        if layer.name in folded:
            continue
        taken = match.take(layer)
        if layer.kind == LINEAR:
            match.put_linear(layer, taken)
            continue
        if layer.kind != CONVOLUTION:
            match.put_norm(layer, taken)
            continue
        norm = norms.get(layer.name)
        following = stored.layers[match.place : match.place + 1]
        if any(after.kind == BATCH_NORM and after.reads == taken.output for after in following):
            norm = None
        match.put_convolution(layer, taken, norm)
        if norm is not None:
            folded.add(norm.name)
    left = stored.layers[match.place :]
    if left:
        raise stored.error(f"{len(left)} layers the network does not have, starting with {left[0].output}")
    return match.complete(module)


def layers_run(module: nn.Module, stored: StoredGraph) -> list[RunLayer]:
    """Run a module on the meta device and list its layers with weights in the order they are called.

    Raises BundleError as soon as the module calls more layers than the graph can have.
    """
    run: list[RunLayer] = []
    made: dict[int, tuple[str, Tensor]] = {}  # outputs of convolutions; kept alive, so ids stay unique

    def note(name: str, kind: str, layer: nn.Module, given: Any) -> None:
        follows = made.get(id(given), (None, None))[0] if kind == BATCH_NORM else None
        run.append(RunLayer(name, kind, layer, follows))
        # Folded norms are missing in the graph: at most one per convolution.
        if len(run) > 2 * len(stored.layers):
            raise stored.error(f"{len(stored.layers)} layers with weights, the network has more")

    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            kind = next((kind for kind, made_of in _KINDS.items() if isinstance(layer, made_of)), None)
            if kind is None:
                continue
            before = layer.register_forward_pre_hook(
                lambda layer, given, name=name, kind=kind: note(name, kind, layer, given[0])
            )
            hooks.callback(before.remove)
            if kind == CONVOLUTION:
                after = layer.register_forward_hook(
                    lambda _, __, output, name=name: made.update({id(output): (name, output)})
                )
                hooks.callback(after.remove)
        with torch.no_grad():
            module(torch.empty(1, MINIMUM_SIDE, MINIMUM_SIDE, 3, dtype=torch.uint8, device="meta"))
    return run


def _settings(layer: RunLayer) -> Iterator[tuple[str, tuple[float, ...]]]:
    module = layer.module
    if isinstance(module, nn.Conv2d):
        yield from (("strides", module.stride), ("dilations", module.dilation), ("group", (module.groups,)))
    elif isinstance(module, nn.GroupNorm):
        yield from (("groups", (module.num_groups,)), ("epsilon", (module.eps,)))
    elif isinstance(module, nn.BatchNorm2d):
        yield "epsilon", (module.eps,)


@dataclass
class _Match:
    """The state so far, and the initializer that each part came from ("" for none)."""

    stored: StoredGraph
    place: int = 0  # of the next layer of the graph
    state: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def take(self, layer: RunLayer) -> StoredLayer:
        """Return the next layer, which must have the kind and settings of the module's `layer`."""
        if self.place == len(self.stored.layers):
            raise self.stored.error(f"no layer for {layer.name}, expected {layer.kind}")
        taken = self.stored.layers[self.place]
        self.place += 1
        if taken.kind != layer.kind:
            problem = f"got {taken.kind}, expected {layer.kind} for {layer.name}"
            raise self.stored.error(f"{taken.output}: {problem}")
        for name, expected in _settings(layer):
            got = taken.attributes.get(name, _DEFAULTS[name])
            # The graph stores epsilon as float32.
            if len(got) != len(expected) or not np.allclose(got, expected, rtol=1e-6, atol=0):
                raise self.stored.error(
                    f"{taken.output}: {name}: got {list(got)}, expected {list(expected)} for {layer.name}"
                )
        return taken

    def put_convolution(self, layer: RunLayer, taken: StoredLayer, norm: RunLayer | None) -> None:
        """Set a convolution and, if `norm` was folded into it, that batch norm."""
        module = layer.module
        assert isinstance(module, nn.Conv2d)
        # Other classes derive the weights they use from those they store; the graph has the result.
        if type(module).forward not in (nn.Conv2d.forward, FixedSameConv2d.forward):
            kind = type(module).__name__
            raise self.stored.error(f"{layer.name}: {kind} does not use its weights as they are")
        self._put(f"{layer.name}.weight", module.weight, taken.weights[0])
        # The exporter omits a bias of zeros.
        bias = taken.weights[1] if len(taken.weights) > 1 else ""
        if norm is not None:
            self._put_adding_norm(norm, bias)
            bias = ""
        if module.bias is not None:
            self._put(f"{layer.name}.bias", module.bias, bias)
        elif bias:
            raise self.stored.error(f"{bias}: {layer.name} has no bias")

    def put_linear(self, layer: RunLayer, taken: StoredLayer) -> None:
        """Set the weight [out, in] of a linear layer, which the graph has as [in, out]."""
        module = layer.module
        assert isinstance(module, nn.Linear)
        key = f"{layer.name}.weight"
        first = key not in self.state
        self._put(key, module.weight.T, taken.weights[0])
        if first:
            self.state[key] = self.state[key].T.contiguous()

    def put_norm(self, layer: RunLayer, taken: StoredLayer) -> None:
        """Set a norm that the graph has as well."""
        module = layer.module
        assert isinstance(module, _NORM)
        names = ("weight", "bias", "running_mean", "running_var")
        for name, source in zip(names, taken.weights, strict=False):
            self._put(f"{layer.name}.{name}", getattr(module, name), source)

    def _put_adding_norm(self, norm: RunLayer, bias: str) -> None:
        module = norm.module
        assert isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        self._put(f"{norm.name}.bias", module.running_mean, bias)
        ones = torch.ones(module.num_features, device="cpu")
        self.state |= {
            f"{norm.name}.weight": ones,
            f"{norm.name}.running_mean": torch.zeros_like(ones),
            f"{norm.name}.running_var": ones - module.eps,
        }

    def _put(self, key: str, like: Tensor, source: str) -> None:
        if self.sources.setdefault(key, source) != source:  # a layer that runs several times
            raise self.stored.error(f"{key}: both {self.sources[key] or 'none'} and {source or 'none'}")
        if key not in self.state:
            shape = tuple(like.shape)
            values = self.stored.values(source, shape) if source else np.zeros(shape, np.float32)
            self.state[key] = torch.from_numpy(values)

    def complete(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the whole state; parameters outside the layers are found by name. Raises BundleError."""
        expected = module.state_dict()
        for key, like in expected.items():
            source = self.stored.named(key)
            if key.endswith(_COUNTER):
                self.state[key] = torch.zeros((), dtype=torch.int64)
            elif key not in self.state and source is not None:
                self._put(key, like, source)
        # A network that does not read a level of the pyramid has a graph without the layers that make it.
        missing = [key for key in expected if key not in self.state and not key.startswith(_PYRAMID)]
        if missing:
            raise self.stored.error(f"no weights for {_some(missing)}")
        read = {*self.sources.values(), *_BUFFERS}
        unread = [name for name in self.stored.weight_names() if name not in read]
        if unread:
            raise self.stored.error(f"weights that the network does not have: {_some(unread)}")
        # Equal weights are stored once, under the name of one of them; all others have their own name.
        for key, source in self.sources.items():
            owner = _APPENDED.sub("", source)
            if key.endswith(".weight") and owner in self.state and self.sources.get(owner) != source:
                raise self.stored.error(f"{source}: found in place of {key}")
        return self.state


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
