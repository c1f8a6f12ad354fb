"""The Multi-SA network (Eq. 1-8): self-attention on k taps of a backbone, fused and classified.

Also its loss, the multi-scale, flipped inference that turns it into class activation maps, and the
contribution of each level to them.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from multisa.runtime.errors import UsageError
from multisa.training.backbones import Backbone, resize_bilinear

MINIMUM_MAGNITUDE = 1e-6  # keeps the gain of a level that is zero everywhere finite
PEAK_EPSILON = 1e-5  # as in irn: a class without any evidence stays near zero instead of dividing by it
ATTENTION_GAIN = 0.3  # size of the initial queries and keys relative to their input
CLASSIFIER_STD = 0.001  # of the initial weights: logits start near zero


class SelfAttention(nn.Module):
    """Self-attention over the positions of one feature map (Eq. 1-5).

    f_r = W_r F (1x1, c -> c, no bias), A = softmax(f_1^T f_2) over the keys, not divided by sqrt(c),
    V = beta A f_3 + F. beta is trained and starts at 0 (as in SAGAN); its sign is free.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.beta = nn.Parameter(torch.zeros(()))
        # Small at first: the logits are not scaled, and a softmax that starts one-hot hardly learns.
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=ATTENTION_GAIN / channels**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[N, c, h, w] -> [N, c, h, w]."""
        maps = self.query(features), self.key(features), self.value(features)
        if maps[0].dtype == torch.float16:  # the logits are not scaled and exceed its range
            with torch.autocast(features.device.type, enabled=False):
                attended = attend(*(each.float() for each in maps))
        else:
            attended = attend(*maps)
        return self.beta * attended[:, 0].transpose(1, 2).reshape(features.shape) + features


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over positions: query and key [N, c, h, w], value [N, v, h, w] -> [N, 1, h * w, v]."""
    q, k, v = (maps.flatten(2).transpose(1, 2)[:, None] for maps in (query, key, value))
    # The whole (hw)^2 matrix is never built: the operator is fused in training, and becomes a loop over
    # blocks of queries in an exported graph (export/attention.py).
    return functional.scaled_dot_product_attention(q, k, v, scale=1.0)


class MultiSACAM(nn.Module):
    """Backbone, self-attention on the taps, stacking, fusion, classifier.

    Without taps it is the plain CAM baseline: the classifier on the backbone's last level. Each level is
    multiplied by a constant, its `level_gain` (1 unless `fit_level_gain` has set it), so that no level
    outweighs the others by magnitude alone: levels of linear bottlenecks have a root mean square of 3 to 7,
    the finest the largest, where levels after a ReLU have about 1.
    """

    level_gain: Tensor

    def __init__(self, backbone: Backbone, *, taps: tuple[int, ...], n_classes: int) -> None:
        """taps: indices of the backbone's levels, finest first; n_classes counts foreground classes only."""
        super().__init__()
        levels = len(backbone.channels)
        if list(taps) != sorted(set(taps)) or not all(0 <= tap < levels for tap in taps):
            raise UsageError(
                f"cam.taps: got {list(taps)}, expected ascending levels of the backbone, 0..{levels - 1}, which has "
                f"{backbone.layout.describe()}; set cam.taps={list(backbone.layout.taps)}"
            )
        self.backbone = backbone
        self.taps = taps
        self.checkpoint_attention = False  # while training, compute it again for its gradient instead of storing it
        self.attention = nn.ModuleList(SelfAttention(backbone.channels[tap]) for tap in taps)
        stacked = sum(backbone.channels[tap] for tap in taps)
        self.fuse = nn.Conv2d(stacked, stacked, 1, bias=False) if taps else None
        self.classifier = nn.Conv2d(stacked if taps else backbone.channels[-1], n_classes, 1, bias=False)
        if self.fuse is not None:
            nn.init.kaiming_normal_(self.fuse.weight, nonlinearity="linear")
        nn.init.normal_(self.classifier.weight, std=CLASSIFIER_STD)
        self.register_buffer("level_gain", torch.ones(levels))

    def fit_level_gain(self, image: Tensor) -> None:
        """Set `level_gain` so that each level's root mean square is 1 on `image`, normalised [N, 3, H, W]."""
        with torch.inference_mode():
            magnitudes = torch.stack([level.square().mean().sqrt() for level in self.backbone(image)])
        self.level_gain.copy_(1 / magnitudes.clamp(min=MINIMUM_MAGNITUDE))

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that did not come with the backbone's weights, except the betas."""
        betas = {id(beta) for beta in self.beta_parameters()}
        attention = [parameter for parameter in self.attention.parameters() if id(parameter) not in betas]
        fuse = [] if self.fuse is None else list(self.fuse.parameters())
        return [*self.backbone.new_parameters(), *attention, *fuse, *self.classifier.parameters()]

    def beta_parameters(self) -> list[nn.Parameter]:
        """The weight of each level's attention, as parameters."""
        return [layer.beta for layer in self.attention if isinstance(layer, SelfAttention)]

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float32 [N, 3, H, W] -> class activations [N, C, h, w] at the finest tap (Eq. 6-8).

        The activations are unbounded; the image-level logits are their spatial means. (The classifier is
        linear, so pooling before it, as the paper draws it, gives the same.)
        """
        return self.head(self.backbone(image))

    def head(self, levels: list[Tensor]) -> Tensor:
        """Pyramid of the backbone -> class activations [N, C, h, w] at the finest tap."""
        if self.fuse is None:
            return torch.as_tensor(self.classifier(levels[-1] * self.level_gain[-1]))
        scaled = [levels[tap] * self.level_gain[tap] for tap in self.taps]
        if self.checkpoint_attention and self.training:
            pairs = zip(self.attention, scaled, strict=True)
            enhanced = [checkpoint(layer, level, use_reentrant=False) for layer, level in pairs]
        else:
            enhanced = [layer(level) for layer, level in zip(self.attention, scaled, strict=True)]
        stacked = torch.cat([resize_bilinear(v, enhanced[0].shape[-2:]) for v in enhanced], 1)
        return torch.as_tensor(self.classifier(self.fuse(stacked)))

    def betas(self) -> list[float]:
        """The trained weight of each level's attention."""
        return [float(beta.detach()) for beta in self.beta_parameters()]


