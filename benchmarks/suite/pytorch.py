"""The bundle's networks in PyTorch, in the ways people run them. Imported only where torch is installed.

The networks are rebuilt from the bundle once (`training/from_bundle.py`) and kept as a file of weights each, so
that neither start-up nor memory of a candidate includes the rebuilding.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from multisa.benchmarks.suite.candidates import CHANNELS_LAST, COMPILED, Candidate
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import BackendUnavailable
from multisa.runtime.imaging.png import UInt8
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import resize_bilinear
from multisa.training.from_bundle import (
    affinity_from_bundle,
    cam_from_bundle,
    config_from_bundle,
    segmenter_from_bundle,
)
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM
from multisa.training.segmenter import DeepLabV3Plus, SegmentImages

Network = TypeVar("Network", bound=nn.Module)

_REBUILT: dict[str, Callable[[Bundle], nn.Module]] = {
    "segmenter": segmenter_from_bundle,
    "cam": cam_from_bundle,
    "affinity": affinity_from_bundle,
}


def save_weights(bundle: Path, folder: Path) -> None:
    """Write NAME.safetensors of each network of a bundle."""
    opened = load_bundle(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rebuilt in _REBUILT.items():
        state = {key: value.contiguous() for key, value in rebuilt(opened).state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")


def load_segmenter(bundle: Bundle, weights: Path) -> DeepLabV3Plus:
    """DeepLabV3+ as trained, in evaluation mode."""
    config = replace(config_from_bundle(bundle).segmenter, weights="none")
    network = create_model(config, len(bundle.manifest.classes))
    return _with_weights(network, weights / "segmenter.safetensors")


def load_cam(bundle: Bundle, weights: Path) -> MultiSACAM:
    """The Multi-SA network, not folded, in evaluation mode."""
    config = replace(config_from_bundle(bundle).cam, weights="none")
    return _with_weights(create_model(config, len(bundle.manifest.classes)), weights / "cam.safetensors")


def load_affinity(bundle: Bundle, weights: Path) -> AffinityNet:
    """AffinityNet in evaluation mode."""
    config = replace(config_from_bundle(bundle).affinity, weights="none")
    return _with_weights(create_model(config), weights / "affinity.safetensors")


def _with_weights(network: Network, path: Path) -> Network:
    network.load_state_dict(load_file(path))
    # The default layout of PyTorch; the trainers' networks are channels_last.
    plain: Network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return plain.eval()


def plain_batch(images: UInt8) -> torch.Tensor:
    """uint8 [N, H, W, 3] with NCHW memory, as people usually feed it.

    The networks permute their input, so NHWC memory would make it channels_last.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


class LabelsAtSize(nn.Module):
    """Labels and confidence at any size, with PyTorch's own operators."""

    def __init__(self, network: DeepLabV3Plus) -> None:
        super().__init__()
        self.probabilities = SegmentImages(network)

    def forward(self, image: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [N, h, w, 3] -> labels uint8 [N, height, width], confidence uint8 [N, height, width]."""
        enlarged = resize_bilinear(self.probabilities(image).float(), (height, width))
        confidence, labels = enlarged.max(1)
        return labels.to(torch.uint8), (confidence * 255 + 0.5).to(torch.uint8)


class PyTorchSegmenter:
    """The network as trained: not folded, batch normalisation computed."""

    def __init__(self, bundle: Bundle, candidate: Candidate, threads: int, weights: Path) -> None:
        """Load the network from `weights`. Raises BackendUnavailable where a requested GPU is missing."""
        if candidate.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(f"torch {torch.__version__} sees no GPU")
        torch.set_num_threads(threads)
        self._device = torch.device(candidate.device)
        network: nn.Module = LabelsAtSize(load_segmenter(bundle, weights)).eval().to(self._device)
        self.model_bytes = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        self._channels_last = candidate.backend == CHANNELS_LAST
        if self._channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._type = torch.bfloat16 if candidate.device == "cpu" else torch.float16
        self._network = torch.compile(network) if candidate.backend == COMPILED else network

    def segment(self, images: UInt8, size: tuple[int, int]) -> list[tuple[UInt8, UInt8]]:
        """Labels and confidence, uint8 [*size] each, of every image of uint8 [N, h, w, 3], on the CPU."""
        tensor = torch.from_numpy(images) if self._channels_last else plain_batch(images)
        autocast = torch.autocast(self._device.type, dtype=self._type, enabled=self._channels_last)
        with torch.inference_mode(), autocast:
            labels, confidence = self._network(tensor.to(self._device), *size)
            return list(zip(labels.cpu().numpy(), confidence.cpu().numpy(), strict=True))
