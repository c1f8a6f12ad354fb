"""Match the layers of a module with those of the graph exported from it, in the order they run."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multisa.export.stored_layers import BATCH_NORM, CONVOLUTION, GROUP_NORM, PREFIX, StoredGraph, StoredLayer
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.training.backbones import FixedSameConv2d

# What to_onnx.py appends to the name of a weight.
_APPENDED = re.compile(r"(\.folded_\d+)?(\.half)?$")
# ONNX's defaults for attributes that a node leaves out.
_DEFAULTS = {"strides": (1, 1), "dilations": (1, 1), "group": (1,), "epsilon": (1e-5,), "groups": (0,)}
_BUFFERS = (f"{PREFIX}backbone.mean", f"{PREFIX}backbone.std")  # the module has its own
_COUNTER = "num_batches_tracked"  # of batch norms; only training reads it
_KINDS = {CONVOLUTION: nn.Conv2d, BATCH_NORM: nn.BatchNorm2d, GROUP_NORM: nn.GroupNorm}
_NORM = nn.BatchNorm2d | nn.GroupNorm


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
    found = _Found(stored)
    queue = _Queue(stored)
    norms = {}
    for layer in run:
        if layer.kind == BATCH_NORM and layer.follows is not None:
            norms[layer.follows] = layer
    folded: set[str] = set()
    for layer in run:
        if layer.name in folded:
            continue
        taken = queue.take(layer)
        if layer.kind != CONVOLUTION:
            found.put_norm(layer, taken)
            continue
        norm = norms.get(layer.name)
        if norm is None or queue.next_is_norm_of(taken):
            found.put_convolution(layer, taken, norm=None)
        else:
            folded.add(norm.name)
            found.put_convolution(layer, taken, norm)
    queue.finish()
    return found.complete(module)


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

    def keep(name: str, output: Tensor) -> None:
        made[id(output)] = (name, output)

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
                after = layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
                hooks.callback(after.remove)
        with torch.no_grad():
            module(torch.empty(1, MINIMUM_SIDE, MINIMUM_SIDE, 3, dtype=torch.uint8, device="meta"))
    return run


class _Queue:
    """The layers of a graph, taken in order."""

    def __init__(self, stored: StoredGraph) -> None:
        self.stored = stored
        self.place = 0

    def take(self, layer: RunLayer) -> StoredLayer:
        """Return the next layer, which must have the kind and settings of the module's `layer`."""
        if self.place == len(self.stored.layers):
            raise self.stored.error(f"no layer for {layer.name}, expected {layer.kind}")
        taken = self.stored.layers[self.place]
        self.place += 1
        if taken.kind != layer.kind:
            raise self.stored.error(
                f"{taken.output}: got {taken.kind}, expected {layer.kind} for {layer.name}"
            )
        for name, expected in _settings(layer):
            got = taken.attributes.get(name, _DEFAULTS[name])
            # The graph stores epsilon as float32.
            if len(got) != len(expected) or not np.allclose(got, expected, rtol=1e-6, atol=0):
                raise self.stored.error(
                    f"{taken.output}: {name}: got {list(got)}, expected {list(expected)} for {layer.name}"
                )
        return taken

    def next_is_norm_of(self, convolution: StoredLayer) -> bool:
        rest = self.stored.layers[self.place : self.place + 1]
        return any(layer.kind == BATCH_NORM and layer.reads == convolution.output for layer in rest)

    def finish(self) -> None:
        """Raise BundleError if layers are left."""
        left = self.stored.layers[self.place :]
        if left:
            raise self.stored.error(
                f"{len(left)} layers the network does not have, starting with {left[0].output}"
            )


def _settings(layer: RunLayer) -> Iterator[tuple[str, tuple[float, ...]]]:
    module = layer.module
    if isinstance(module, nn.Conv2d):
        yield from (("strides", module.stride), ("dilations", module.dilation), ("group", (module.groups,)))
    elif isinstance(module, nn.GroupNorm):
        yield from (("groups", (module.num_groups,)), ("epsilon", (module.eps,)))
    elif isinstance(module, nn.BatchNorm2d):
        yield "epsilon", (module.eps,)


@dataclass
class _Found:
    """The state so far, and the initializer that each part came from ("" for none)."""

    stored: StoredGraph
    state: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def put_convolution(self, layer: RunLayer, taken: StoredLayer, norm: RunLayer | None) -> None:
        """Set a convolution and, if `norm` was folded into it, that batch norm."""
        module = layer.module
        assert isinstance(module, nn.Conv2d)
        # Other classes derive the weights they use from those they store; the graph has the result.
        if type(module).forward not in (nn.Conv2d.forward, FixedSameConv2d.forward):
            raise self.stored.error(
                f"{layer.name}: {type(module).__name__} does not use its weights as they are"
            )
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
            self.state[key] = (
                torch.from_numpy(self.stored.values(source, shape))
                if source
                else torch.zeros(shape, device="cpu")
            )

    def complete(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the whole state; parameters outside the layers are found by name. Raises BundleError."""
        expected = module.state_dict()
        for key, like in expected.items():
            source = self.stored.named(key)
            if key.endswith(_COUNTER):
                self.state[key] = torch.zeros((), dtype=torch.int64)
            elif key not in self.state and source is not None:
                self._put(key, like, source)
        missing = [key for key in expected if key not in self.state]
        if missing:
            raise self.stored.error(f"no weights for {_some(missing)}")
        read = {*self.sources.values(), *_BUFFERS}
        unread = [name for name in self.stored.weight_names() if name not in read]
        if unread:
            raise self.stored.error(f"weights that the network does not have: {_some(unread)}")
        self._check_names()
        return self.state

    def _check_names(self) -> None:
        # Equal weights are stored once, under the name of one of them; all others have their own name.
        for key, source in self.sources.items():
            owner = _APPENDED.sub("", source)
            if key.endswith(".weight") and owner in self.state and self.sources.get(owner) != source:
                raise self.stored.error(f"{source}: found in place of {key}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
