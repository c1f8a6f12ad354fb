"""The networks that PyTorch runs, kept as people keep them: a file of weights for each.

They are rebuilt from the bundle once (`export/unfold.py`), so that no contender's start or memory is charged
for that. Never imported where torch is not.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from multisa.export.to_torch import (
    affinity_from_bundle,
    cam_from_bundle,
    config_from_bundle,
    segmenter_from_bundle,
)
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.training.affinity import build_affinity_net
from multisa.training.affinity_net import AffinityNet
from multisa.training.cams import build_cam_network
from multisa.training.multi_sa import MultiSACAM
from multisa.training.segmentation import build_segmenter
from multisa.training.segmenter import DeepLabV3Plus

UInt8 = npt.NDArray[np.uint8]
Network = TypeVar("Network", bound=nn.Module)

_REBUILT: dict[str, Callable[[Bundle], nn.Module]] = {
    "segmenter": segmenter_from_bundle,
    "cam": cam_from_bundle,
    "affinity": affinity_from_bundle,
}


class States:
    """Writes the files; a guest's class."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        """Write NAME.safetensors of each network of the bundle to `folder`."""
        opened = load_bundle(bundle)
        folder.mkdir(parents=True, exist_ok=True)
        for name, rebuilt in _REBUILT.items():
            state = {key: value.contiguous() for key, value in rebuilt(opened).state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")


def load_segmenter(bundle: Bundle, states: Path) -> DeepLabV3Plus:
    """DeepLabV3+ as it is trained, in evaluation mode."""
    config = replace(config_from_bundle(bundle).segmenter, weights="none")
    network = build_segmenter(config, len(bundle.manifest.classes))
    return _with_state(network, states / "segmenter.safetensors")


def load_cam(bundle: Bundle, states: Path) -> MultiSACAM:
    """The Multi-SA network, not folded, in evaluation mode."""
    config = replace(config_from_bundle(bundle).cam, weights="none")
    return _with_state(build_cam_network(config, len(bundle.manifest.classes)), states / "cam.safetensors")


def load_affinity(bundle: Bundle, states: Path) -> AffinityNet:
    """AffinityNet in evaluation mode."""
    config = replace(config_from_bundle(bundle).affinity, weights="none")
    return _with_state(build_affinity_net(config), states / "affinity.safetensors")


def fed_plainly(images: UInt8) -> torch.Tensor:
    """uint8 [N, H, W, 3] whose memory is NCHW, as people feed it.

    The networks permute their input; of memory in NHWC they would make channels_last.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def _with_state(network: Network, path: Path) -> Network:
    network.load_state_dict(load_file(path))
    # As torch makes networks; the trainers' are channels_last.
    plain: Network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return plain.eval()
