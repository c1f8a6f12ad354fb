"""Attention in exported graphs: a loop over blocks of queries, so that no (h w)^2 matrix is ever made.

The exporter writes one placeholder for each attention; `expand_attention` puts a Loop in its place. An
iteration takes QUERY_BLOCK queries against all keys: memory grows with h w and not with its square. The block
is a constant because TensorRT reserves memory for the largest shape of a profile, and can tell how large a
block gets only where no division is in the way.

Precision: the logits are not scaled by 1 / sqrt(c) and exceed float16's 65504 with features of ordinary size;
the maximum that Softmax subtracts comes too late for a product that is infinite already. In a graph of lower
precision the loops stay float32, inputs and all: their nodes are named attention_N.loop, and inside them
attention_N.logits, attention_N.softmax and attention_N.attended.
"""

import re
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import inliner
from onnx.defs import OpSchema
from onnxscript import values

from multisa.runtime.errors import ParityError

QUERY_BLOCK = 256
_DOMAIN, _NAME = "multisa.export", "Attention"
# query, key: [N, 1, T, c]; value, attended: [N, 1, T, v]. Where the tokens end, the last block repeats the
# last query: a Gather by computed indices works in every engine's loops, unlike a Slice that moves.
_FUNCTION = f"""
<domain: "{_DOMAIN}", opset_import: ["" : 18]>
{_NAME} (query, key, value) => (attended)
{{
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    head = Constant <value_ints = [1]> ()
    first = Constant <value_ints = [0]> ()
    block = Constant <value_int = {QUERY_BLOCK}> ()
    queries = Squeeze (query, head)
    key_rows = Squeeze (key, head)
    keys = Transpose <perm = [0, 2, 1]> (key_rows)
    mixed = Squeeze (value, head)
    shape = Shape <start = 1, end = 2> (queries)
    tokens = Squeeze (shape, first)
    rows = Min (tokens, block)
    last_token = Sub (tokens, one)
    within = Range (zero, rows, one)
    filled = Add (last_token, rows)
    trips = Div (filled, rows)
    [loop] blocks = Loop (trips, "") <body = each_block
        (int64 trip, bool go_on) => (bool go_on_too, answer)
        {{
            go_on_too = Constant <value = bool {{1}}> ()
            start = Mul (trip, rows)
            shifted = Add (within, start)
            index = Min (shifted, last_token)
            some = Gather <axis = 1> (queries, index)
            [logits] logits = MatMul (some, keys)
            [softmax] weights = Softmax <axis = -1> (logits)
            [attended] answer = MatMul (weights, mixed)
        }}>
    in_order = Transpose <perm = [1, 0, 2, 3]> (blocks)
    columns = Shape <start = 2, end = 3> (mixed)
    batch = Shape <start = 0, end = 1> (mixed)
    flat_shape = Concat <axis = 0> (batch, minus_one, columns)
    flat = Reshape (in_order, flat_shape)
    cut = Slice (flat, first, shape, head)
    attended = Unsqueeze (cut, head)
}}
"""


_TYPES = [("T", ["tensor(float)"], "what PyTorch computes attention in")]
_SCHEMA = OpSchema(
    _NAME,
    _DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
    outputs=[OpSchema.FormalParameter("attended", "T")],
    type_constraints=_TYPES,
)
_PLACEHOLDER = values.Op(values.Opset(_DOMAIN, 1), _NAME, _SCHEMA)


def _place(query: Any, key: Any, value: Any, *, scale: float | None = None, **unused: Any) -> Any:
    # The arguments are those of scaled_dot_product_attention; our networks use no other than these.
    if scale != 1.0 or unused:
        raise ParityError(
            f"attention with scale {scale} and {sorted(unused)}: expected scale 1.0 and no mask"
        )
    return _PLACEHOLDER(query, key, value)


def attention_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...): placeholders that `expand_attention` resolves."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _place}


def expand_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the loop over blocks of queries in the place of every placeholder; returns another model."""
    if all(node.domain != _DOMAIN for node in model.graph.node):
        return model
    model.functions.append(onnx.parser.parse_function(_FUNCTION))
    expanded = inliner.inline_local_functions(model)
    kept = [entry for entry in expanded.opset_import if entry.domain != _DOMAIN]
    del expanded.opset_import[:]
    expanded.opset_import.extend(kept)
    for node in expanded.graph.node:
        if node.op_type == "Loop":
            body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
            for inner in (node, *body.node):
                inner.name = _readable(inner.name)
    return expanded


def _readable(name: str) -> str:
    # The inliner has numbered what it wrote, from 1: loop__1, logits__1, ...
    numbered = re.fullmatch(r"(\w+)__(\d+)", name)
    return f"attention_{int(numbered[2]) - 1}.{numbered[1]}" if numbered else name
