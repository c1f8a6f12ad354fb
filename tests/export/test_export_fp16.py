"""fp16 graphs: types are in the file, shapes stay exact, and the emulated graph rounds like fp16."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from multisa.export.fp16 import FP16_MAX, emulated_fp16_graph, fp16_candidates, fp16_graph, model_bytes, read_fp32_graph
from multisa.export.output_masks import add_labels
from multisa.export.parity import Compared, measure_parity
from multisa.export.precision import Reference, convert_to_fp16, largest_values
from multisa.runtime.backends.base import SEGMENTER, GraphContract, TensorContract
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.demo import IMAGES
from multisa.runtime.imaging.decode import read_image

Arrays = dict[str, np.ndarray]
CHANNELS = 4
MAPS = GraphContract("maps", {"maps": TensorContract("float32", "NChw")})


def graph_of(nodes: Iterable[onnx.NodeProto], weights: Arrays, output: str = "maps", rank: int = 4) -> bytes:
    """A graph from `image` to float32 `output`; weights of float16 are cast, as in a bundle's files."""
    casts = [
        helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
        for name, values in weights.items()
        if values.dtype == np.float16
    ]
    start = [
        helper.make_node("Cast", ["image"], ["real"], "real", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["real"], ["x"], "x", perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(
        [*casts, *start, *nodes],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)],
        [
            numpy_helper.from_array(values, f"{name}.half" if values.dtype == np.float16 else name)
            for name, values in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model_bytes(model)


def run(data: bytes, image: np.ndarray, contract: GraphContract = MAPS) -> Arrays:
    with OnnxRuntimeBackend(data, contract=contract) as backend:
        return backend.run(image[None])


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)


def chain() -> bytes:
    """A convolution, its maximum by coordinates, and a resizing to sizes computed in the graph."""
    random = np.random.default_rng(1)
    node = helper.make_node
    return graph_of(
        [
            node("Conv", ["x", "weight", "bias"], ["y"], "conv", kernel_shape=[1, 1]),
            node("Shape", ["y"], ["shape"], "shape"),
            node("Cast", ["shape"], ["sizes"], "sizes", to=TensorProto.FLOAT),
            node("Mul", ["sizes", "twice"], ["larger"], "larger"),
            node("Cast", ["larger"], ["target"], "target", to=TensorProto.INT64),
            node("Resize", ["y", "", "", "target"], ["raised"], "raise", mode="linear"),
            node("Conv", ["raised", "second"], ["maps"], "last", kernel_shape=[1, 1]),
        ],
        {
            "weight": (random.standard_normal((CHANNELS, 3, 1, 1)) / 255).astype(np.float16),
            "bias": random.standard_normal(CHANNELS).astype(np.float32),
            "second": random.standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32),
            "twice": np.array([1, 1, 2, 2], np.float32),
        },
    )


def test_weights_and_arithmetic_are_fp16_and_the_contract_is_not(image: np.ndarray) -> None:
    plain = read_fp32_graph(chain())
    candidates = fp16_candidates(plain)
    # Arithmetic on sizes stays in fp32: 2049 has no exact fp16 number.
    assert candidates == ("real", "x", "conv", "raise", "last")
    model = fp16_graph(plain, candidates)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert {kinds[f"{name}.fp16"] for name in ("weight", "bias", "second")} == {TensorProto.FLOAT16}
    assert kinds["twice"] == TensorProto.FLOAT and len(kinds) == 4
    assert [node.op_type for node in model.graph.node].count("Cast") == 4  # in, two of sizes, out
    got, expected = run(model_bytes(model), image)["maps"], run(chain(), image)["maps"]
    assert got.dtype == np.float32 and got.shape == expected.shape == (1, CHANNELS, 48, 40)
    assert 0 < np.abs(got - expected).max() < 0.02


def test_nodes_left_out_stay_in_fp32(image: np.ndarray) -> None:
    plain = read_fp32_graph(chain())
    nothing = fp16_graph(plain, [])
    np.testing.assert_array_equal(run(model_bytes(nothing), image)["maps"], run(chain(), image)["maps"])
    assert {i.name for i in nothing.graph.initializer} == {"weight.fp16", "bias", "second", "twice"}
    some = model_bytes(fp16_graph(plain, ["conv"]))
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(some), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    assert types["y.fp16"] == TensorProto.FLOAT16 and types["raised"] == TensorProto.FLOAT
    assert 0 < np.abs(run(some, image)["maps"] - run(chain(), image)["maps"]).max() < 0.02


def test_the_emulated_graph_rounds_after_every_node(image: np.ndarray) -> None:
    random = np.random.default_rng(2)
    weights = {f"w{i}": random.standard_normal((20, 20)).astype(np.float16) / 5 for i in range(4)}
    nodes = [
        helper.make_node("MatMul", [source, f"w{i}"], [target], f"m{i}")
        for i, (source, target) in enumerate(pairwise(["x", "y1", "y2", "y3", "maps"]))
    ]
    plain = read_fp32_graph(graph_of(nodes, weights))
    expected = image.transpose(2, 0, 1)[None].astype(np.float16)
    for weight in weights.values():
        expected = (expected.astype(np.float32) @ weight.astype(np.float32)).astype(np.float16)
    emulated = run(model_bytes(emulated_fp16_graph(plain, fp16_candidates(plain))), image)["maps"]
    error = np.abs(emulated - expected.astype(np.float32)).max()
    # Sums in another order round to a neighbour now and then, of a size like the values' 2^-11.
    assert error <= 2 * np.spacing(np.abs(expected).max().astype(np.float16))
    exact = run(model_bytes(fp16_graph(plain, [])), image)["maps"]
    assert np.abs(emulated - exact).max() > 0
    assert (emulated == expected.astype(np.float32)).mean() > 0.95


