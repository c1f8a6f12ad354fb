"""Start the networks of a training from those of a bundle: `multisa train --init-from BUNDLE`.

A bundle's graphs are folded: every batch norm is part of the convolution before it, so a network rebuilt from them has
weights of other magnitudes than those that training schedules are made for. Here every batch norm gets a scale and
statistics again, and its convolution the inverse: the network computes the same, and its weights are close to those
that were trained. Classes of the same name keep their rows of the classifier.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multisa.runtime.bundle import MANIFEST_NAME, Bundle, load_bundle
from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.progress import log
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone
from multisa.training.config import AffinityConfig, CamConfig, SegmenterConfig, TrainConfig
from multisa.training.frozen_norm import PROBE_SIDE, norm_pairs
from multisa.training.models import ModelConfig, with_taps
from multisa.training.multi_sa import MultiSACAM
from multisa.training.segmenter import DeepLabV3Plus

Network = MultiSACAM | AffinityNet | DeepLabV3Plus

MIN_SCALE = 1e-3  # channels that the reference nearly switches off stay folded: dividing by their scale is inexact

# The settings that a network shares with the bundle's, so that its layers are the same.
_SHARED = {
    CamConfig: ("backbone", "taps"),
    AffinityConfig: ("backbone", "head"),
    SegmenterConfig: ("backbone", "decoder_channels", "atrous_rates"),
}


def start_files(config: TrainConfig) -> dict[str, str]:
    """Path -> SHA-256 of the bundle's manifest, which holds those of its graphs; empty without `init_from`."""
    if not config.init_from:
        return {}
    bundle = load_bundle(config.init_from)
    return {config.init_from: sha256_of_file(bundle.path / MANIFEST_NAME)}


def check_start(config: TrainConfig, class_names: Sequence[str]) -> None:
    """Check that the networks of a run can start from the bundle `init_from`; log which classes it knows.

    class_names: of the data set, the background first. Raises UsageError for networks with other layers than the
    bundle's, naming the settings to change, BundleError for a bundle that cannot be used, BackendUnavailable without
    onnx.
    """
    if not config.init_from:
        return
    bundle, stored = _opened(config.init_from)
    parts: dict[str, ModelConfig] = {"cam": config.cam, "affinity": config.affinity, "segmenter": config.segmenter}
    differing = {
        f"{name}.{key}": (got, expected)
        for name, part in parts.items()
        for key, got, expected in _differences(part, stored)
    }
    if differing:
        changes = " ".join(f"--set {key}={_toml(expected)}" for key, (_, expected) in differing.items())
        found = ", ".join(f"{key} {_toml(got)}" for key, (got, _) in differing.items())
        raise UsageError(f"{config.init_from}: has other networks than this run, which has {found}; use {changes}")
    known = set(bundle.manifest.classes)
    kept, new = ([name for name in class_names if (name in known) == kind] for kind in (True, False))
    log.info(
        f"the networks start from the bundle {bundle.manifest.name}, {config.init_from}; classes it knows: "
        f"{', '.join(kept)}" + (f"; new ones: {', '.join(new)}" if new else "")
    )
    if config.relabel.rounds and not starts_from_bundle(config, config.relabel.teacher):
        log.info("relabel.teacher: has other layers than the bundle's segmenter, starts as configured")


def starts_from_bundle(config: TrainConfig, part: ModelConfig) -> bool:
    """Whether a network of the run starts from the bundle `init_from`: if its layers are the same."""
    return bool(config.init_from) and not _differences(part, _opened(config.init_from)[1])


def start_from_bundle(
    network: Network, part: ModelConfig, config: TrainConfig, class_names: Sequence[str], images: Tensor | None
) -> bool:
    """Give `network`, new from `part`, the weights of the bundle's, if it starts from it; returns whether it does.

    The weights that the backbone came with tell the scales to unfold by. images: normalised float32 [N, 3, H, W] to
    measure activations on; None for AffinityNet, whose norms need none.
    """
    if not starts_from_bundle(config, part):
        return False
    from multisa.training import from_bundle

    bundle, _ = _opened(config.init_from)
    network.eval()
    names, known = list(class_names), list(bundle.manifest.classes)
    source: Network
    if isinstance(network, MultiSACAM):
        source, names, known = from_bundle.cam_from_bundle(bundle), names[1:], known[1:]
    elif isinstance(network, DeepLabV3Plus):
        source = from_bundle.segmenter_from_bundle(bundle)
    else:
        source = from_bundle.affinity_from_bundle(bundle)
    source.to(network.backbone.mean.device)
    if part.weights == "none":
        log.warning(f"{part.backbone}: its weights are 'none', so the batch norms of the bundle's backbone stay folded")
    else:
        unfold(source.backbone, network.backbone)
    if images is not None:
        measure_norms(source, images)
        if isinstance(source, MultiSACAM):
            fit_gains(source, images)
    state = source.state_dict()
    for key in ("classifier.weight", "classifier.bias"):
        if key in state:
            state[key] = _rows(state[key], known, network.state_dict()[key], names)
    network.load_state_dict(state)
    return True


