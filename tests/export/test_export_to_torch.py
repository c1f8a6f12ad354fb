"""Networks out of a bundle compute what its graphs compute, with the layers they were trained with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_bundles import bundle_of
from torch import nn

from multisa.export.cost import cost_of
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.demo import IMAGES
from multisa.runtime.errors import BundleError
from multisa.runtime.imaging.decode import read_image, resize_image, working_size
from multisa.training.backbones import Backbone
from multisa.training.config import CamConfig, SegmenterConfig, TrainConfig
from multisa.training.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.training.from_bundle import (
    affinity_from_bundle,
    cam_from_bundle,
    config_from_bundle,
    head_from_folded,
    segmenter_from_bundle,
)
from multisa.training.inference import as_batch
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.segmenter import SegmentImages

pytestmark = pytest.mark.slow

LONG_SIDE = 160  # of the images here; the networks take every size
# Largest differences of float32 in another order of additions.
TOLERANCE = {"probabilities": 5e-5, "affinity": 2e-5, "cam": 1e-4, "scores": 1e-5}


@pytest.fixture(scope="module")
def packaged() -> Bundle:
    return load_bundle(default_bundle_path())


def module_of(bundle: Bundle, contract: GraphContract) -> nn.Module:
    """The rebuilt network with the interface of the graph."""
    parameters = bundle.manifest.parameters
    if contract is SEGMENTER:
        return SegmentImages(segmenter_from_bundle(bundle))
    if contract is AFFINITY:
        return AffinityFromImages(affinity_from_bundle(bundle), parameters.label.walk_radius)
    return MultiScaleCAM(cam_from_bundle(bundle), scales=parameters.cam_scales)


def assert_same_answers(bundle: Bundle, contract: GraphContract, images: list[np.ndarray]) -> None:
    module = module_of(bundle, contract)
    with OnnxRuntimeBackend(bundle.read_file(graph_file(contract))) as backend:
        for image in images:
            with torch.inference_mode():
                expected, got = backend.run(image[None]), module(as_batch(image))
            got = got if isinstance(got, tuple) else (got,)
            for (name, wanted), answer in zip(expected.items(), got, strict=True):
                assert wanted.shape == answer.shape
                assert np.abs(wanted - answer.numpy()).max() <= TOLERANCE[name], name


@pytest.mark.parametrize("contract", [CAM, AFFINITY, SEGMENTER], ids=graph_file)
def test_packaged_networks_answer_as_their_graphs(packaged: Bundle, contract: GraphContract) -> None:
    images = []
    for path in sorted(IMAGES.glob("*.jpg")):
        rgb = read_image(path).rgb
        images.append(resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], LONG_SIDE)))
    assert len(images) == 3
    assert_same_answers(packaged, contract, images)


def layers_of(network: nn.Module) -> list[tuple[str, type, list[tuple[str, torch.Size]]]]:
    return [
        (name, type(module), [(key, tensor.shape) for key, tensor in module.state_dict().items()])
        for name, module in network.named_modules()
    ]


def test_packaged_networks_have_the_layers_and_cost_of_trained_ones(packaged: Bundle) -> None:
    config, n_classes = config_from_bundle(packaged), len(packaged.manifest.classes)
    trained = (
        create_model(replace(config.cam, weights="none"), n_classes),
        create_model(replace(config.affinity, weights="none")),
        create_model(replace(config.segmenter, weights="none"), n_classes),
    )
    rebuilt = (cam_from_bundle(packaged), affinity_from_bundle(packaged), segmenter_from_bundle(packaged))
    for ours, original in zip(rebuilt, trained, strict=True):
        assert not any(module.training for module in ours.modules())
        assert layers_of(ours) == layers_of(original)
        convolution = ours.backbone.network.conv_stem
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        if not isinstance(ours, type(trained[1])):
            assert cost_of(ours, (96, 64)) == cost_of(original.eval(), (96, 64))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in rebuilt[2].modules()) > 50


# --- the head ---


@settings(max_examples=15, deadline=None)
@given(
    taps=st.sampled_from([(), (4,), (2, 3, 4), (0, 1, 2, 3, 4)]),
    betas=st.lists(st.sampled_from([0.0, -0.35, 0.002, 2.0]), min_size=5, max_size=5),
    n_classes=st.sampled_from([1, 3, 30]),  # more than the finest tap has channels
    seed=st.integers(0, 1000),
)
def test_folding_an_unfolded_head_gives_it_back(
    taps: tuple[int, ...], betas: list[float], n_classes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    backbone = Backbone("test_efficientnet", weights="none")
    network = MultiSACAM(backbone, taps=taps, n_classes=n_classes)
    network.level_gain.copy_(torch.rand(5) + 0.5)
    for beta, value in zip(network.beta_parameters(), betas, strict=False):
        beta.data.fill_(value)
    torch.nn.init.normal_(network.classifier.weight)
    folded = {key: value for key, value in FoldedMultiSACAM(network).state_dict().items() if "backbone" not in key}

    again = MultiSACAM(backbone, taps=taps, n_classes=n_classes)
    missing, unexpected = again.load_state_dict(head_from_folded(folded, len(taps)), strict=False)
    assert not unexpected and all("backbone" in key or key == "level_gain" for key in missing)
    refolded = FoldedMultiSACAM(again).state_dict()
    for key, value in folded.items():
        # Exact but for the value's factor, which is stored in float32.
        tolerance = 1e-5 * float(value.abs().max()) if ".value." in key else 0
        torch.testing.assert_close(refolded[key].double(), value.double(), rtol=0, atol=tolerance)


def test_a_value_that_is_no_product_is_refused() -> None:
    folded = {f"levels.0.{name}.weight": torch.randn(6, 4, 1, 1) for name in ("direct", "value")}
    folded["levels.0.query.weight"] = torch.randn(4, 4, 1, 1)
    with pytest.raises(ValueError, match=r"levels\.0: no projection"):
        head_from_folded(folded, 1)


# --- other backbones ---


def shuffled(network: nn.Module) -> nn.Module:
    """Numbers drawn, those of batch norms included, so that folding changes them.

    But for the second layer: as it was made, its biases are zero, which the exporter leaves out, or equal,
    which it stores once.
    """
    for name, values in network.state_dict().items():
        if "layer2" in name:
            continue
        if name.endswith(("running_var", "level_gain")):
            values.uniform_(0.5, 2)
        elif values.dim() < 2 and values.is_floating_point():
            values.copy_(torch.randn(values.shape) * 0.3 + (1 if name.endswith("weight") else 0))
    return network.eval()


def exported(contract: GraphContract, module: nn.Module) -> dict[str, bytes]:
    data = onnx_from_module(module.eval(), tuple(contract.outputs), {}, half_weights=True)
    return {graph_file(contract): data}


def demo_images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((96, 64), (65, 97))]


def test_split_attention_goes_round(packaged: Bundle, tmp_path: Path) -> None:
    # Convolutions with a bias before their norm, others without a norm, groups; a head without taps.
    config = CamConfig(backbone="resnest14d", weights="none", taps=(), scales=(1.0,))
    torch.manual_seed(0)
    network = shuffled(create_model(config, 4))
    module = MultiScaleCAM(FoldedMultiSACAM(network), scales=config.scales)
    bundle = bundle_of(packaged, tmp_path, TrainConfig(cam=config), exported(CAM, module), 4)
    assert_same_answers(bundle, CAM, demo_images())
    assert cost_of(cam_from_bundle(bundle), (64, 64)) == cost_of(network, (64, 64))


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "convnext_atto"])
def test_networks_with_linear_layers_come_back_or_say_why(packaged: Bundle, tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(0)
    part = SegmenterConfig(backbone=backbone, weights="none", decoder_channels=8)
    config = replace(TrainConfig(), segmenter=part)
    network = create_model(part, 3).eval()
    with torch.no_grad():  # as trained: no two layers have equal weights, which the exporter stores once
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    data = onnx_from_module(SegmentImages(network), tuple(SEGMENTER.outputs), {}, half_weights=False)
    bundle = bundle_of(packaged, tmp_path, config, {graph_file(SEGMENTER): data}, n_classes=3)
    if backbone == "convnext_atto":  # the exporter stores its layer scales under names of their own
        with pytest.raises(BundleError, match=r"no weights for network\.backbone\.\S+\.gamma"):
            segmenter_from_bundle(bundle)
        return
    rebuilt = segmenter_from_bundle(bundle)
    image = torch.randint(0, 256, (1, 65, 97, 3), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(SegmentImages(rebuilt)(image), SegmentImages(network)(image), rtol=1e-4, atol=1e-5)
