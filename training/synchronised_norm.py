"""Batch norm with the statistics of all ranks, on CPUs too, where torch's SyncBatchNorm does not work."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from multisa.training.distributed import sum_over_ranks, world_size


@contextmanager
def synchronised_norms(network: nn.Module) -> Iterator[None]:
    """Within the block, every batch norm of `network` in training mode takes its statistics from all ranks.

    Those in evaluation mode stay as they are; so does everything where there is one process. State and names do not
    change.
    """
    modules = network.modules() if world_size() > 1 else ()
    # Folded norms have a function of their own, and are frozen.
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d) and "forward" not in vars(m)]
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)


def _forward(norm: nn.BatchNorm2d, own: Any, image: Tensor) -> Tensor:
    if not norm.training:
        return torch.as_tensor(own(image))
    with torch.autocast(image.device.type, enabled=False):
        made = _normalised(norm, image.float())
    activation = getattr(norm, "act", None)  # timm's BatchNormAct2d
    return torch.as_tensor(activation(made) if activation else made).to(image.dtype)


def _normalised(norm: nn.BatchNorm2d, image: Tensor) -> Tensor:
    """float32 [N, C, H, W] -> the same shape; updates the running statistics as nn.BatchNorm2d does."""
    count = sum_over_ranks(torch.tensor(image.numel() // image.shape[1], device=image.device))
    mean = _sum(image.sum((0, 2, 3))) / count
    centred = image - mean[:, None, None]
    # Of the centred values: the difference of two large sums would lose digits.
    variance = _sum(centred.square().sum((0, 2, 3))) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance * (count / (count - 1)), share)
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    made = centred * scale[:, None, None]
    return made if norm.bias is None else made + norm.bias[:, None, None]


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks; a value acts on the losses of all ranks, so their gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous())


def _sum(values: Tensor) -> Tensor:
    return torch.as_tensor(_SumOverRanks.apply(values))  # type: ignore[no-untyped-call]
