"""A graph or configuration of another network gives no network but an error that says what differs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from made_bundles import bundle_of
from onnx import numpy_helper

from multisa.runtime.backends.base import SEGMENTER, graph_file
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.errors import BundleError, UsageError
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.from_bundle import (
    affinity_from_bundle,
    cam_from_bundle,
    config_from_bundle,
    segmenter_from_bundle,
)

Graph = onnx.GraphProto
CLASSIFIER, MIX = "network.classifier.weight", "network.decode.1.3.weight.half"


@pytest.fixture(scope="module")
def packaged() -> Bundle:
    return load_bundle(default_bundle_path())


def tensor_of(graph: Graph, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def store(graph: Graph, name: str, values: np.ndarray) -> None:
    tensor_of(graph, name).CopyFrom(numpy_helper.from_array(values, name))


def without_a_convolution(graph: Graph) -> None:
    node = [node for node in graph.node if node.op_type == "Conv"][5]
    node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))


def without_a_weight(graph: Graph) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info(CLASSIFIER, onnx.TensorProto.FLOAT, [7, 128, 1, 1]))
    graph.initializer.remove(tensor_of(graph, CLASSIFIER))


def with_another_weight(graph: Graph) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "network.extra.weight"))


def with_another_convolution(graph: Graph) -> None:
    last = [node for node in graph.node if node.op_type == "Conv"][-1]
    graph.node.append(onnx.helper.make_node("Conv", list(last.input), ["again"]))


def of_another_shape(graph: Graph) -> None:
    store(graph, CLASSIFIER, np.zeros((8, 128, 1, 1), np.float32))


def of_another_type(graph: Graph) -> None:
    store(graph, CLASSIFIER, np.zeros((7, 128, 1, 1), np.float64))


def too_short(graph: Graph) -> None:
    tensor_of(graph, MIX).raw_data = tensor_of(graph, MIX).raw_data[:-2]


def not_finite(graph: Graph) -> None:
    store(graph, CLASSIFIER, np.full((7, 128, 1, 1), np.nan, np.float32))


def exchanged(graph: Graph) -> None:
    names = ("network.pyramid.2.0.weight", "network.pyramid.3.0.weight")
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in names:
            node.input[1] = names[1 - names.index(node.input[1])]


def with_another_dilation(graph: Graph) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "dilations" and attribute.ints[0] > 1:
                attribute.ints[:] = [5, 5]


def with_another_mean(graph: Graph) -> None:
    store(graph, "network.backbone.mean", np.full((1, 3, 1, 1), 100, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_convolution, "got shape .* expected"),
        (without_a_weight, f"{CLASSIFIER} is not stored"),
        (with_another_weight, "weights that the network does not have: network.extra.weight"),
        (with_another_convolution, "1 layers the network does not have, starting with again"),
        (of_another_shape, f"{CLASSIFIER}: got shape .8, 128, 1, 1., expected .7, 128, 1, 1."),
        (of_another_type, f"{CLASSIFIER}: got ONNX data type 11, expected float32 or float16"),
        (too_short, f"not an ONNX graph|{MIX}: got 32766 bytes, expected 32768"),
        (not_finite, f"{CLASSIFIER}: got numbers that are not finite"),
        (exchanged, "network.pyramid.*found in place of network.pyramid"),
        (with_another_dilation, "dilations: got .5, 5., expected .* for network.pyramid.1.0"),
        (with_another_mean, "backbone.mean: got .100.0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_of_another_network_is_refused(
    packaged: Bundle, tmp_path: Path, change: Callable[[Graph], None], message: str
) -> None:
    name = graph_file(SEGMENTER)
    model = onnx.load_from_string(packaged.read_file(name))
    change(model.graph)
    files = {name: model.SerializeToString()}
    bundle = bundle_of(packaged, tmp_path, config_from_bundle(packaged), files)
    with pytest.raises(BundleError, match=message):
        segmenter_from_bundle(bundle)


def test_what_is_no_graph_is_refused(packaged: Bundle, tmp_path: Path) -> None:
    bundle = bundle_of(packaged, tmp_path, TrainConfig(), {graph_file(SEGMENTER): b"\x08\x08no"})
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        segmenter_from_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"decoder_channels": 64}, BundleError, "got shape .128, 320, 1, 1., expected .64, 320, 1, 1."),
        ({"decoder_channels": 2**62}, BundleError, "configuration makes no network"),
        ({"atrous_rates": [2**70]}, BundleError, "configuration makes no network"),
        ({"atrous_rates": [1] * 5000}, BundleError, "5000 rates"),
        ({"atrous_rates": [6, 12]}, BundleError, "cannot be rebuilt"),
        ({"backbone": "resnet18"}, BundleError, "cannot be rebuilt"),
        ({"backbone": "resnet18000"}, UsageError, "not a timm model"),
        ({"backbone": 3}, BundleError, "provenance.config.segmenter.backbone: got int 3"),
        ({"width": 3}, BundleError, "unknown key 'width'"),
    ],
)
def test_another_configuration_is_refused(
    packaged: Bundle, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config: dict[str, Any] = record_to_dict(config_from_bundle(packaged))
    config["segmenter"].update({"start_from_cam": False, **changes})
    manifest = replace(packaged.manifest, provenance={"config": config})
    with pytest.raises(error, match=message):
        segmenter_from_bundle(replace(packaged, manifest=manifest))


def test_a_bundle_without_its_training_is_refused(packaged: Bundle) -> None:
    bundle = replace(packaged, manifest=replace(packaged.manifest, provenance={}))
    for rebuild in (segmenter_from_bundle, affinity_from_bundle, cam_from_bundle):
        with pytest.raises(BundleError, match=r"no provenance\.config in the manifest"):
            rebuild(bundle)
    parameters = replace(packaged.manifest.parameters, cam_scales=(2.0,))
    with pytest.raises(BundleError, match=r"cam\.scales"):
        cam_from_bundle(replace(packaged, manifest=replace(packaged.manifest, parameters=parameters)))
