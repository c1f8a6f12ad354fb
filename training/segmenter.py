"""DeepLabV3+ (Chen et al. 2018) with separable convolutions, for every image size."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.training.backbones import Backbone, resize_bilinear

SEGMENTER_STRIDE = 4  # of the logits
LOW_LEVEL_CHANNELS = 48  # of the features at that stride in the decoder


class DeepLabV3Plus(nn.Module):
    """Backbone at output stride 16, atrous spatial pyramid pooling, decoder at stride 4."""

    def __init__(
        self, backbone: Backbone, *, n_classes: int, channels: int, atrous_rates: tuple[int, ...], dropout: float
    ) -> None:
        """n_classes counts the background; `channels` is the width of pyramid and decoder (paper: 256)."""
        super().__init__()
        self.backbone = backbone
        self.fine_level = backbone.level_at(SEGMENTER_STRIDE)
        deepest = backbone.channels[-1]
        self.pyramid = nn.ModuleList([_pointwise(deepest, channels)])
        self.pyramid.extend(_separable(deepest, channels, rate) for rate in atrous_rates)
        self.pooled = nn.Sequential(nn.Conv2d(deepest, channels, 1), nn.ReLU(inplace=True))
        self.project = _pointwise(channels * (2 + len(atrous_rates)), channels)
        self.low_level = _pointwise(backbone.channels[self.fine_level], LOW_LEVEL_CHANNELS)
        self.decode = nn.Sequential(
            _separable(channels + LOW_LEVEL_CHANNELS, channels, 1), _separable(channels, channels, 1)
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, n_classes, 1)

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that did not come with the backbone's weights."""
        own = {id(parameter) for parameter in self.backbone.network.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float32 [N, 3, H, W] -> logits [N, n_classes, ceil(H/4), ceil(W/4)]."""
        levels = self.backbone(image)
        deep = levels[-1]
        fine = levels[self.fine_level]
        pooled = self.pooled(deep.mean((-2, -1), keepdim=True)).expand(-1, -1, *deep.shape[-2:])
        mixed = self.dropout(self.project(torch.cat([*(branch(deep) for branch in self.pyramid), pooled], 1)))
        raised = resize_bilinear(mixed, fine.shape[-2:])
        decoded = self.decode(torch.cat([raised, self.low_level(fine)], 1))
        return torch.as_tensor(self.classifier(decoded))


def segmentation_loss(logits: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Cross-entropy; pixels of 255 do not count.

    logits: float [N, K, h, w], resized here to the mask's size; mask: uint8 [N, H, W]. count: pixels that count in
    the whole batch, if these samples are a part of it. Returns a scalar; the parts of a batch add up.
    """
    resized = resize_bilinear(logits, mask.shape[-2:])
    count = (mask != IGNORE_INDEX).sum() if count is None else count
    total = functional.cross_entropy(resized, mask.to(torch.int64), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / count.clamp(min=1)


def soft_segmentation_loss(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with class probabilities; each cell counts by their sum, 0 where the image does not reach.

    logits, targets: float [N, K, h, w]. weight: sum of the targets of the whole batch, if these samples are a part of
    it. Returns a scalar; the parts of a batch add up.
    """
    weight = targets.sum() if weight is None else weight
    return -(targets * functional.log_softmax(logits, 1)).sum() / weight.clamp(min=1)


class SegmentImages(nn.Module):
    """uint8 images -> class probabilities at stride 4: the module that is exported and deployed."""

    def __init__(self, network: DeepLabV3Plus) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> probabilities float32 [N, n_classes, ceil(H/4), ceil(W/4)], summing to one."""
        return torch.as_tensor(self.network(self.network.backbone.normalise(image)).softmax(1))


def multi_scale_probabilities(network: DeepLabV3Plus, image: Tensor, scales: tuple[float, ...], mirror: bool) -> Tensor:
    """Class probabilities averaged over scales of the image and, with `mirror`, their mirror images.

    uint8 [N, H, W, 3] -> float32 [N, n_classes, ceil(H/4), ceil(W/4)], summing to one.
    """
    height, width = image.shape[1:3]
    grid = (-(-height // SEGMENTER_STRIDE), -(-width // SEGMENTER_STRIDE))
    normalised = network.backbone.normalise(image)
    total = torch.zeros(())
    for scale in scales:
        scaled = (
            normalised if scale == 1 else resize_bilinear(normalised, (round(height * scale), round(width * scale)))
        )
        views = torch.cat([scaled, scaled.flip(-1)]) if mirror else scaled
        made = network(views).softmax(1)
        if mirror:
            made = (made[: len(image)] + made[len(image) :].flip(-1)) / 2
        total = total + resize_bilinear(made, grid)
    return total / len(scales)


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def _separable(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), *_pointwise(in_channels, out_channels)
    )
