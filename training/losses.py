"""Losses, one function each."""

import torch
from torch import Tensor
from torch.nn import functional

from multisa.runtime.imaging.png import IGNORE_INDEX


def multilabel_soft_margin(activations: Tensor, labels: Tensor) -> Tensor:
    """Eq. 10 on the globally pooled activations.

    activations: float [N, C, h, w]; labels: float [N, C] of 0 and 1. Returns a scalar.
    """
    return functional.multilabel_soft_margin_loss(activations.mean((-2, -1)), labels)


def affinity_loss(affinity: Tensor, same: Tensor, source_is_background: Tensor) -> Tensor:
    """Balanced log loss over pixel pairs (Ahn & Kwak 2018; the weights 1/4, 1/4, 1/2 are psa's and irn's).

    affinity: float [N, P, h, w] in [0, 1]; same: int8 of that shape, 1 = both pixels carry one label,
    0 = two labels, -1 = not counted; source_is_background: bool of that shape.
    """
    loss_same, loss_different = -(affinity + 1e-5).log(), -(1 + 1e-5 - affinity).log()

    def mean(loss: Tensor, chosen: Tensor) -> Tensor:
        return (loss * chosen).sum() / (chosen.sum() + 1e-5)

    background = mean(loss_same, (same == 1) & source_is_background)
    foreground = mean(loss_same, (same == 1) & ~source_is_background)
    return background / 4 + foreground / 4 + mean(loss_different, same == 0) / 2


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy; pixels of 255 do not count.

    logits: float [N, K, h, w], resized to the mask's size here; mask: uint8 [N, H, W].
    """
    resized = functional.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=False)
    return functional.cross_entropy(resized, mask.to(torch.int64), ignore_index=IGNORE_INDEX)
