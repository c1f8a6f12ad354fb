"""Attention in exported graphs: a loop over blocks of queries, so that no (h w)^2 matrix is ever allocated.

The exporter writes one placeholder per attention layer; `expand_attention` replaces it by a Loop. Each
iteration compares QUERY_BLOCK queries with all keys, so memory grows with h w, not with its square.

Precision: the logits are not scaled by 1 / sqrt(c) and exceed float16's 65504 with features of ordinary size;
by the time Softmax subtracts the maximum, the product is already infinite. In graphs of lower precision the
loops therefore stay float32, inputs included. Their nodes are named attention_N.loop, and inside them
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

from multisa.export.fp16 import replace_values
from multisa.runtime.errors import ParityError

# 18: the newest opset whose Resize every execution provider of ONNX Runtime has.
OPSET = 18
# Queries per iteration. A block of 256 x 16,384 logits (a stride-4 grid at 512 pixels) takes 16 MiB. It is a
# constant, not a share of the tokens: TensorRT reserves memory for the largest shape of a profile, and cannot
# bound a block whose size is the result of a division.
QUERY_BLOCK = 256
_DOMAIN = "multisa.export"
_NAME = "Attention"
# query, key: [N, 1, T, c]; value, attended: [N, 1, T, v]. The last block repeats the last query where the
# tokens end: a Gather by computed indices works inside the loops of every backend, a moving Slice does not.
_FUNCTION = f"""
<domain: "{_DOMAIN}", opset_import: ["" : {OPSET}]>
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
_SCHEMA = OpSchema(
    _NAME,
    _DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
    outputs=[OpSchema.FormalParameter("attended", "T")],
    type_constraints=[("T", ["tensor(float)"], "what PyTorch computes attention in")],
)
_PLACEHOLDER = values.Op(values.Opset(_DOMAIN, 1), _NAME, _SCHEMA)


def _placeholder(query: Any, key: Any, value: Any, *, scale: float | None = None, **unused: Any) -> Any:
    # The arguments of scaled_dot_product_attention; our networks use these alone.
    if scale != 1.0 or unused:
        raise ParityError(f"attention: got scale {scale} and {sorted(unused)}, expected scale 1.0 and no mask")
    return _PLACEHOLDER(query, key, value)


def attention_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...): placeholders that `expand_attention` resolves."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _placeholder}


def expand_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every placeholder by the loop over blocks of queries; returns a new model."""
    if all(node.domain != _DOMAIN for node in model.graph.node):
        return model
    model.functions.append(onnx.parser.parse_function(_FUNCTION))
    expanded = inliner.inline_local_functions(model)
    replace_values(expanded.opset_import, [entry for entry in expanded.opset_import if entry.domain != _DOMAIN])
    for node in expanded.graph.node:
        if node.op_type == "Loop":
            body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
            for inner in (node, *body.node):
                inner.name = _readable(inner.name)
    return expanded


def _readable(name: str) -> str:
    # The inliner numbers the nodes it writes from 1: loop__1, logits__1, ...
    numbered = re.fullmatch(r"(\w+)__(\d+)", name)
    return f"attention_{int(numbered[2]) - 1}.{numbered[1]}" if numbered else name
