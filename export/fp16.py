"""Convert a graph's weights and arithmetic to fp16, with the same inputs and outputs.

The result is strongly typed: the file states the type of each value, as TensorRT 11 expects, and no backend
chooses a precision of its own. Measurements decide which nodes stay in fp32 (sensitivity.py), except for two
kinds that are never converted: nodes with subgraphs, and arithmetic on shapes and coordinates, which could
fail at sizes larger than the measured images. There is no bfloat16 graph: ONNX Runtime's CPU cannot run one,
so parity could not be checked where graphs are made.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT
FLOAT16 = onnx.TensorProto.FLOAT16
SHAPE_OPERATORS = ("Shape", "Size")
FP16_MAX = float(np.finfo(np.float16).max)

_SUFFIX = ".fp16"  # of a value's name in its float16 form


@dataclass(frozen=True)
class Fp32Graph:
    """A graph with float32 weights and a name for each node."""

    model: onnx.ModelProto
    float16_weights: frozenset[str]  # weights that the file stored as float16, and will again
    types: dict[str, int]  # elem_type of every value of the main graph


def read_fp32_graph(data: bytes) -> Fp32Graph:
    """Read a graph as `multisa export` writes it, where weights may be stored as float16 with a cast."""
    model = onnx.load_from_string(data)
    graph = model.graph
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    float16_weights = set()
    kept = []
    for node in graph.node:
        source = initializers.get(node.input[0]) if node.op_type == "Cast" else None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        elif source is not None and source.data_type == FLOAT16 and node.attribute[0].i == FLOAT:
            values = numpy_helper.to_array(source).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            float16_weights.add(node.output[0])
        else:
            kept.append(node)
    for position, node in enumerate(kept):  # provenance lists nodes by name, and so do the passes below
        node.name = node.name or f"{node.op_type}_{position}"
    if len({node.name for node in kept}) < len(kept):
        for position, node in enumerate(kept):
            node.name = f"{node.name}_{position}"
    replace_values(graph.node, kept)
    used = {name for node in graph.node for name in _reads(node)}
    replace_values(graph.initializer, [i for i in graph.initializer if i.name in used])
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {initializer.name: initializer.data_type for initializer in inferred.initializer}
    return Fp32Graph(model, frozenset(float16_weights & used), types)


def fp16_candidates(fp32: Fp32Graph) -> tuple[str, ...]:
    """Names of the nodes that can run in fp16, in the order they run."""
    graph = fp32.model.graph
    from_image = {graph.input[0].name}
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == FLOAT}
    too_large = {name for name, values in weights.items() if np.abs(values).max(initial=0) > FP16_MAX}
    names = []
    for node in graph.node:
        # Values computed from sizes alone are coordinates, which fp16 does not represent exactly above 2048.
        if node.op_type not in SHAPE_OPERATORS and from_image & set(_reads(node)):
            from_image.update(node.output)
        converted = [name for names in _fp16_values(fp32, node) for name in names]
        if (
            from_image & set(node.output)
            and converted
            and not too_large & set(converted)
            and not any(a.HasField("g") or a.graphs for a in node.attribute)
        ):
            names.append(node.name)
    return tuple(names)


def fp16_graph(fp32: Fp32Graph, converted: Collection[str]) -> onnx.ModelProto:
    """Convert the nodes named in `converted` to fp16, with casts where fp16 and fp32 meet.

    A value keeps its name in fp32 and is called `name.fp16` in fp16. Weights of converted nodes are stored as
    float16.
    """
    model = onnx.ModelProto()
    model.CopyFrom(fp32.model)
    graph = model.graph
    fp16_values: set[str] = set()  # values that their node produces in fp16
    fp16_wanted: set[str] = set()
    fp32_wanted = {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type in SHAPE_OPERATORS and node.input[0] in fp16_values:
            node.input[0] += _SUFFIX  # takes any type, so no cast is needed
            continue
        inputs: set[str] = set()
        outputs: set[str] = set()
        if node.name in converted:
            inputs, outputs = map(set, _fp16_values(fp32, node))
            if node.op_type == "Cast" and node.attribute[0].i == FLOAT:
                node.attribute[0].i = FLOAT16
        fp32_wanted.update(name for name in _reads(node) if name not in inputs)
        fp16_wanted |= inputs
        fp16_values |= outputs
        for names, chosen in ((node.input, inputs), (node.output, outputs)):
            for place, name in enumerate(names):
                if name in chosen:
                    names[place] = name + _SUFFIX
    nodes = []
    initializers = []
    for initializer in graph.initializer:
        name = initializer.name
        as_float16 = name in fp16_wanted or name in fp32.float16_weights
        if as_float16:
            values = numpy_helper.to_array(initializer).astype(np.float16)
            initializers.append(numpy_helper.from_array(values, name + _SUFFIX))
        if name in fp32_wanted or not as_float16:
            if name in fp32.float16_weights:
                nodes.append(_cast(name + _SUFFIX, name, FLOAT))
            else:
                initializers.append(initializer)
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            origin = name.removesuffix(_SUFFIX)
            if origin in fp16_values and origin in fp32_wanted:
                nodes.append(_cast(name, origin, FLOAT))
            elif name in fp16_wanted and name not in fp16_values:
                nodes.append(_cast(name, name + _SUFFIX, FLOAT16))
    replace_values(graph.initializer, initializers)
    replace_values(graph.node, nodes)
    graph.ClearField("value_info")  # types of the fp32 graph, which no longer hold
    return model


def emulated_fp16_graph(fp32: Fp32Graph, converted: Collection[str]) -> onnx.ModelProto:
    """Make the emulated form of `fp16_graph`, which gives fp16 results on a CPU; for measurement only.

    ONNX Runtime's CPU computes a chain of fp16 nodes in fp32 and rounds once at its end. Here each converted
    node computes in fp32, as tensor cores accumulate, and casts that are part of the graph round each result.
    """
    model = fp16_graph(fp32, converted)
    graph = model.graph
    nodes = []
    for node in graph.node:
        if node.name not in converted:
            nodes.append(node)
            continue
        before = []
        after = []
        for place, name in enumerate(node.input):
            if name.endswith(_SUFFIX):
                node.input[place] = f"{name}.in.{node.name}.{place}"
                before.append(_cast(name, node.input[place], FLOAT))
        for place, name in enumerate(node.output):
            if name.endswith(_SUFFIX):
                node.output[place] = f"{name}.out"
                after.append(_cast(node.output[place], name, FLOAT16))
        if node.op_type == "Cast" and node.attribute[0].i == FLOAT16:
            node.attribute[0].i = FLOAT
        nodes += [*before, node, *after]
    replace_values(graph.node, nodes)
    return model


def model_bytes(model: onnx.ModelProto) -> bytes:
    """Check a graph, types included, and serialize it; the same graph gives the same bytes."""
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _fp16_values(fp32: Fp32Graph, node: onnx.NodeProto) -> tuple[list[str], list[str]]:
    """The inputs and the outputs of a node that are float32 and that its operator allows to be float16."""
    opset = next(e.version for e in fp32.model.opset_import if e.domain in ("", "ai.onnx"))
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset, ""):
        return [], []
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def chosen(names: Sequence[str], formal: Sequence[Any]) -> list[str]:
        # The last formal parameter may be variadic.
        kinds = [formal[min(place, len(formal) - 1)].type_str for place in range(len(names))]
        return [
            name
            for name, kind in zip(names, kinds, strict=True)
            if fp32.types.get(name) == FLOAT and "tensor(float16)" in allowed.get(kind, ())
        ]

    return chosen(node.input, schema.inputs), chosen(node.output, schema.outputs)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every value a node reads, including those its subgraphs take from the enclosing graph."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            yield from (name for inner in graph.node for name in _reads(inner))
            yield from (output.name for output in graph.output)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=kind)


def replace_values(field: Any, values: Iterable[Any]) -> None:
    """Replace the values of a repeated field; some may be in it already."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
