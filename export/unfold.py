"""PyTorch networks out of a bundle, with the layers they were trained with: what eager PyTorch would run.

    network = segmenter_from_bundle(load_bundle(path))
    labels, confidence = SegmentImages(network)(photographs)

A bundle's graphs are folded: batch norms are gone into the convolutions before them, the head of Multi-SA is
multiplied out. The networks rebuilt here have every layer again, at the cost of the ones that were trained,
and compute what the graphs compute: a folded convolution keeps its weights, and its batch norm becomes one
that adds the bias and nothing else. Which layer of the graph belongs to which module is found by running the
network on PyTorch's meta device, without data: the graph has its layers in the order they run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from multisa.export.fold import FoldedMultiSACAM
from multisa.export.graphs import AffinityPhotographs
from multisa.export.layer_match import layers_run, state_of_graph
from multisa.export.stored_layers import PREFIX, StoredGraph, read_graph
from multisa.export.unfold_head import unfolded_head
from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.contract import AFFINITY, CAM, SEGMENTER
from multisa.runtime.errors import BundleError
from multisa.runtime.records import record_from_dict
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone
from multisa.training.config import TrainConfig
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.segmenter import DeepLabV3Plus, SegmentImages

Network = TypeVar("Network", MultiSACAM, AffinityNet, DeepLabV3Plus)


def config_from_bundle(bundle: Bundle) -> TrainConfig:
    """Read the configuration that the bundle's networks were trained with, from its provenance.

    Raises BundleError where it is not there, is not of this version, or says other scales than the graphs.
    """
    place = "provenance.config"
    value = bundle.manifest.provenance.get("config")
    if value is None:
        raise BundleError(
            f"{bundle.path}: no {place} in the manifest, expected the configuration of the training: without "
            "it no PyTorch network can be rebuilt; export the bundle again, `multisa export` writes it"
        )
    try:
        config = record_from_dict(TrainConfig, value, where=place)
    except ValueError as error:
        raise BundleError(f"{bundle.path}: {error}; export it with this version of multisa") from error
    scales = bundle.manifest.parameters.cam_scales
    if config.cam.scales != scales:
        raise BundleError(
            f"{bundle.path}: {place}.cam.scales: got {list(config.cam.scales)}, expected those of "
            f"parameters.cam_scales, {list(scales)}: get the bundle again"
        )
    return config


def segmenter_from_bundle(bundle: Bundle) -> DeepLabV3Plus:
    """Rebuild DeepLabV3+ from segmenter.onnx, in evaluation mode: for `SegmentImages`.

    Raises BundleError where graph and configuration are not of one network, UsageError for a backbone that
    timm does not have; so do the other two.
    """
    config = replace(config_from_bundle(bundle).segmenter, weights="none")
    n_classes = len(bundle.manifest.classes)
    stored = read_graph(bundle, SEGMENTER)
    if len(config.atrous_rates) > len(stored.layers):  # not to build what the file cannot hold
        raise stored.error(
            f"{len(stored.layers)} layers, expected those for {len(config.atrous_rates)} rates"
        )

    def made() -> DeepLabV3Plus:
        return create_model(config, n_classes)

    state = _matched(stored, lambda: SegmentImages(made()))
    return _loaded(made(), state, stored)


def affinity_from_bundle(bundle: Bundle) -> AffinityNet:
    """Rebuild AffinityNet from affinity.onnx, in evaluation mode: called with normalised images."""
    config = replace(config_from_bundle(bundle).affinity, weights="none")
    radius = bundle.manifest.parameters.label.walk_radius
    stored = read_graph(bundle, AFFINITY)
    state = _matched(stored, lambda: AffinityPhotographs(create_model(config), radius))
    return _loaded(create_model(config), state, stored)


def cam_from_bundle(bundle: Bundle) -> MultiSACAM:
    """Rebuild Multi-SA from cam.onnx, not folded, in evaluation mode: for `MultiScaleCAM`.

    Its layers are those of the trained network, their weights others with the same products.
    """
    config = replace(config_from_bundle(bundle).cam, weights="none")
    n_classes = len(bundle.manifest.classes)
    stored = read_graph(bundle, CAM)

    def folded() -> MultiScaleCAM:
        network = create_model(config, n_classes)
        network.level_gain = torch.ones(len(network.level_gain), device="cpu")  # folding reads its numbers
        return MultiScaleCAM(FoldedMultiSACAM(network), scales=config.scales)

    state = _matched(stored, folded)
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    network = create_model(config, n_classes)
    try:
        head = unfolded_head(state, len(config.taps))
    except ValueError as error:
        raise stored.error(str(error)) from error
    return _loaded(network, {**backbone, **head, "level_gain": network.level_gain}, stored)


def _matched(stored: StoredGraph, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """State of the network inside the module that `build` makes, from the graph that was exported of it."""
    # Nothing is computed and no weight has memory until the graph is known to hold all of them.
    try:
        with torch.device("meta"):
            module = build().eval()
        run = layers_run(module, stored)
    except (RuntimeError, TypeError) as error:  # sizes that no tensor can have
        reason = str(error).splitlines()[0]
        raise stored.error(f"the manifest's configuration makes no network ({reason})") from error
    state = state_of_graph(module, run, stored)
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def _loaded(network: Network, state: dict[str, Tensor], stored: StoredGraph) -> Network:
    network.load_state_dict(state, strict=True)
    assert isinstance(network.backbone, Backbone)
    for key in ("mean", "std"):
        # One of the two where all their numbers are equal: the exporter stores equal values once.
        name = f"{PREFIX}backbone.{key}"
        expected: Tensor = getattr(network.backbone, key)
        if name in stored.tensors:
            got = torch.from_numpy(stored.values(name, tuple(expected.shape)))
            if not torch.equal(got, expected):
                raise stored.error(
                    f"{name}: got {got.flatten().tolist()}, the backbone has {expected.flatten().tolist()}"
                )
    return network.eval()