def multilabel_soft_margin(activations: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Eq. 10 on the globally pooled activations.

    activations: float [N, C, h, w]; labels: float [N, C] of 0 and 1. count: images of the whole batch, if these are a
    part of it. Returns a scalar; the parts of a batch add up.
    """
    pooled = activations.mean((-2, -1))
    total = functional.multilabel_soft_margin_loss(pooled, labels, reduction="sum")
    return total / (len(labels) if count is None else count)


class MultiScaleCAM(nn.Module):
    """uint8 images -> class activation maps in [0, 1] (Eq. 9) and classification scores in [0, 1].

    The network runs on every scale and its mirror image; then ReLU, sum, and division of each map by its own
    maximum (irn). Scores are the sigmoid of the mean logit over scales and mirrors: no ReLU, which would hide
    evidence against a class.
    """

    def __init__(self, network: nn.Module, *, scales: tuple[float, ...]) -> None:
        """Wrap a MultiSACAM, its folded form, or a `SingleLevel`; scales are factors of the image's size."""
        super().__init__()
        self.network = network
        self.scales = tuple(Fraction(scale).limit_denominator(16) for scale in scales)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, H, W, 3] -> cam float32 [N, C, ceil(H/4), ceil(W/4)], scores float32 [N, C]."""
        batch, height, width, _ = image.shape
        backbone = self.network.backbone
        assert isinstance(backbone, Backbone)
        normalised = backbone.normalise(image)
        grid = ((height + 3) // 4, (width + 3) // 4)
        maps: list[Tensor] = []
        logits: list[Tensor] = []
        for scale in self.scales:
            scaled = _rescale(normalised, scale)
            both = self.network(torch.cat([scaled, scaled.flip(-1)]))
            logits.append(both.mean((-2, -1)))
            positive = functional.relu(both)
            straight, mirrored = positive[:batch], positive[batch:]
            maps.append(resize_bilinear(straight + mirrored.flip(-1), grid))
        cam = torch.stack(maps).sum(0)
        cam = cam / (cam.amax((-2, -1), keepdim=True) + PEAK_EPSILON)
        mean_logits = torch.stack(logits).mean(0)
        return cam, torch.sigmoid((mean_logits[:batch] + mean_logits[batch:]) / 2)


class SingleLevel(nn.Module):
    """The class activations of one tap: a MultiSACAM whose other levels are zero.

    Fusion W and classifier C (Eq. 7-8) are linear and without bias, so the activations are a sum over levels:

        C W [up(V_1); ..; up(V_k)] = sum_l  C W_l up(V_l),

    with V_l = beta_l A_l f_3 + F_l the level after its attention (Eq. 5), up() the bilinear resize to the
    finest tap and W_l the columns of W that multiply V_l. This module computes the l-th term (columns SA1,
    SA2, .. of Fig. 4). `MultiScaleCAM` takes it in place of the network, so scales, mirror images, ReLU and
    division by the map's own maximum are those of the whole CAM.
    """

    def __init__(self, network: MultiSACAM, index: int) -> None:
        """index: position among the network's taps, 0 the finest. Parameters are shared with `network`."""
        super().__init__()
        assert network.fuse is not None, "a network without taps has no levels"
        self.backbone = network.backbone
        self.network = network
        self.index = index
        widths = [network.backbone.channels[tap] for tap in network.taps]
        self.columns = slice(sum(widths[:index]), sum(widths[: index + 1]))

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float32 [N, 3, H, W] -> class activations [N, C, h, w] at the finest tap."""
        network = self.network
        assert network.fuse is not None
        levels = self.backbone(image)
        tap = network.taps[self.index]
        enhanced = network.attention[self.index](levels[tap] * network.level_gain[tap])
        raised = resize_bilinear(enhanced, levels[network.taps[0]].shape[-2:])
        fused = functional.conv2d(raised, network.fuse.weight[:, self.columns])
        return torch.as_tensor(network.classifier(fused))


def shares_at_peak(parts: Sequence[SingleLevel], image: Tensor, class_ids: Sequence[int]) -> Tensor:
    """The share of each level in a class's highest activation.

    image: uint8 [1, H, W, 3], used at its own size; class_ids: foreground ids from 1. Returns float32
    [len(class_ids), len(parts)]: the terms of `SingleLevel`'s sum at the position where the sum is highest,
    divided by that sum. Each row adds up to 1; a negative share is evidence against the class.
    """
    normalised = parts[0].backbone.normalise(image)
    terms = torch.stack([part(normalised)[0].flatten(1) for part in parts])  # [parts, C, positions]
    chosen = terms[:, [class_id - 1 for class_id in class_ids]]
    peak = chosen.sum(0).argmax(-1)
    at_peak = torch.take_along_dim(chosen, peak[None, :, None], dim=2)[..., 0].T
    return at_peak / at_peak.sum(1, keepdim=True)


def _rescale(image: Tensor, scale: Fraction) -> Tensor:
    if scale == 1:
        return image
    size = tuple((side * scale.numerator + scale.denominator - 1) // scale.denominator for side in image.shape[-2:])
    return resize_bilinear(image, size)
