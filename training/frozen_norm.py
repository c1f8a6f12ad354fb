"""Batch norm with frozen statistics, folded into the convolution before it while a network trains.

With frozen statistics, batch norm is a scale and a shift of each channel. Here the convolution's weights are
multiplied by the scale at every step, and the shift becomes its bias: the same function of the same parameters,
with the same gradients, without two passes over every activation. A training step of EfficientNet-Lite0 takes
about a fifth less time on a CPU. The checkpoint is unchanged: parameters keep their names and values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROBE_SIDE = 64  # pixels of the image that shows which layers follow each other
TOLERANCE = 1e-4  # largest difference of an output from the network's own, relative to its largest value

Pairs = list[tuple[nn.Conv2d, nn.BatchNorm2d]]


@contextmanager
def folded_norms(network: nn.Module) -> Iterator[None]:
    """Within the block, every frozen batch norm of `network` that follows a convolution is folded into it.

    network: takes float [N, 3, H, W] and gives a list of maps. All its batch norms are treated as frozen.
    Activations that are part of a batch norm layer (timm's BatchNormAct2d) stay. A network that computes
    something else when folded (a convolution whose output other layers read too) is left as it is.
    """
    pairs = _foldable(network)
    try:
        _fold(pairs)
        yield
    finally:
        _restore(pairs)


def _foldable(network: nn.Module) -> Pairs:
    """Each convolution with the batch norm to fold into it; none if folding changes what the network computes."""
    probe = torch.rand(1, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(network.parameters()))
    # Random values make the answer depend on the layers only: a fresh norm is the identity, which hides errors.
    with _random_values(network):
        pairs, expected = norm_pairs(network, probe)
        try:
            _fold(pairs)
            folded = _outputs(network, probe)
        finally:
            _restore(pairs)
    same = all((a - b).abs().max() <= TOLERANCE * b.abs().max() for a, b in zip(folded, expected, strict=True))
    return pairs if same else []


@contextmanager
def _random_values(network: nn.Module) -> Iterator[None]:
    """Within the block, convolutions, linear layers and batch norms have random values, always the same ones."""
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for module in network.modules():
                _randomise(module, random)
        yield
    finally:
        network.load_state_dict(kept)


def _randomise(module: nn.Module, random: torch.Generator) -> None:
    def uniform(value: Tensor | None, low: float, high: float) -> None:
        if value is not None:
            value.copy_(torch.empty(value.shape).uniform_(low, high, generator=random))

    if isinstance(module, nn.Conv2d | nn.Linear):
        reach = (6 / module.weight[0].numel()) ** 0.5  # He et al. 2015: activations keep their magnitude
        uniform(module.weight, -reach, reach)
    elif isinstance(module, nn.BatchNorm2d):
        uniform(module.weight, 0.5, 1.5)
        uniform(module.bias, -0.5, 0.5)
        uniform(module.running_mean, -0.5, 0.5)
        uniform(module.running_var, 0.5, 2.0)


def _fold(pairs: Pairs) -> None:
    for convolution, norm in pairs:
        convolution.forward = _scaled(convolution, norm)  # type: ignore[assignment,method-assign]
        norm.forward = getattr(norm, "act", nn.Identity()).forward  # type: ignore[method-assign]


def _restore(pairs: Pairs) -> None:
    for pair in pairs:
        for module in pair:
            vars(module).pop("forward", None)


def _outputs(network: nn.Module, image: Tensor) -> list[Tensor]:
    was_training = network.training
    network.eval()
    with torch.no_grad():
        outputs: list[Tensor] = network(image)
    network.train(was_training)
    return outputs


def norm_pairs(network: nn.Module, image: Tensor) -> tuple[Pairs, list[Tensor]]:
    """Each convolution with the batch norm that reads its output; also the outputs of the network for `image`."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    pairs: Pairs = []

    def remember(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)

    def match(module: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if id(inputs[0]) in made and module.affine and module.track_running_stats:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(match))
    outputs = _outputs(network, image)
    for hook in hooks:
        hook.remove()
    return pairs, outputs


def _scaled(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """The forward function of the convolution and the frozen norm together."""
    call = type(convolution)._conv_forward

    def forward(image: Tensor) -> Tensor:
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        if convolution.bias is not None:
            shift = shift + convolution.bias * scale
        return torch.as_tensor(call(convolution, image, convolution.weight * scale[:, None, None, None], shift))

    return forward
