"""What one level of the Multi-SA network says alone (the columns SA1, SA2, .. of Fig. 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.training.multi_sa import MultiSACAM


class OneLevel(nn.Module):
    """The class activations of one tap: a MultiSACAM whose other levels are zero.

    Fusion W and classifier C (Eq. 7-8) are linear and without bias, so the activations are a sum over levels:

        C W [up(V_1); ..; up(V_k)] = sum_l  C W_l up(V_l),

    with V_l = beta_l A_l f_3 + F_l the level after its attention (Eq. 5), up() bilinear to the finest tap and
    W_l the columns of W that V_l meets. This is the l-th term; `MultiScaleCAM` takes it as it takes the
    network, so scales, mirror images, ReLU and division by the map's own maximum are those of the whole CAM.
    """

    def __init__(self, network: MultiSACAM, index: int) -> None:
        """index: of the tap among the network's taps, 0 the finest. The network's parameters are shared."""
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
        size = levels[network.taps[0]].shape[-2:]
        raised = functional.interpolate(enhanced, size=size, mode="bilinear", align_corners=False)
        fused = functional.conv2d(raised, network.fuse.weight[:, self.columns])
        return torch.as_tensor(network.classifier(fused))


def shares_at_peak(parts: Sequence[OneLevel], image: Tensor, class_ids: Sequence[int]) -> Tensor:
    """How much of a class's highest activation each level brings.

    image: uint8 [1, H, W, 3], taken at its own size; class_ids: foreground ids from 1. Returns float32
    [len(class_ids), len(parts)]: the terms of `OneLevel`'s sum at the position where the sum is highest, over
    that sum. They add up to 1; one below 0 speaks against the class.
    """
    normalised = parts[0].backbone.normalise(image)
    terms = torch.stack([part(normalised)[0].flatten(1) for part in parts])  # [parts, C, positions]
    chosen = terms[:, [class_id - 1 for class_id in class_ids]]
    peak = chosen.sum(0).argmax(-1)
    at_peak = torch.take_along_dim(chosen, peak[None, :, None], dim=2)[..., 0].T
    return at_peak / at_peak.sum(1, keepdim=True)
