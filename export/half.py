"""An fp32 graph -> the same graph with weights and arithmetic in fp16, strongly typed, its contract kept.

Precision is in the types of the file, as TensorRT 11 reads it; nothing is left to an engine's choice. Which
nodes stay in fp32 is measured (sensitivity.py) but for two kinds that are never lowered: arithmetic on shapes
and coordinates, which no photograph of the measurement would show to fail at a larger size, and nodes with
subgraphs. No bfloat16 graph is made: only TensorRT runs one, ONNX Runtime on a CPU cannot, so that no gate
could open or close for it where graphs are made.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT, HALF, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8
SIZES = ("Shape", "Size")
HALF_LIMIT = float(np.finfo(np.float16).max)

_HALF_SUFFIX = ".fp16"


@dataclass(frozen=True)
class PlainGraph:
    """A graph with float32 weights, each node named, and what is known of its values."""

    model: onnx.ModelProto
    stored_half: frozenset[str]  # weights that the file held as float16: stored so again
    types: dict[str, int]  # elem_type of every value of the main graph


def plain_graph(data: bytes) -> PlainGraph:
    """Read a graph whose weights may be stored as float16 and cast, as `multisa export` writes it."""
    model = onnx.load_from_string(data)
    graph = model.graph
    initialisers = {initialiser.name: initialiser for initialiser in graph.initializer}
    stored_half, kept = set(), []
    for node in graph.node:
        source = initialisers.get(node.input[0]) if node.op_type == "Cast" else None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        elif source is not None and source.data_type == HALF and node.attribute[0].i == FLOAT:
            values = numpy_helper.to_array(source).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            stored_half.add(node.output[0])
        else:
            kept.append(node)
    for position, node in enumerate(kept):  # names are what provenance lists and what the passes go by
        node.name = node.name or f"{node.op_type}_{position}"
    if len({node.name for node in kept}) < len(kept):
        for position, node in enumerate(kept):
            node.name = f"{node.name}_{position}"
    _replace(graph.node, kept)
    used = {name for node in graph.node for name in _reads(node)}
    _replace(graph.initializer, [i for i in graph.initializer if i.name in used])
    return PlainGraph(model, frozenset(stored_half & used), _value_types(model))


def half_candidates(plain: PlainGraph) -> tuple[str, ...]:
    """Names of the nodes that can run in fp16, in the order they run."""
    graph = plain.model.graph
    from_image = {graph.input[0].name}
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == FLOAT}
    too_large = {name for name, values in weights.items() if np.abs(values).max(initial=0) > HALF_LIMIT}
    names = []
    for node in graph.node:
        # What follows from sizes alone are coordinates, which beyond 2048 are not exact in fp16.
        if node.op_type not in SIZES and from_image & set(_reads(node)):
            from_image.update(node.output)
        converted = [*_half_inputs(plain, node), *_half_outputs(plain, node)]
        if (
            from_image & set(node.output)
            and converted
            and not too_large & set(converted)
            and not any(a.HasField("g") or a.graphs for a in node.attribute)
        ):
            names.append(node.name)
    return tuple(names)


def half_graph(plain: PlainGraph, lowered: Collection[str]) -> onnx.ModelProto:
    """Give the nodes named by `lowered` fp16 inputs and outputs; casts where fp16 and fp32 meet.

    A value keeps its name in fp32; in fp16 it is `name.fp16`. Weights of lowered nodes are stored as float16.
    """
    model = onnx.ModelProto()
    model.CopyFrom(plain.model)
    graph = model.graph
    made_half: set[str] = set()  # values that come out of their node in fp16
    wanted_half, wanted_float = set(), {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type in SIZES and node.input[0] in made_half:
            node.input[0] += _HALF_SUFFIX  # of any type, and not worth a cast
            continue
        halves: dict[str, set[str]] = {"input": set(), "output": set()}
        if node.name in lowered:
            halves["input"] = set(_half_inputs(plain, node))
            halves["output"] = set(_half_outputs(plain, node))
            if node.op_type == "Cast" and node.attribute[0].i == FLOAT:
                node.attribute[0].i = HALF
        wanted_float.update(name for name in _reads(node) if name not in halves["input"])
        wanted_half |= halves["input"]
        made_half |= halves["output"]
        for names, chosen in ((node.input, halves["input"]), (node.output, halves["output"])):
            for place, name in enumerate(names):
                if name in chosen:
                    names[place] = name + _HALF_SUFFIX
    nodes, initialisers = [], []
    for initialiser in graph.initializer:
        name = initialiser.name
        as_half = name in wanted_half or name in plain.stored_half
        if as_half:
            values = numpy_helper.to_array(initialiser).astype(np.float16)
            initialisers.append(numpy_helper.from_array(values, name + _HALF_SUFFIX))
        if name in wanted_float or not as_half:
            if name in plain.stored_half:
                nodes.append(_cast(name + _HALF_SUFFIX, name, FLOAT))
            else:
                initialisers.append(initialiser)
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            origin = name.removesuffix(_HALF_SUFFIX)
            if origin in made_half and origin in wanted_float:
                nodes.append(_cast(name, origin, FLOAT))
            elif name in wanted_half and name not in made_half:
                nodes.append(_cast(name, name + _HALF_SUFFIX, HALF))
    _replace(graph.initializer, initialisers)
    _replace(graph.node, nodes)
    graph.ClearField("value_info")  # of the fp32 graph; whoever needs them infers them
    return model


def rounded_graph(plain: PlainGraph, lowered: Collection[str]) -> onnx.ModelProto:
    """Twin of `half_graph` that answers on a CPU as fp16 arithmetic does: for measurement, not to be shipped.

    ONNX Runtime on a CPU computes a chain of fp16 nodes in fp32 and rounds at its end. Here each lowered node
    computes in fp32, which is how tensor cores accumulate, and its results are rounded, one by one, by casts
    that are part of the graph and therefore stay.
    """
    model = half_graph(plain, lowered)
    graph = model.graph
    nodes = []
    for node in graph.node:
        if node.name not in lowered:
            nodes.append(node)
            continue
        before, after = [], []
        for place, name in enumerate(node.input):
            if name.endswith(_HALF_SUFFIX):
                node.input[place] = f"{name}.in.{node.name}.{place}"
                before.append(_cast(name, node.input[place], FLOAT))
        for place, name in enumerate(node.output):
            if name.endswith(_HALF_SUFFIX):
                node.output[place] = f"{name}.out"
                after.append(_cast(node.output[place], name, HALF))
        if node.op_type == "Cast" and node.attribute[0].i == HALF:
            node.attribute[0].i = FLOAT
        nodes += [*before, node, *after]
    _replace(graph.node, nodes)
    return model


def model_bytes(model: onnx.ModelProto) -> bytes:
    """Check a graph, types included, and write it; the same bytes for the same graph."""
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _half_inputs(plain: PlainGraph, node: onnx.NodeProto) -> list[str]:
    """Those of a node's inputs that are float32 and may be float16 by the operator's schema."""
    schema = _schema(plain, node)
    return [] if schema is None else _half_values(plain, schema, schema.inputs, node.input)


def _half_outputs(plain: PlainGraph, node: onnx.NodeProto) -> list[str]:
    """The same of its outputs."""
    schema = _schema(plain, node)
    return [] if schema is None else _half_values(plain, schema, schema.outputs, node.output)


def _schema(plain: PlainGraph, node: onnx.NodeProto) -> Any:
    opset = next(e.version for e in plain.model.opset_import if e.domain in ("", "ai.onnx"))
    known = node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, opset, "")
    return onnx.defs.get_schema(node.op_type, opset, "") if known else None


def _half_values(plain: PlainGraph, schema: Any, formal: Sequence[Any], names: Sequence[str]) -> list[str]:
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    # The last formal parameter may be variadic.
    kinds = [formal[min(place, len(formal) - 1)].type_str for place in range(len(names))]
    return [
        name
        for name, kind in zip(names, kinds, strict=True)
        if plain.types.get(name) == FLOAT and "tensor(float16)" in allowed.get(kind, ())
    ]


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {initialiser.name: initialiser.data_type for initialiser in graph.initializer}


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every value a node reads, those its subgraphs take from around it included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            yield from (name for inner in graph.node for name in _reads(inner))
            yield from (output.name for output in graph.output)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=kind)


def _replace(field: Any, values: Iterable[Any]) -> None:
    """Give a repeated field of a message other values, some of which may be in it already."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
