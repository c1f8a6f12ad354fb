"""Backbones by timm name, at output stride 16, with padding that works for every image size.

Every level has size ceil(input / stride); the exporter and the decoders rely on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.runtime.errors import UsageError
from multisa.training.weights import check_weights, create_features, import_timm

PROBES = ((65, 97), (80, 112))  # sizes of images, in pixels, that show whether a model takes every size
PYRAMID_STRIDES = (4, 8, 16, 16)  # of the levels that are made of a network with a single stride
TAP_STRIDE, MAX_TAPS = 8, 3  # the taps are the last levels from this stride on (the paper's: blocks 3 to 5)
REMEDY = "choose another, for example resnet50, convnext_tiny or vit_small_patch16_224"


@dataclass(frozen=True)
class Layout:
    """The levels of a model, and what it needs to give them for every image size."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]  # arguments of timm.create_model
    multiple: int = 1  # images are padded to multiples of this
    channels_last: bool = False  # the model gives [N, h, w, C]
    patch: int | None = None  # side of the patches, in pixels, of a model whose levels all have this stride

    @property
    def taps(self) -> tuple[int, ...]:
        """The levels that self-attention is put on unless the configuration names others."""
        deep = [level for level, stride in enumerate(self.strides) if stride >= TAP_STRIDE]
        return tuple(deep[-MAX_TAPS:])

    def describe(self, taps: Iterable[int] = ()) -> str:
        """Describe the strides of the levels, and those of the taps."""
        chosen = [f"{tap} (stride {self.strides[tap]})" for tap in taps]
        return f"levels at strides {', '.join(map(str, self.strides))}" + (
            f"; taps {', '.join(chosen)}" if chosen else ""
        )


