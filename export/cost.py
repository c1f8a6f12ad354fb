"""Count the multiply-adds and activation bytes of a network at one image size, without computing.

before = cost_of(network, (512, 512))
after = cost_of(FoldedMultiSACAM(network), (512, 512))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from multisa.training.multi_sa import MultiSACAM


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass."""

    multiply_adds: int  # of convolutions, matrix products and attention
    activation_bytes: int  # written by all operators, without attention matrices, which are never whole

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds - other.multiply_adds, self.activation_bytes - other.activation_bytes)


def cost_of(module: nn.Module, size: tuple[int, int]) -> Cost:
    """Count for one image of `size` (height, width), float32 [1, 3, height, width], on fake tensors."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, *size)
        with _Counter() as counter, _WholeAttention(counter):
            module(image)
    return Cost(counter.multiply_adds, counter.activation_bytes)


def costs_of_parts(network: MultiSACAM, folded: nn.Module, size: tuple[int, int]) -> dict[str, Cost]:
    """Cost of the backbone, and of the head as trained and folded, at one size of image."""
    backbone = cost_of(network.backbone, size)
    return {
        "backbone": backbone,
        "head": cost_of(network, size) - backbone,
        "folded head": cost_of(folded, size) - backbone,
    }


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the cost of every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiply_adds = 0
        self.activation_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        # PyTorch counts two operations per multiply-add.
        count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.multiply_adds += count(*args, **(kwargs or {}), out_val=made) // 2
        if all(returned.alias_info is None for returned in func._schema.returns):  # neither view nor in place
            self.activation_bytes += sum(leaf.nbytes for leaf in tree_leaves(made) if torch.is_tensor(leaf))
        return made


class _WholeAttention(TorchFunctionMode):
    """Counts attention as one operator, however PyTorch would implement it."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (cast(Tensor, argument) for argument in args)
        pairs = query.shape[:-1].numel() * key.shape[-2]
        self.counter.multiply_adds += pairs * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])
