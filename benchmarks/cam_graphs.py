"""The networks and graphs that cam_head.py measures."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from multisa.export.attention import OPSET, QUERY_BLOCK, attention_translation, expand_attention
from multisa.export.fold import FoldedMultiSACAM
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.engines.contract import CAM
from multisa.training.cams import build_cam_network
from multisa.training.config import load_config
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM

SCALES = load_config("paper-resnet50").cam.scales
N_CLASSES = 20  # of VOC, where the weights are random
PHOTOGRAPHS = default_bundle_path().parents[1] / "demo_photos"


class Head(nn.Module):
    """The part of a network after its backbone, on a pyramid."""

    def __init__(self, network: MultiSACAM | FoldedMultiSACAM) -> None:
        super().__init__()
        self.network = network

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        return self.network.head(pyramid)


def photograph(size: int) -> Tensor:
    """One of the packaged photographs as uint8 [1, size, size, 3]."""
    path = min(PHOTOGRAPHS.glob("*.jpg"))
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB").resize((size, size))))[None]


def random_network(preset: str, n_classes: int = N_CLASSES) -> MultiSACAM:
    """Network of a preset with random weights, in evaluation mode; its attention counts."""
    torch.manual_seed(0)
    config = load_config(preset, ["cam.weights=none"]).cam
    network = build_cam_network(config, n_classes + 1).eval()
    network.calibrate(network.backbone.normalise(photograph(256)))
    for beta in network.beta_parameters():
        beta.data.fill_(0.3)
    return network


def head_session(network: MultiSACAM, pyramid: list[Tensor], threads: int) -> Any:
    """The folded head as a graph on ONNX Runtime, for pyramids of this one size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        torch.onnx.export(
            Head(FoldedMultiSACAM(network)).eval(),
            (pyramid,),
            path,
            input_names=[f"level_{index}" for index in range(len(pyramid))],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            custom_translation_table=attention_translation(),
        )
        model = expand_attention(onnx.load(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def exported(network: MultiSACAM) -> bytes:
    """The CAM graph of a network with the scales of the paper's presets."""
    folded = MultiScaleCAM(FoldedMultiSACAM(network), scales=SCALES)
    return onnx_from_module(folded, tuple(CAM.outputs), {}, half_weights=False)


def with_whole_matrix(graph: bytes) -> bytes:
    """The CAM graph with attention as one matrix: a block that no image fills is one iteration."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].i == QUERY_BLOCK:
            node.attribute[0].i = 1 << 40
    return bytes(model.SerializeToString())
