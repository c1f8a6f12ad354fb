"""Costs by hand: convolutions, attention, the head as trained and folded."""

import pytest
from torch import nn

from multisa.export.cost import Cost, cost_of, costs_of_parts
from multisa.training.backbones import Backbone
from multisa.training.config import load_config
from multisa.training.fold import FoldedMultiSACAM
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, SelfAttention


def test_a_convolution_and_a_relu() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.ReLU())
    outputs = 8 * 8 * 5
    assert cost_of(layer, (16, 10)) == Cost(outputs * 3 * 9, 2 * outputs * 4)  # in place writes nothing new


def test_attention_is_counted_without_its_matrix() -> None:
    tokens, c = 16 * 10, 3
    cost = cost_of(SelfAttention(c), (16, 10))
    assert cost.multiply_adds == 3 * tokens * c * c + 2 * tokens * tokens * c
    assert cost.activation_bytes < 10 * tokens * c * 4


@pytest.mark.slow
def test_head_as_trained_and_folded() -> None:
    network = MultiSACAM(Backbone("test_efficientnet", weights="none"), taps=(2, 3, 4), n_classes=3).eval()
    parts = costs_of_parts(network, FoldedMultiSACAM(network), (96, 64))
    channels = [network.backbone.channels[tap] for tap in network.taps]
    tokens = [12 * 8, 6 * 4, 6 * 4]
    stacked, fine = sum(channels), tokens[0]
    attention = sum(3 * t * c * c + 2 * t * t * c for t, c in zip(tokens, channels, strict=True))
    assert parts["head"].multiply_adds == attention + fine * stacked * stacked + fine * stacked * 3
    folded = sum(t * c * c + t * c * 2 * 3 + t * t * (c + 3) for t, c in zip(tokens, channels, strict=True))
    assert parts["folded head"].multiply_adds == folded
    assert parts["folded head"].activation_bytes < parts["head"].activation_bytes / 2
    assert cost_of(network, (96, 64)).multiply_adds == sum(parts[p].multiply_adds for p in ("backbone", "head"))


@pytest.mark.slow
def test_folding_saves_what_it_is_for() -> None:
    network = create_model(load_config("paper-resnet50", ["cam.weights=none"]).cam, 21).eval()
    parts = costs_of_parts(network, FoldedMultiSACAM(network), (512, 512))
    backbone, head, folded = (parts[p].multiply_adds for p in ("backbone", "head", "folded head"))
    assert head > backbone > folded
    assert backbone + folded < 0.6 * (backbone + head)
