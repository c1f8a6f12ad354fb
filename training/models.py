"""The three networks from their configurations: Multi-SA CAM, AffinityNet and DeepLabV3+."""

from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from torch import nn

from multisa.runtime.errors import UsageError
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone, layout_of
from multisa.training.config import AffinityConfig, CamConfig, SegmenterConfig
from multisa.training.loop import load_checkpoint
from multisa.training.multi_sa import MultiSACAM
from multisa.training.segmenter import DeepLabV3Plus

ModelConfig = CamConfig | AffinityConfig | SegmenterConfig


@overload
def create_model(config: CamConfig, n_classes: int, *, checkpoint: Path | None = None) -> MultiSACAM: ...


@overload
def create_model(
    config: AffinityConfig, n_classes: int | None = None, *, checkpoint: Path | None = None
) -> AffinityNet: ...


@overload
def create_model(config: SegmenterConfig, n_classes: int, *, checkpoint: Path | None = None) -> DeepLabV3Plus: ...


def create_model(config: ModelConfig, n_classes: int | None = None, *, checkpoint: Path | None = None) -> nn.Module:
    """Build the network that `config` describes, on torch's default device, in channels-last layout.

    The type of the configuration chooses the network. All take float32 [N, 3, H, W], normalised by
    `network.backbone.normalise(image)` from uint8 [N, H, W, 3] RGB:

    - `CamConfig` -> MultiSACAM: class activations float32 [N, n_classes - 1, h, w], unbounded.
    - `AffinityConfig` -> AffinityNet, called with a radius: affinities float32 [N, P, h, w] in [0, 1].
    - `SegmenterConfig` -> DeepLabV3Plus: logits float32 [N, n_classes, ceil(H/4), ceil(W/4)].

    n_classes counts the background; AffinityNet does not need it. Without `checkpoint` the network is
    untrained (its backbone has the weights that `config.weights` names) and in training mode. With one it
    holds the trained weights and is in evaluation mode.

    Raises UsageError for a missing class count, or a backbone, weights, taps or head that do not exist or do
    not fit together; CheckpointError for a checkpoint that is missing, damaged, or of another network.
    """
    backbone = Backbone(config.backbone, weights="none" if checkpoint else config.weights)
    network: nn.Module
    if isinstance(config, AffinityConfig):
        network = AffinityNet(backbone, head=config.head)
    elif n_classes is None or n_classes < 2:
        raise UsageError(f"n_classes: got {n_classes}, expected at least 2, the background counted")
    elif isinstance(config, CamConfig):
        network = MultiSACAM(backbone, taps=with_taps(config).taps or (), n_classes=n_classes - 1)
    else:
        network = DeepLabV3Plus(
            backbone,
            n_classes=n_classes,
            channels=config.decoder_channels,
            atrous_rates=config.atrous_rates,
            dropout=config.dropout,
        )
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if checkpoint is None:
        return network
    load_checkpoint(checkpoint, network)
    return network.eval()


def with_taps(cam: CamConfig) -> CamConfig:
    """The configuration with its taps, those that suit the backbone unless others are given."""
    return cam if cam.taps is not None else replace(cam, taps=layout_of(cam.backbone).taps)
