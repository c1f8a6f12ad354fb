"""Backbones and the three networks: sizes, equations, gradients, agreement with the NumPy kernels."""

import numpy as np
import pytest
import torch

from multisa.kernels import affinity_from_boundary, affinity_from_features
from multisa.runtime.errors import UsageError
from multisa.training import affinity_net
from multisa.training.affinity_net import AffinityNet, pair_targets
from multisa.training.backbones import Backbone
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM, SelfAttention
from multisa.training.segmenter import DeepLabV3Plus, SegmentImages, multi_scale_probabilities
from multisa.training.weights import PACKAGED_WEIGHTS, import_timm

BACKBONES = ("test_efficientnet", "test_resnet", "tf_efficientnet_lite0")
ODD_SIZES = ((64, 64), (65, 97), (79, 64))


def tiny_backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("test_efficientnet", weights="none").eval()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_every_level_is_the_ceiling_of_its_stride(name: str, size: tuple[int, int]) -> None:
    backbone = Backbone(name, weights="none").eval()
    levels = backbone(torch.zeros(1, 3, *size))
    assert backbone.strides == [2, 4, 8, 16, 16]
    expected = [tuple(-(-side // stride) for side in size) for stride in backbone.strides]
    assert [tuple(level.shape[-2:]) for level in levels] == expected
    assert [level.shape[1] for level in levels] == backbone.channels


@pytest.mark.parametrize("name", ("resnet50", "resnet101", "resnest101e"))
def test_the_papers_backbones_build_at_stride_16_without_dilation(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, weights="none")
    assert backbone.strides == [4, 4, 8, 16, 16] or backbone.strides == [2, 4, 8, 16, 16]
    assert all(m.dilation == (1, 1) for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))


def test_same_padding_equals_tensorflows_on_even_sizes() -> None:
    timm = import_timm()
    torch.manual_seed(0)
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    fixed = Backbone("tf_efficientnet_lite0", weights="none", output_stride=32).eval()
    fixed.network.load_state_dict(reference.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        pairs = zip(reference(image), fixed(image), strict=True)
        for expected, got in pairs:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "no_such_net", "weights": "none"}, "not a timm model"),
        ({"name": "resnet18", "weights": "packaged"}, "no packaged weights"),
        ({"name": "resnet18", "weights": "magic"}, "expected 'packaged'"),
    ],
)
def test_backbone_errors_say_what_to_do(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Backbone(arguments["name"], weights=arguments["weights"])


@pytest.mark.parametrize("name", PACKAGED_WEIGHTS)
def test_packaged_weights_are_the_packages(name: str) -> None:
    pytest.importorskip(PACKAGED_WEIGHTS[name][0])
    loaded = Backbone(name, weights="packaged").state_dict()
    random = Backbone(name, weights="none").state_dict()
    assert loaded.keys() == random.keys()
    # Trained running variances are not the ones they start with.
    assert not torch.equal(loaded["network.bn1.running_var"], torch.ones_like(loaded["network.bn1.running_var"]))


def test_attention_is_equations_1_to_5() -> None:
    torch.manual_seed(1)
    layer = SelfAttention(6).double()
    assert layer.beta.item() == 0.0
    layer.beta.data.fill_(-0.7)
    torch.nn.init.normal_(layer.query.weight)
    features = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    w1, w2, w3 = (m.weight[:, :, 0, 0] for m in (layer.query, layer.key, layer.value))
    flat = features.flatten(2)
    similarity = (w1 @ flat).transpose(1, 2) @ (w2 @ flat)
    attention = similarity.softmax(-1)
    output = (attention @ (w3 @ flat).transpose(1, 2)).transpose(1, 2)
    expected = (-0.7 * output + flat).reshape(features.shape)
    torch.testing.assert_close(layer(features), expected)
    assert (expected - features).abs().max() > 0.1


@pytest.mark.parametrize("taps", [(), (4,), (3, 4), (2, 3, 4), (1, 4)])
def test_multi_sa_with_any_taps(taps: tuple[int, ...]) -> None:
    backbone = tiny_backbone()
    network = MultiSACAM(backbone, taps=taps, n_classes=3)
    activations = network(torch.randn(2, 3, 65, 70))
    finest = backbone.strides[taps[0]] if taps else backbone.strides[-1]
    assert activations.shape == (2, 3, -(-65 // finest), -(-70 // finest))
    activations.mean().backward()
    assert len(network.betas()) == len(taps)
    assert network.classifier.weight.grad is not None
    assert network.fuse is None or network.fuse.weight.grad is not None


def test_level_gains_make_levels_weigh_alike() -> None:
    backbone = tiny_backbone()
    with torch.no_grad():
        for module in backbone.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(3.0)
    network = MultiSACAM(backbone, taps=(2, 3, 4), n_classes=3).eval()
    image = torch.randn(2, 3, 64, 64)
    network.fit_level_gain(image)
    for level, gain in zip(backbone(image), network.level_gain, strict=True):
        assert (level * gain).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert "level_gain" in network.state_dict()  # a checkpoint carries it


def test_every_parameter_of_multi_sa_has_one_rate() -> None:
    network = MultiSACAM(tiny_backbone(), taps=(2, 3, 4), n_classes=3)
    parts = [network.new_parameters(), network.beta_parameters(), list(network.backbone.parameters())]
    assert [len(part) for part in parts[:2]] == [3 * 3 + 2, 3]
    identities = [id(parameter) for part in parts for parameter in part]
    assert sorted(identities) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize("size", ODD_SIZES)
def test_multi_scale_cam_is_normalised_and_mirrors(size: tuple[int, int]) -> None:
    network = MultiSACAM(tiny_backbone(), taps=(2, 3, 4), n_classes=3).eval()
    torch.nn.init.normal_(network.classifier.weight)
    inference = MultiScaleCAM(network, scales=(0.75, 1.0, 1.5))
    image = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        cam, scores = inference(image)
        mirrored, mirrored_scores = inference(image.flip(2))
    assert cam.shape == (2, 3, -(-size[0] // 4), -(-size[1] // 4))
    assert scores.shape == (2, 3)
    assert cam.min() >= 0 and cam.amax((-2, -1)).max() <= 1
    torch.testing.assert_close(mirrored_scores, scores, atol=1e-5, rtol=1e-4)
    if size[1] % 16 == 0:
        # The right edge of an odd width falls between cells; a multiple of the stride mirrors exactly.
        torch.testing.assert_close(mirrored.flip(-1), cam, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("radius", (2, 3, 5))
def test_affinities_equal_the_numpy_kernels(radius: int) -> None:
    random = np.random.default_rng(3)
    boundary = random.random((2, 9, 11)).astype(np.float32)
    features = random.random((2, 4, 9, 11)).astype(np.float32)
    from_boundary = affinity_net.affinity_from_boundary(torch.from_numpy(boundary), radius).numpy()
    from_features = affinity_net.affinity_from_features(torch.from_numpy(features), radius).numpy()
    np.testing.assert_allclose(from_boundary, affinity_from_boundary(boundary, radius=radius), atol=1e-6)
    np.testing.assert_allclose(from_features, affinity_from_features(features, radius=radius), atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (3, 20), (20, 3), (1, 1)])
def test_a_radius_beyond_the_grid_leaves_empty_planes(size: tuple[int, int]) -> None:
    features = np.random.default_rng(4).random((1, 4, *size)).astype(np.float32)
    got = affinity_net.affinity_from_features(torch.from_numpy(features), 10).numpy()
    np.testing.assert_allclose(got, affinity_from_features(features, radius=10), atol=1e-6)
    assert (got.max((0, 2, 3)) == 0).any()


@pytest.mark.parametrize(("head", "stride"), [("boundary", 4), ("features", 8)])
def test_affinity_net_heads_give_the_same_kind_of_tensor(head: str, stride: int) -> None:
    network = AffinityNet(tiny_backbone(), head=head)
    affinity = network(torch.randn(1, 3, 66, 81), 5)
    assert network.head.stride == stride
    assert affinity.shape == (1, 34, -(-66 // stride), -(-81 // stride))
    assert affinity.min() >= 0 and affinity.max() <= 1
    affinity.mean().backward()
    trained = [p for p in network.backbone.parameters() if p.grad is not None]
    assert bool(trained) == (head == "features")


def test_pair_targets_against_loops() -> None:
    labels = torch.tensor([[[0, 1, 255], [1, 1, 0]]], dtype=torch.uint8)
    same, background = pair_targets(labels, 2)
    # Offsets of radius 2: (0, 1), (1, -1), (1, 0), (1, 1).
    assert same[0, 0].tolist() == [[0, -1, -1], [1, 0, -1]]
    assert same[0, 2].tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert same[0, 1].tolist() == [[-1, 1, -1], [-1, -1, -1]]
    assert background[0, 0].tolist() == [[True, False, False], [False, False, True]]


def test_segmenter_gives_probabilities_at_stride_4() -> None:
    torch.manual_seed(2)
    network = DeepLabV3Plus(tiny_backbone(), n_classes=4, channels=8, atrous_rates=(2, 4), dropout=0.1).eval()
    image = torch.randint(0, 256, (2, 65, 70, 3), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities = SegmentImages(network)(image)
        logits = network(network.backbone.normalise(image))
        once = multi_scale_probabilities(network, image, (1.0,), mirror=False)
        mirrored = multi_scale_probabilities(network, image.flip(2), (0.75, 1.0), mirror=True)
        straight = multi_scale_probabilities(network, image, (0.75, 1.0), mirror=True)
    assert probabilities.shape == (2, 4, 17, 18) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(once, probabilities)
    torch.testing.assert_close(straight.sum(1), torch.ones(2, 17, 18))
    # Without the mirror images the two would differ: the strides start at the left edge.
    torch.testing.assert_close(mirrored.flip(-1), straight, rtol=1e-3, atol=1e-4)