def unfold(backbone: Backbone, reference: Backbone) -> None:
    """Give the folded batch norms of `backbone` the scales and statistics of `reference`; in place.

    With the scale s = gamma / sqrt(var + eps) of the reference, W becomes W / s, and the bias b becomes b + s mean: the
    network computes the same as before with frozen statistics, up to rounding.
    """
    known = {name: module for name, module in reference.named_modules() if isinstance(module, nn.BatchNorm2d)}
    names = {module: name for name, module in backbone.named_modules()}
    probe = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE).to(next(backbone.parameters()))
    with torch.no_grad():
        for convolution, norm in norm_pairs(backbone, probe)[0]:
            like = known[names[norm]]
            assert like.running_mean is not None and like.running_var is not None
            assert norm.running_mean is not None and norm.running_var is not None
            if not torch.equal(norm.weight, torch.ones_like(norm.weight)) or norm.running_mean.any():
                continue  # not folded
            scale = like.weight * torch.rsqrt(like.running_var + like.eps)
            chosen = scale.abs() > MIN_SCALE
            convolution.weight.div_(scale.where(chosen, 1.0)[:, None, None, None])
            norm.bias.add_((scale * like.running_mean).where(chosen, 0.0))
            norm.weight.copy_(like.weight.where(chosen, norm.weight))
            norm.running_mean.copy_(like.running_mean.where(chosen, norm.running_mean))
            norm.running_var.copy_(like.running_var.where(chosen, norm.running_var))


def measure_norms(network: Network, images: Tensor) -> None:
    """Give the folded batch norms outside the backbone the statistics of their inputs for `images`; in place.

    The scale and the bias make up for them, so the network computes the same, also with the statistics of a batch.
    """
    inside = set(network.backbone.modules())
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m not in inside]
    measured: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.Module, given: tuple[Tensor]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        variance, mean = torch.var_mean(given[0], (0, 2, 3), correction=0)
        measured[norm] = mean, variance

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        if norms:
            network(images)
        for hook in hooks:
            hook.remove()
        for norm, (mean, variance) in measured.items():
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            norm.bias.add_((mean - norm.running_mean) * scale)
            norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def fit_gains(network: MultiSACAM, images: Tensor) -> None:
    """Set the gains of the levels, which folding made 1, as training does; attention and fusion make up for them."""
    before = network.level_gain.clone()
    network.fit_level_gain(images)
    start = 0
    with torch.no_grad():
        for layer, tap in zip(network.attention, network.taps, strict=True):
            gain = network.level_gain[tap] / before[tap]
            query = layer.get_submodule("query").get_parameter("weight")
            query.div_(gain**2)
            assert network.fuse is not None
            network.fuse.weight[:, start : start + query.shape[1]].div_(gain)
            start += query.shape[1]
        if network.fuse is None:
            network.classifier.weight.div_(network.level_gain[-1] / before[-1])


def _opened(path: str) -> tuple[Bundle, TrainConfig]:
    """The bundle, and the configuration that its networks were trained with."""
    if importlib.util.find_spec("onnx") is None:
        raise BackendUnavailable("init_from: onnx is not installed", remedy='pip install ".[export]"')
    from multisa.training.from_bundle import config_from_bundle

    bundle = load_bundle(path)
    return bundle, config_from_bundle(bundle)


def _differences(part: ModelConfig, stored: TrainConfig) -> list[tuple[str, object, object]]:
    """(setting, ours, the bundle's) of all that make other layers."""
    if isinstance(part, CamConfig):
        mine, theirs = with_taps(part), with_taps(stored.cam)
        pairs: tuple[ModelConfig, ModelConfig] = mine, theirs
    else:
        pairs = part, (stored.affinity if isinstance(part, AffinityConfig) else stored.segmenter)
    values = ((key, *(getattr(side, key) for side in pairs)) for key in _SHARED[type(part)])
    return [(key, ours, theirs) for key, ours, theirs in values if ours != theirs]


def _rows(stored: Tensor, known: Sequence[str], fresh: Tensor, names: Sequence[str]) -> Tensor:
    """The fresh rows of a classifier, those of known classes replaced by the stored ones."""
    rows = fresh.clone()
    for index, name in enumerate(names):
        # The background is the first class of both, whatever it is called.
        if name in known:
            rows[index] = stored[known.index(name)]
    return rows


def _toml(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