def attention(gain: float) -> bytes:
    """Softmax of unscaled products of features with themselves, applied to them."""
    node = helper.make_node
    return graph_of(
        [
            node("Conv", ["x", "weight"], ["f"], "features", kernel_shape=[1, 1]),
            node("Reshape", ["f", "rows"], ["q"], "queries"),
            node("Transpose", ["q"], ["k"], "keys", perm=[0, 2, 1]),
            node("MatMul", ["k", "q"], ["logits"], "logits"),
            node("Softmax", ["logits"], ["a"], "softmax", axis=-1),
            node("MatMul", ["a", "k"], ["averaged"], "averaged"),
            node("Transpose", ["averaged"], ["attended"], "attended", perm=[0, 2, 1]),
            node("Shape", ["f"], ["shape"], "shape"),
            node("Reshape", ["attended", "shape"], ["maps"], "maps"),
        ],
        {
            "weight": np.full((CHANNELS, 3, 1, 1), gain, np.float32)
            * np.random.default_rng(3).standard_normal((CHANNELS, 3, 1, 1)).astype(np.float32),
            "rows": np.array([0, CHANNELS, -1]),
        },
    )


CAM_OF_ATTENTION = GraphContract("cam", {"cam": TensorContract("float32", "NChw")})


def as_cam(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.graph.node.append(helper.make_node("Sigmoid", ["maps"], ["cam"], "cam"))
    model.graph.output[0].name = "cam"
    return model_bytes(model)


def test_values_beyond_fp16_are_found_and_their_nodes_kept(image: np.ndarray) -> None:
    data = as_cam(attention(gain=1.0))
    plain = read_fp32_graph(data)
    peaks = largest_values(plain, [image], threads=1)
    assert peaks["logits"] > FP16_MAX and peaks["real"] == image.max()
    everything = run(model_bytes(emulated_fp16_graph(plain, fp16_candidates(plain))), image, CAM_OF_ATTENTION)
    assert not np.isfinite(everything["cam"]).all()  # the danger is real
    converted = convert_to_fp16(Reference(data, CAM_OF_ATTENTION, [image], 1))
    assert {"logits", "softmax"} <= set(converted.too_large)
    assert converted.too_large["logits"] == pytest.approx(peaks["logits"])
    report = measure_parity(
        [Compared(run(data, image, CAM_OF_ATTENTION), run(converted.emulated, image, CAM_OF_ATTENTION))], "fp16"
    )
    assert report.problems() == []
    assert converted.search.share <= 0.5


def test_sensitive_nodes_are_found_without_overflow(image: np.ndarray) -> None:
    data = as_cam(attention(gain=0.07))
    assert largest_values(read_fp32_graph(data), [image], threads=1)["logits"] < FP16_MAX / 8
    converted = convert_to_fp16(Reference(data, CAM_OF_ATTENTION, [image], 1))
    assert not converted.too_large and len(converted.search.trials) > 1
    # Logits in the thousands move by more than one when what they are made of is rounded, and Softmax is
    # exponential; what comes after it may be rounded.
    everything, kept = converted.search.trials[0], set(converted.search.kept)
    assert everything.share > 0.5
    assert kept and kept <= {"features", "queries", "keys", "logits", "softmax"}
    assert converted.search.share <= 0.5
    assert "Softmax" in {node.op_type for node in onnx.load_from_string(converted.data).graph.node}


def test_subgraphs_read_what_is_around_them_in_fp32(image: np.ndarray) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["y", "y"], [name])], name, [], [value])

    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["y"], "conv", kernel_shape=[1, 1]),
        helper.make_node(
            "If", ["yes"], ["z"], "if", then_branch=branch("sum", "Add"), else_branch=branch("none", "Sub")
        ),
        helper.make_node("Identity", ["z"], ["maps"], "maps"),
    ]
    weight = np.random.default_rng(4).standard_normal((CHANNELS, 3, 1, 1)).astype(np.float16)
    data = graph_of(nodes, {"weight": weight / 255, "yes": np.array(True)})
    plain = read_fp32_graph(data)
    candidates = fp16_candidates(plain)
    # The branches read values computed from the image, so what follows depends on the image, too.
    assert "if" not in candidates and {"conv", "maps"} <= set(candidates)
    got = run(model_bytes(fp16_graph(plain, candidates)), image)["maps"]
    np.testing.assert_allclose(got, run(data, image)["maps"], atol=0.01)


def test_the_packaged_segmenter_answers_alike_in_fp16() -> None:
    image = read_image(IMAGES / "chelsea.jpg").rgb[::2, ::2]
    data = Path(default_bundle_path(), "segmenter.onnx").read_bytes()
    plain = read_fp32_graph(data)
    candidates = fp16_candidates(plain)
    assert {n.op_type for n in plain.model.graph.node if n.name in candidates} >= {"Conv", "Resize", "Softmax"}
    expected = run(data, image, SEGMENTER)
    add_labels(image, expected)
    for made in (fp16_graph(plain, candidates), emulated_fp16_graph(plain, candidates)):
        got = run(model_bytes(made), image, SEGMENTER)
        np.testing.assert_allclose(got["probabilities"].sum(1), 1, atol=1e-3)
        add_labels(image, got)
        assert measure_parity([Compared(expected, got)], "fp16").problems() == []
