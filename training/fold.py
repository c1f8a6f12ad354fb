"""The networks in the form in which they are exported.

`AffinityFromImages` gives AffinityNet the interface of a bundle's graph. `FoldedMultiSACAM` folds the
Multi-SA head exactly: the same function with far less work.

No non-linearity stands between the attention outputs and the classifier, so with P_l = W_c W[:, l], the
classifier W_c times the columns of the fusion W that belong to level l (C x c_l):

    CAM = sum_l up(P_l V_l)                                bilinear resizing and 1x1 convolutions commute
    P_l V_l = P_l F + A (beta P_l W_3) F                   values shrink from c_l to C channels
    A = softmax(F^T M F),  M = W_1^T W_2                   one product matrix; the keys are F itself

With F = g G, the constant gain g times what the backbone gives, P_l and W_3 take g and M takes g^2.
All products are computed once, in float64.

The graph computes every class, even where image-level labels are known: the scores need them, and with 20
classes that costs 1 % of the multiply-adds for ResNets at 512 pixels and 8 % for EfficientNet-Lite0, whose
first tap has 40 channels. `multisa label` drops absent classes before the walk.
"""

from typing import cast

import torch
from torch import Tensor, nn

from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone, resize_bilinear
from multisa.training.multi_sa import MultiSACAM, SelfAttention, attend


class AffinityFromImages(nn.Module):
    """uint8 [N, H, W, 3] -> affinity float32 [N, P, h, w] for one radius, on the head's grid."""

    def __init__(self, network: AffinityNet, radius: int) -> None:
        super().__init__()
        self.network = network
        self.radius = radius

    def forward(self, image: Tensor) -> Tensor:
        """Affinity of every pixel with each of its P neighbours in the half stencil."""
        return torch.as_tensor(self.network(self.network.backbone.normalise(image), self.radius))


class FoldedLevel(nn.Module):
    """One tap of the folded head: features [N, c, h, w] -> class activations [N, C, h, w]."""

    def __init__(self, attention: SelfAttention, projection: Tensor, gain: float) -> None:
        """Fold one attention layer with its projection to classes, float64 [C, c], and its level's gain."""
        super().__init__()
        query, key, value = (_matrix(layer) for layer in (attention.query, attention.key, attention.value))
        # q_i^T f_j = f_i^T M f_j, so the query convolution is M^T.
        self.query = _convolution((query.T @ key).T * gain**2)
        self.direct = _convolution(projection * gain)
        self.value = _convolution(attention.beta.detach().double() * projection @ value * gain)

    def forward(self, features: Tensor) -> Tensor:
        attended = attend(self.query(features), features, self.value(features))
        direct = self.direct(features)
        return torch.as_tensor(direct + attended[:, 0].transpose(1, 2).reshape(direct.shape))


class FoldedMultiSACAM(nn.Module):
    """Multi-SA with its head folded; same input and output as `MultiSACAM`."""

    def __init__(self, network: MultiSACAM) -> None:
        """Fold a trained network; its backbone is shared, not copied."""
        super().__init__()
        self.backbone: Backbone = network.backbone
        self.taps = network.taps
        classifier = _matrix(network.classifier)
        gains = [float(gain) for gain in network.level_gain]
        self.levels = nn.ModuleList()
        if network.fuse is None:
            self.classifier: nn.Conv2d | None = _convolution(classifier * gains[-1])
            return
        self.classifier = None
        fused = classifier @ _matrix(network.fuse)
        start = 0
        for layer, tap in zip(network.attention, network.taps, strict=True):
            attention = cast(SelfAttention, layer)
            stop = start + attention.query.in_channels
            self.levels.append(FoldedLevel(attention, fused[:, start:stop], gains[tap]))
            start = stop

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float32 [N, 3, H, W] -> class activations [N, C, h, w] at the finest tap."""
        return self.head(self.backbone(image))

    def head(self, pyramid: list[Tensor]) -> Tensor:
        """Pyramid of the backbone -> class activations [N, C, h, w] at the finest tap."""
        if self.classifier is not None:
            return torch.as_tensor(self.classifier(pyramid[-1]))
        maps = [level(pyramid[tap]) for level, tap in zip(self.levels, self.taps, strict=True)]
        raised = [resize_bilinear(m, maps[0].shape[-2:]) for m in maps[1:]]
        return torch.stack([maps[0], *raised]).sum(0)


def _matrix(layer: nn.Conv2d) -> Tensor:
    return layer.weight.detach().double()[:, :, 0, 0]


def _convolution(matrix: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=False)
    layer.weight = nn.Parameter(matrix.float()[:, :, None, None], requires_grad=False)
    return layer
