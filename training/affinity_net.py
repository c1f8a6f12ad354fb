"""AffinityNet: predicts how similar each pixel is to its neighbours, as a half stencil of P offsets.

Two heads give a tensor of the same shape: semantic features (Ahn & Kwak 2018: exp(-mean |f_i - f_j|)) and
class boundaries (irn: 1 - the highest boundary on the straight path between the pixels).
"""

from collections.abc import Callable
from functools import cache, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.kernels import path_offsets, stencil_offsets
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.backbones import Backbone, resize_bilinear

FEATURE_CHANNELS = (64, 128, 256)  # of the last three levels (psa)
BOUNDARY_CHANNELS = 32  # of every level (irn)
GROUPS = 4  # of the group normalisation in the boundary head (irn)
LOG_EPSILON = 1e-5  # keeps logarithms and means of the loss finite (psa, irn)


class FeatureHead(nn.Module):
    """Semantic features of the last three levels at stride 8 (psa: 1x1 convolutions and ELU)."""

    stride = 8

    def __init__(self, backbone: Backbone) -> None:
        """Build the head. Raises UsageError for a backbone without a level at stride 8 and two deeper."""
        super().__init__()
        deepest = len(backbone.channels) - 1
        self.levels = (backbone.level_at(self.stride), deepest - 1, deepest)
        if self.levels[0] >= self.levels[1]:
            raise UsageError(
                f"affinity.head: the feature head needs two levels beyond stride 8; got {backbone.strides}; set "
                "affinity.head=boundary"
            )
        layers = [
            nn.Conv2d(backbone.channels[level], width, 1, bias=False)
            for level, width in zip(self.levels, FEATURE_CHANNELS, strict=True)
        ]
        self.reduce = nn.ModuleList(layers)
        mixed = sum(FEATURE_CHANNELS)
        self.mix = nn.Conv2d(mixed, mixed, 1, bias=False)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def forward(self, levels: list[Tensor], radius: int) -> Tensor:
        """Pyramid -> affinity float32 [N, P, h, w] for the offsets of `radius`."""
        last = [levels[level] for level in self.levels]
        size = last[0].shape[-2:]
        reduced = [
            resize_bilinear(functional.elu(layer(level)), size) for layer, level in zip(self.reduce, last, strict=True)
        ]
        return affinity_from_features(functional.elu(self.mix(torch.cat(reduced, 1))), radius)


class BoundaryHead(nn.Module):
    """Class boundaries at stride 4 from all levels of a frozen backbone (irn's edge branch)."""

    stride = 4

    def __init__(self, backbone: Backbone) -> None:
        """Build the head. Raises UsageError for a backbone without a level at stride 4."""
        super().__init__()
        self.grid_level = backbone.level_at(self.stride)
        channels = backbone.channels
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, BOUNDARY_CHANNELS, 1, bias=False), nn.GroupNorm(GROUPS, BOUNDARY_CHANNELS))
            for width in channels
        )
        self.mix = nn.Conv2d(BOUNDARY_CHANNELS * len(channels), 1, 1)

    def forward(self, levels: list[Tensor], radius: int) -> Tensor:
        """Pyramid -> affinity float32 [N, P, h, w] for the offsets of `radius`."""
        return affinity_from_boundary(torch.sigmoid(self.logits(levels))[:, 0], radius)

    def logits(self, levels: list[Tensor]) -> Tensor:
        """Pyramid -> boundary logits float32 [N, 1, h, w]."""
        size = levels[self.grid_level].shape[-2:]
        reduced = [
            functional.relu(resize_bilinear(layer(level), size))
            for layer, level in zip(self.reduce, levels, strict=True)
        ]
        return torch.as_tensor(self.mix(torch.cat(reduced, 1)))


def head_stride(head: str) -> int:
    """Image pixels per cell of the affinity grid of `head`, along each axis."""
    return BoundaryHead.stride if head == "boundary" else FeatureHead.stride


class AffinityNet(nn.Module):
    """A backbone with one of the two heads.

    The boundary head trains on a frozen backbone (irn detaches every level); the feature head also trains it.
    """

    def __init__(self, backbone: Backbone, *, head: str) -> None:
        """head: "features" (needs a level at stride 8) or "boundary" (needs one at stride 4)."""
        super().__init__()
        self.backbone = backbone
        self.head = BoundaryHead(backbone) if head == "boundary" else FeatureHead(backbone)
        if head == "boundary":
            for parameter in backbone.network.parameters():
                parameter.requires_grad_(False)

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that did not come with the backbone's weights."""
        return [*self.backbone.new_parameters(), *self.head.parameters()]

    def forward(self, image: Tensor, radius: int) -> Tensor:
        """Normalised float32 [N, 3, H, W] -> affinity float32 [N, P, ceil(H / stride), ceil(W / stride)]."""
        return torch.as_tensor(self.head(self.backbone(image), radius))


