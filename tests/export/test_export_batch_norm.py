"""Batch norms fold into convolutions, shared weights included, and nothing else is touched."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from multisa.export.to_onnx import fold_batch_norms

# Two scales through one convolution and one norm, with a bias and groups; then a norm without a convolution
# before it, and a convolution that is read elsewhere too.
GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
scales (float[n, 4, h, w] fine, float[n, 4, h2, w2] coarse)
    => (float[n, 6, a, b] first, float[n, 6, c, d] second, float[n, 6, e, f] third, float[n, 6, g, i] raw)
{
    fine_conv = Conv <group = 2, pads = [1, 1, 1, 1]> (fine, weight, bias)
    first = BatchNormalization <epsilon = 0.01> (fine_conv, gamma, beta, mean, variance)
    coarse_conv = Conv <group = 2, pads = [1, 1, 1, 1]> (coarse, weight, bias)
    coarse_norm = BatchNormalization <epsilon = 0.01> (coarse_conv, gamma, beta, mean, variance)
    positive = Relu (coarse_norm)
    second = BatchNormalization (positive, gamma, beta, mean, variance)
    raw = Conv <group = 2> (fine, weight)
    third = BatchNormalization (raw, gamma, beta, mean, variance)
}
"""


@pytest.fixture
def model() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    parsed = onnx.parser.parse_model(GRAPH)
    values = {name: random.normal(size=6) for name in ("bias", "gamma", "beta", "mean")}
    values |= {"weight": random.normal(size=(6, 2, 3, 3)), "variance": random.uniform(0.01, 4, 6)}
    for name, value in values.items():
        parsed.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return parsed


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    random = np.random.default_rng(1)
    feeds = {
        "fine": random.normal(size=(2, 4, 9, 7)).astype(np.float32),
        "coarse": random.normal(size=(2, 4, 5, 4)).astype(np.float32),
    }
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


def test_folding_changes_no_answer(model: onnx.ModelProto) -> None:
    expected = run(model)
    fold_batch_norms(model.graph)
    onnx.checker.check_model(model, full_check=True)
    for answer, wanted in zip(run(model), expected, strict=True):
        np.testing.assert_allclose(answer, wanted, atol=2e-5)


def test_shared_weights_stay_shared_and_others_stay(model: onnx.ModelProto) -> None:
    fold_batch_norms(model.graph)
    kept = [node.output[0] for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert kept == ["second", "third"]
    fine, coarse, raw = (node for node in model.graph.node if node.op_type == "Conv")
    assert fine.output[0] == "first" and coarse.output[0] == "coarse_norm"
    assert list(fine.input[1:]) == list(coarse.input[1:])
    assert list(raw.input) == ["fine", "weight"]
    stored = {initialiser.name for initialiser in model.graph.initializer}
    assert stored == {*fine.input[1:], "weight", "gamma", "beta", "mean", "variance"}
