"""Rebuild a bundle's PyTorch networks, with the layers they were trained with. Needs onnx.

    network = segmenter_from_bundle(load_bundle(path))
    probabilities = SegmentImages(network)(images)

The graphs of a bundle are folded: batch norms are part of the convolutions before them, and the Multi-SA head
is multiplied out. The rebuilt networks have all trained layers again, cost as much to run, and compute the
same outputs: a folded convolution keeps its weights, and its batch norm only adds the bias.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BundleError
from multisa.runtime.records import record_from_dict
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone
from multisa.training.config import TrainConfig
from multisa.training.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.training.layer_match import PREFIX, StoredGraph, layers_run, read_graph, state_of_graph
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.segmenter import DeepLabV3Plus, SegmentImages

Network = TypeVar("Network", MultiSACAM, AffinityNet, DeepLabV3Plus)

# Largest part of value, relative to its norm, that no W_3 may give. Networks that were folded have an exact
# W_3; where there are more classes than channels, rounding to float16 leaves some 5e-4.
MAX_RESIDUAL = 0.01


def config_from_bundle(bundle: Bundle) -> TrainConfig:
    """Read the configuration that the bundle's networks were trained with, from its provenance.

    Raises BundleError if it is missing, of another version, or has other scales than the graphs.
    """
    place = "provenance.config"
    value = bundle.manifest.provenance.get("config")
    if value is None:
        raise BundleError(
            f"{bundle.path}: no {place} in the manifest, expected the training configuration: it is needed "
            "to rebuild the PyTorch networks; export the bundle again, `multisa export` writes it"
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

    Raises BundleError if the graph does not belong to the configuration, UsageError for a backbone that timm
    does not have. So do `affinity_from_bundle` and `cam_from_bundle`.
    """
    config = replace(config_from_bundle(bundle).segmenter, weights="none")
    n_classes = len(bundle.manifest.classes)
    stored = read_graph(bundle, SEGMENTER)
    if len(config.atrous_rates) > len(stored.layers):  # do not build a network that the file cannot hold
        raise stored.error(f"{len(stored.layers)} layers, expected those for {len(config.atrous_rates)} rates")

    state = _matched(stored, lambda: SegmentImages(create_model(config, n_classes)))
    return _loaded(create_model(config, n_classes), state, stored)


def affinity_from_bundle(bundle: Bundle) -> AffinityNet:
    """Rebuild AffinityNet from affinity.onnx, in evaluation mode: called with normalized images."""
    config = replace(config_from_bundle(bundle).affinity, weights="none")
    radius = bundle.manifest.parameters.label.walk_radius
    stored = read_graph(bundle, AFFINITY)
    state = _matched(stored, lambda: AffinityFromImages(create_model(config), radius))
    return _loaded(create_model(config), state, stored)


def cam_from_bundle(bundle: Bundle) -> MultiSACAM:
    """Rebuild Multi-SA from cam.onnx, not folded, in evaluation mode: for `MultiScaleCAM`.

    It has the layers of the trained network, with other weights that have the same products.
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
        head = head_from_folded(state, len(network.taps))
    except ValueError as error:
        raise stored.error(str(error)) from error
    return _loaded(network, {**backbone, **head, "level_gain": network.level_gain}, stored)


def _matched(stored: StoredGraph, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """State of the network inside the module that `build` makes, read from the graph exported from it."""
    # On the meta device: nothing is computed or allocated before the graph is known to hold every weight.
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
    unread = {key: value for key, value in network.state_dict().items() if key.startswith("backbone.pyramid.")}
    network.load_state_dict({**unread, **state}, strict=True)
    assert isinstance(network.backbone, Backbone)
    for key in ("mean", "std"):
        # The graph may lack one of the two: the exporter stores equal values once.
        name = f"{PREFIX}backbone.{key}"
        expected: Tensor = getattr(network.backbone, key)
        if name in stored.tensors:
            got = torch.from_numpy(stored.values(name, tuple(expected.shape)))
            if not torch.equal(got, expected):
                raise stored.error(
                    f"{name}: got {got.flatten().tolist()}, the backbone has {expected.flatten().tolist()}"
                )
    return network.eval()


def head_from_folded(folded: Mapping[str, Tensor], n_levels: int) -> dict[str, Tensor]:
    """Rebuild the state of `MultiSACAM`'s head from that of `FoldedMultiSACAM`; the inverse of fold.py.

    Folding multiplies matrices, so the trained factors are lost. Any factors with the same products compute
    the same function at the same cost:

        query = M^T g^2,  M = W_1^T W_2       W_1 = query, W_2 = 1, g = 1
        direct = P g                          fusion 1, the classifier's columns of a level = direct
        value = beta P W_3 g                  beta = 1, W_3 = the least-squares solution of direct W_3 = value

    folded: float32 levels.I.{query,direct,value}.weight [c or C, c, 1, 1] of the `n_levels` taps, or
    classifier.weight without taps. Raises ValueError, naming the level, where value has no such factor.
    """
    if not n_levels:
        return {"classifier.weight": folded["classifier.weight"]}
    state: dict[str, Tensor] = {}
    projections = []
    for level in range(n_levels):
        query, direct, value = (
            folded[f"levels.{level}.{name}.weight"].double()[:, :, 0, 0] for name in ("query", "direct", "value")
        )
        state |= {
            f"attention.{level}.query.weight": _weight(query),
            f"attention.{level}.key.weight": _weight(torch.eye(len(query), dtype=torch.float64)),
            f"attention.{level}.value.weight": _weight(_factor(direct, value, level)),
            f"attention.{level}.beta": torch.ones(()),
        }
        projections.append(direct)
    classifier = torch.cat(projections, 1)
    state["fuse.weight"] = _weight(torch.eye(classifier.shape[1], dtype=torch.float64))
    state["classifier.weight"] = _weight(classifier)
    return state


def _factor(direct: Tensor, value: Tensor, level: int) -> Tensor:
    """Solve direct W = value, float64 [C, c] both, for W [c, c], the smallest where there are many."""
    factor = torch.linalg.lstsq(direct, value, driver="gelsd").solution
    residual = float(torch.linalg.norm(direct @ factor - value))
    size = float(torch.linalg.norm(value))
    if not residual <= MAX_RESIDUAL * size:
        raise ValueError(
            f"levels.{level}: no projection maps direct to value: got a residual of {residual:.3g} for "
            f"a norm of {size:.3g}, expected at most {MAX_RESIDUAL:g} of it"
        )
    return torch.as_tensor(factor)


def _weight(matrix: Tensor) -> Tensor:
    return matrix.float()[:, :, None, None]