def affinity_from_features(features: Tensor, radius: int) -> Tensor:
    """exp(-mean_d |f_i - f_j|): [N, D, h, w] -> [N, P, h, w]; 0 where the partner is outside the grid."""
    shifted = _shifts(features, radius)
    distances = [(features - shifted(dy, dx)).abs().mean(1) for dy, dx in stencil_offsets(radius)]
    return torch.exp(-torch.stack(distances, 1)) * inside_grid(features, radius)


def affinity_from_boundary(boundary: Tensor, radius: int) -> Tensor:
    """1 - max of the boundary on the path: [N, h, w] in [0, 1] -> [N, P, h, w]; 0 outside the grid."""
    # Points of a path outside the grid are zero and so do not block it.
    shifted = _shifts(boundary, radius)
    highest = []
    for dy, dx in stencil_offsets(radius):
        first, *others = (shifted(y, x) for y, x in path_offsets(dy, dx))
        highest.append(reduce(torch.maximum, others, first))
    return (1 - torch.stack(highest, 1)) * inside_grid(boundary, radius)


def inside_grid(like: Tensor, radius: int) -> Tensor:
    """1 where a pixel's partner lies in the grid, else 0: [.., h, w] -> float32 [1, P, h, w]."""
    height, width = like.shape[-2:]
    offsets = torch.tensor(stencil_offsets(radius), device=like.device)
    rows = torch.arange(height, device=like.device) + offsets[:, :1]
    columns = torch.arange(width, device=like.device) + offsets[:, 1:]
    row_inside = rows < height
    column_inside = (columns >= 0) & (columns < width)
    return (row_inside[:, :, None] & column_inside[:, None, :])[None].to(like.dtype)


def pair_targets(labels: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Targets of `affinity_loss` from labels on the affinity grid.

    labels: uint8 [N, h, w], 255 = unsure. Returns `same` int8 [N, P, h, w] (1, 0, or -1 where a pixel of the
    pair is unsure or outside) and `source_is_background`, bool of that shape.
    """
    margin = radius - 1
    height, width = labels.shape[-2:]
    padded = functional.pad(labels, (margin, margin, 0, margin), value=IGNORE_INDEX)
    same = []
    for dy, dx in stencil_offsets(radius):
        there = padded[:, dy : dy + height, margin + dx : margin + dx + width]
        counted = (labels != IGNORE_INDEX) & (there != IGNORE_INDEX)
        same.append((labels == there).to(torch.int8).where(counted, -1))
    stacked = torch.stack(same, 1)
    return stacked, (labels == 0)[:, None].expand_as(stacked)


def pair_counts(same: Tensor, source_is_background: Tensor) -> Tensor:
    """How many pairs each term of `affinity_loss` averages over, int64 [3]; arguments as there."""
    alike, background = same == 1, source_is_background
    return torch.stack([(alike & background).sum(), (alike & ~background).sum(), (same == 0).sum()])


def affinity_loss(affinity: Tensor, same: Tensor, source_is_background: Tensor, counts: Tensor | None = None) -> Tensor:
    """Balanced log loss over pixel pairs (Ahn & Kwak 2018; the weights 1/4, 1/4, 1/2 are psa's and irn's).

    affinity: float [N, P, h, w] in [0, 1]; same: int8 of that shape, 1 = both pixels have the same label,
    0 = different labels, -1 = not counted; source_is_background: bool of that shape. counts: `pair_counts` of the
    whole batch, if these samples are a part of it. Returns a scalar; the parts of a batch add up.
    """
    counts = pair_counts(same, source_is_background) if counts is None else counts
    loss_same = -(affinity + LOG_EPSILON).log()
    loss_different = -(1 + LOG_EPSILON - affinity).log()

    def mean(loss: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
        return (loss * chosen).sum() / (count + LOG_EPSILON)

    background = mean(loss_same, (same == 1) & source_is_background, counts[0])
    foreground = mean(loss_same, (same == 1) & ~source_is_background, counts[1])
    return background / 4 + foreground / 4 + mean(loss_different, same == 0, counts[2]) / 2


def _shifts(maps: Tensor, radius: int) -> Callable[[int, int], Tensor]:
    # shifted(dy, dx)[.., y, x] is maps[.., y + dy, x + dx], zero outside the grid: [.., h, w]. Padding once
    # makes every slice legal at every size. Rows are cut once per dy, because in an exported graph each slice
    # is a node that costs time.
    margin = radius - 1
    padded = functional.pad(maps, (margin, margin, margin, margin))

    @cache
    def rows(dy: int) -> Tensor:
        return padded[..., margin + dy : (dy - margin) or None, :]

    @cache
    def shifted(dy: int, dx: int) -> Tensor:
        return rows(dy)[..., margin + dx : (dx - margin) or None]

    return shifted
