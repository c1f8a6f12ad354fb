"""Modules that give a network the interface of a bundle's graph where training has no use for one."""

from torch import Tensor, nn

from multisa.training.affinity_net import AffinityNet


class AffinityPhotographs(nn.Module):
    """uint8 [N, H, W, 3] -> affinity float32 [N, P, h, w] for one radius, on the head's grid."""

    def __init__(self, network: AffinityNet, radius: int) -> None:
        """Wrap a trained AffinityNet."""
        super().__init__()
        self.network = network
        self.radius = radius

    def forward(self, image: Tensor) -> Tensor:
        """Affinities of every pixel with its neighbours of the half stencil."""
        affinity: Tensor = self.network(self.network.backbone.normalise(image), self.radius)
        return affinity