class Backbone(nn.Module):
    """A timm network as a pyramid of features: float32 [N, 3, H, W] (normalised) -> one map per level.

    `channels[i]` and `strides[i]` describe level i. `mean` and `std` (3 values each, for pixels in 0..255)
    are those that the weights were trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, weights: str, output_stride: int = 16) -> None:
        """Build the network.

        weights: "packaged" (from a Python package), "timm" (timm downloads them), "none" (random) or the path of
        a file. output_stride: 32, or 16, where the last stage keeps its resolution, without dilated convolutions
        (as PuzzleCAM's ResNet does; dilated depthwise convolutions are slow on a CPU). Raises UsageError for
        an unknown name, weights that do not exist or do not fit, or a network that has no levels for every image
        size; BackendUnavailable where timm cannot download weights.
        """
        super().__init__()
        check_weights(name, weights)
        self.layout = layout_of(name, output_stride)
        self.network = create_features(name, weights, dict(self.layout.options))
        self.channels, self.strides = list(self.layout.channels), list(self.layout.strides)
        _adapt_convolutions(self.network)
        width = self.channels[-1]
        self.pyramid = FeaturePyramid(width) if self.layout.patch else None
        config: Any = self.network.pretrained_cfg
        for key in ("mean", "std"):
            scale = torch.tensor(config[key], dtype=torch.float32) * 255.0
            self.register_buffer(key, scale.view(1, 3, 1, 1), persistent=False)

    def level_at(self, stride: int) -> int:
        """Index of the last level at `stride`. Raises UsageError when there is none."""
        if stride not in self.strides:
            raise UsageError(f"backbone: got levels at strides {self.strides}, expected one at {stride}; {REMEDY}")
        return len(self.strides) - 1 - self.strides[::-1].index(stride)

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that no weights come with: those of the pyramid of a network with a single stride."""
        return [] if self.pyramid is None else list(self.pyramid.parameters())

    def freeze(self, levels: int) -> None:
        """Stop training every parameter that the first `levels` levels depend on.

        Of a network with a single stride: its embedding, and as large a share of its blocks.
        """
        for parameter in self._parameters_below(levels):
            parameter.requires_grad_(False)

    def _parameters_below(self, levels: int) -> list[nn.Parameter]:
        if not levels:
            return []
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self.pyramid is not None:
            blocks = _blocks(self.network)
            last = len(blocks) * levels // len(self.strides)
            above = {id(p) for block in blocks[last:] for p in block.parameters()}
            return [parameter for parameter in parameters if id(parameter) not in above]
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
        if self.layout.multiple == 1:
            return cast(list[Tensor], self.network(image))
        height, width = image.shape[-2:]
        levels = self.network(_padded(image, self.layout))
        if self.layout.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        if self.pyramid is not None:
            levels = self.pyramid(levels[0], levels[-1])
        return [
            level[..., : _ceil(height, stride), : _ceil(width, stride)]
            for level, stride in zip(levels, self.strides, strict=True)
        ]


class FeaturePyramid(nn.Module):
    """Levels at strides 4, 8, 16 and 16 from two maps of a vision transformer at stride 16.

    The simple feature pyramid of ViTDet (Li et al. 2022): transposed convolutions raise the last map. Its lateral
    convolutions are left out, because the heads here begin with their own. The two levels at stride 16 are the maps
    of an inner block and of the last one, each normalised over its channels, as transformers normalise their output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = pyramid_channels(channels)[1::-1]
        self.inner = ChannelNorm(channels)
        self.last = ChannelNorm(channels)
        self.to_8 = nn.Sequential(nn.ConvTranspose2d(channels, half, 2, 2), ChannelNorm(half))
        self.to_4 = nn.Sequential(nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2), ChannelNorm(quarter))

    def forward(self, inner: Tensor, last: Tensor) -> list[Tensor]:
        """Two maps [N, C, h, w] -> [N, C / 4, 4 h, 4 w], [N, C / 2, 2 h, 2 w] and two of [N, C, h, w]."""
        last = self.last(last)
        finer = self.to_8(last)
        return [self.to_4(finer), finer, self.inner(inner), last]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [N, C, h, w]."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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


def pyramid_channels(channels: int) -> tuple[int, ...]:
    """Channels of the levels that `FeaturePyramid` makes."""
    return channels // 4, channels // 2, channels, channels


@cache
def layout_of(name: str, output_stride: int = 16) -> Layout:
    """Find out, without memory for weights, which levels timm's model `name` has and what it needs for them.

    Raises UsageError, with the reason, for a model that timm does not have, that has no levels, or that takes images
    of one size only.
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise UsageError(f"backbone {name!r}: not a timm model; see timm.list_models()")
    network, options = _on_meta(timm, name, output_stride)
    strides, channels = tuple(network.feature_info.reduction()), tuple(network.feature_info.channels())
    plain = Layout(channels, strides, options)
    tried = [plain, Layout(channels, strides, options, max(strides))]
    if len(set(strides)) == 1:
        inner = len(_blocks(network)) * 2 // 3 - 1
        if inner < 0:
            raise UsageError(f"backbone {name!r}: got levels at the strides {strides}, expected several; {REMEDY}")
        chosen = (*options, ("out_indices", (inner, len(_blocks(network)) - 1)))
        with torch.device("meta"):
            network = timm.create_model(name, features_only=True, **dict(chosen))
        levels = pyramid_channels(channels[-1])
        tried = [Layout(levels, PYRAMID_STRIDES, chosen, max(PYRAMID_STRIDES), patch=strides[0])]
    problems = []
    for layout in tried:
        found, problem = _probed(network.eval(), layout)
        if found:
            return found
        problems.append(problem)
    raise UsageError(f"backbone {name!r}: does not take images of every size ({problems[-1]}); {REMEDY}")


def _on_meta(timm: Any, name: str, output_stride: int) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    # Not every family can keep its resolution or take other sizes than it was trained with, and each says so by
    # refusing the argument; those without any keep their own output stride.
    try:
        for options in ({"output_stride": output_stride}, {"strict_img_size": False}, {"dynamic_img_size": True}, {}):
            try:
                with torch.device("meta"):
                    network = timm.create_model(name, pretrained=False, features_only=True, **options)
            except (TypeError, AssertionError, NotImplementedError):
                continue
            return network, tuple(options.items())
    except (RuntimeError, AttributeError) as error:
        raise UsageError(f"backbone {name!r}: timm cannot give its features ({error}); {REMEDY}") from error
    raise UsageError(f"backbone {name!r}: timm cannot give its features; {REMEDY}")


def _probed(network: nn.Module, layout: Layout) -> tuple[Layout | None, str]:
    """The layout as the network needs it, or why it does not give levels of the expected sizes."""
    expected_strides = layout.strides if layout.patch is None else (PYRAMID_STRIDES[-1],) * 2
    for size in PROBES:
        image = torch.empty(1, 3, *size, device="meta")
        image = _padded(image, layout)
        try:
            with torch.no_grad():
                levels = network(image)
        except (AssertionError, RuntimeError, ValueError) as error:
            return None, (str(error) or type(error).__name__).splitlines()[0]
        padded = tuple(_ceil(side, layout.multiple) * layout.multiple for side in size)
        expected = [tuple(_ceil(side, stride) for side in padded) for stride in expected_strides]
        if [tuple(level.shape[1:3]) for level in levels] == expected:
            layout = Layout(**{**vars(layout), "channels_last": True, "multiple": max(layout.strides)})
        elif [tuple(level.shape[-2:]) for level in levels] != expected:
            return None, f"levels of {size[0]}x{size[1]} pixels: {[tuple(level.shape[1:]) for level in levels]}"
    return layout, ""


def _padded(image: Tensor, layout: Layout) -> Tensor:
    """Pad [N, 3, H, W] with the mean colour at the right and below; resize it so that patches are 16 pixels apart."""
    multiple = layout.multiple
    height, width = (_ceil(side, multiple) * multiple for side in image.shape[-2:])
    if multiple > 1:
        image = functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
    if layout.patch not in (None, multiple):
        image = resize_bilinear(image, (height // multiple * layout.patch, width // multiple * layout.patch))
    return image


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network with a single stride, in the order they run."""
    return list(getattr(getattr(network, "model", None), "blocks", ()))


def _ceil(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


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
