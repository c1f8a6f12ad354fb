"""Folding the Multi-SA head changes nothing but the work: random heads against the float64 network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multisa.training.backbones import Backbone
from multisa.training.fold import FoldedMultiSACAM
from multisa.training.multi_sa import MultiSACAM


def network_with(taps: tuple[int, ...], betas: tuple[float, ...], seed: int) -> MultiSACAM:
    torch.manual_seed(seed)
    network = MultiSACAM(Backbone("test_efficientnet", weights="none"), taps=taps, n_classes=3).eval()
    network.level_gain.copy_(torch.rand(len(network.level_gain)) + 0.5)
    for layer, beta in zip(network.attention, betas, strict=False):
        layer.beta.data.fill_(beta)
        torch.nn.init.normal_(layer.query.weight, std=0.5)
        torch.nn.init.normal_(layer.key.weight, std=0.5)
    torch.nn.init.normal_(network.classifier.weight)
    return network


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    taps=st.sampled_from([(), (4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)]),
    betas=st.tuples(*[st.sampled_from([0.0, -0.351, 0.142, 2.0])] * 4),
    height=st.integers(33, 80),
    width=st.integers(33, 80),
    seed=st.integers(0, 1000),
)
def test_folded_equals_unfolded(
    taps: tuple[int, ...], betas: tuple[float, ...], height: int, width: int, seed: int
) -> None:
    network = network_with(taps, betas, seed)
    folded = FoldedMultiSACAM(network).double()
    network.double()
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.inference_mode():
        expected, got = network(image), folded(image)
    # Folded weights are stored in float32, hence the tolerance.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_attention_matters_in_this_test() -> None:
    network = network_with((2, 3, 4), (2.0, 2.0, 2.0), 0)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        with_attention = network(image)
        for layer in network.attention:
            layer.beta.data.zero_()
        without = network(image)
    assert (with_attention - without).abs().max() > 0.05 * with_attention.abs().max()


@pytest.mark.parametrize("taps", [(2, 3, 4), (4,)])
def test_folded_head_is_smaller(taps: tuple[int, ...]) -> None:
    network = network_with(taps, (0.1, 0.1, 0.1), 0)
    backbone = sum(p.numel() for p in network.backbone.parameters())
    head = sum(p.numel() for p in network.parameters()) - backbone
    folded = sum(p.numel() for p in FoldedMultiSACAM(network).parameters()) - backbone
    assert folded < head / 2
