"""What folding the Multi-SA head and attention in blocks gain: PyTorch eager against the exported graph.

    python benchmarks/cam_head.py     # a quarter of an hour; --quick: the heads alone

The network as trained (not folded) in PyTorch eager and the exported graph (folded) on ONNX Runtime run
alternately on the same threads: the head alone on one pyramid, and the whole CAM graph with the scales of the
paper's presets, each with its mirror image. Also measured: the error of folding, multiply-adds, bytes of
activations, and peak memory. ResNet-50 and ResNeSt-101 have random weights, which take as long as trained
ones. Writes benchmarks/results/cam_head.json.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from multisa.benchmarks.harness import environment, interleave, make_parser, roofline_share, save_results
from multisa.benchmarks.synthetic_images import image_bytes
from multisa.benchmarks.worker_process import WorkerProcess
from multisa.export.attention import OPSET, QUERY_BLOCK, attention_translation, expand_attention
from multisa.export.cost import costs_of_parts
from multisa.export.to_onnx import onnx_from_module
from multisa.kernels.cpu import native
from multisa.runtime.backends.base import CAM, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.training.config import load_config
from multisa.training.fold import FoldedMultiSACAM
from multisa.training.from_bundle import cam_from_bundle
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM

HEAD_REPEATS = 31
QUICK_REPEATS = 7
REPEATS = 5
SIZE = 512  # pixels, for heads, costs and the packaged network
MEMORY_SIZES = (500, 1000)  # pixels; a whole matrix only for the first: the second would take 31 GB
N_CLASSES = 20  # of VOC, where the weights are random
PARTS = ("head", "cost", "whole", "memory")
BETA = 0.3  # of every self-attention, so that attention affects the output


class Head(nn.Module):
    """The part of a network after its backbone, on a pyramid."""

    def __init__(self, network: FoldedMultiSACAM) -> None:
        super().__init__()
        self.network = network

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        return self.network.head(pyramid)


def paper_scales() -> tuple[float, ...]:
    """The CAM scales of the paper's presets."""
    return load_config("paper-resnet50").cam.scales


def square_image(size: int) -> Tensor:
    """A packaged image as uint8 [1, size, size, 3]."""
    return torch.from_numpy(image_bytes(size, size))[None]


def random_network(preset: str, n_classes: int = N_CLASSES) -> MultiSACAM:
    """Network of a preset with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = load_config(preset, ["cam.weights=none"]).cam
    network = create_model(config, n_classes + 1).eval()
    network.fit_level_gain(network.backbone.normalise(square_image(256)))
    for beta in network.beta_parameters():
        beta.data.fill_(BETA)
    return network


def head_graph(folded: FoldedMultiSACAM, pyramid: list[Tensor], threads: int) -> Callable[[], Any]:
    """Runs the folded head on this pyramid as a graph on ONNX Runtime."""
    names = [f"level_{index}" for index in range(len(pyramid))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        torch.onnx.export(
            Head(folded).eval(),
            (pyramid,),
            path,
            input_names=names,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            custom_translation_table=attention_translation(),
        )
        model = expand_attention(onnx.load(path))
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    levels = dict(zip(names, (level.numpy() for level in pyramid), strict=True))
    return lambda: session.run(None, {i.name: levels[i.name] for i in session.get_inputs()})[0]


def exported(network: MultiSACAM) -> bytes:
    """The CAM graph of a network with the scales of the paper's presets."""
    folded = MultiScaleCAM(FoldedMultiSACAM(network), scales=paper_scales())
    return onnx_from_module(folded, tuple(CAM.outputs), {}, half_weights=False)


def with_whole_matrix(graph: bytes) -> bytes:
    """The CAM graph with attention as one matrix: a block larger than any image makes one iteration."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].i == QUERY_BLOCK:
            node.attribute[0].i = 1 << 40
    return bytes(model.SerializeToString())


@torch.inference_mode()
def compare_heads(network: MultiSACAM, threads: int, repeats: int) -> dict[str, Any]:
    """Times of the head alone on the pyramid of an image and its mirror image, and the error of folding."""
    image = network.backbone.normalise(square_image(SIZE))
    pyramid = [level.contiguous() for level in network.backbone(torch.cat([image, image.flip(-1)]))]
    folded = FoldedMultiSACAM(network)
    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: network.head(pyramid),
        "onnxruntime-folded": head_graph(folded, pyramid, threads),
    }
    times = interleave(ways, repeats=repeats)
    wide = copy.deepcopy(network).double().head([level.double() for level in pyramid]).numpy()
    largest = np.abs(wide).max()
    errors = {name: np.abs(np.asarray(way()) - wide).max() / largest for name, way in ways.items()}
    graph = times["onnxruntime-folded"].median
    # Of an image and its mirror image.
    operations = 2 * costs_of_parts(network, folded, (SIZE, SIZE))["folded head"].multiply_adds
    seconds = operations / (threads * native.peak_multiply_adds(0.5))
    text = "multiply-adds over the measured float32 peak of one thread, times the threads"
    return {
        "limit": {"multiply_adds": operations, **roofline_share(seconds, graph, text)},
        "size": SIZE,
        "times": {name: value.to_json() for name, value in times.items()},
        "ratio": round(times["eager"].median / graph, 2),
        # Largest difference from the unfolded network in float64, over its largest value.
        "relative_error": {name: float(f"{error:.2g}") for name, error in errors.items()},
    }


def compare_graphs(network: MultiSACAM, size: int, threads: int, repeats: int) -> dict[str, Any]:
    """Times of the whole CAM graph, four scales and mirror images, on one image."""
    graph = exported(network)
    image = square_image(size)
    eager = MultiScaleCAM(network, scales=paper_scales()).eval()
    with torch.inference_mode(), OnnxRuntimeBackend(graph, threads=threads, contract=CAM) as backend:
        times = interleave(
            {"eager": lambda: eager(image), "onnxruntime-folded": lambda: backend.run(image.numpy())}, repeats=repeats
        )
        got = backend.run(image.numpy())
        expected = dict(zip(CAM.outputs, eager(image), strict=True))
    return {
        "size": size,
        "times": {name: value.to_json() for name, value in times.items()},
        "ratio": round(times["eager"].median / times["onnxruntime-folded"].median, 2),
        "largest_difference": {k: float(np.abs(got[k] - expected[k].numpy()).max()) for k in CAM.outputs},
    }


def costs(network: MultiSACAM) -> list[dict[str, Any]]:
    """Multiply-adds and bytes of activations for one image at one scale."""
    rows = []
    for scale in (1, 2):
        parts = costs_of_parts(network, FoldedMultiSACAM(network), (SIZE * scale, SIZE * scale))
        backbone, head, after = (parts[name].multiply_adds for name in ("backbone", "head", "folded head"))
        row: dict[str, Any] = {"scale": float(scale)}
        for name, cost in parts.items():
            row[name.replace(" ", "_")] = {
                "giga_multiply_adds": round(cost.multiply_adds / 1e9, 3),
                "activation_megabytes": round(cost.activation_bytes / 1e6, 1),
            }
        row["folded_over_unfolded"] = round((backbone + after) / (backbone + head), 3)
        rows.append({**row, "head_is_largest": after > backbone})
    return rows


class _MemoryProbe:
    """Runs a graph once per call; constructed in a worker process."""

    def __init__(self, graph: bytes, threads: int) -> None:
        self._backend = OnnxRuntimeBackend(graph, threads=threads, contract=CAM)

    def run(self, side: int) -> None:
        self._backend.run(square_image(side).numpy())


def peak_memory(graph: bytes, side: int, threads: int, *, blocks: bool) -> dict[str, Any]:
    """MiB of a fresh process before and after one image, attention in blocks or with a whole matrix."""
    with WorkerProcess(_MemoryProbe, graph if blocks else with_whole_matrix(graph), threads) as worker:
        loaded = round(worker.peak_mib or 0)
        worker.call("run", side)
        peak = round(worker.peak_mib or 0)
    return {"size": side, "blocks": blocks, "loaded_mib": loaded, "peak_mib": peak}


def measure(part: str, networks: dict[str, MultiSACAM], threads: int, repeats: int) -> dict[str, Any]:
    """One of PARTS, by network. repeats: of the heads."""
    if part == "head":
        return {name: compare_heads(network, threads, repeats) for name, network in networks.items()}
    if part == "cost":
        others = {"lite0-20-classes": "lite0", "resnest101": "paper-resnest101"}
        networks = networks | {name: random_network(preset) for name, preset in others.items()}
        return {name: costs(network) for name, network in networks.items()}
    if part == "whole":
        # ResNet-50 on a smaller image: at 512 pixels the unfolded network takes minutes.
        cases = (("lite0", SIZE, REPEATS), ("resnet50", 256, 3))
        return {name: compare_graphs(networks[name], size, threads, count) for name, size, count in cases}
    small, large = MEMORY_SIZES
    packaged = load_bundle(default_bundle_path()).read_file(graph_file(CAM))
    graphs = {
        "lite0": (exported(networks["lite0"]), ((small, False), (small, True), (large, True))),
        "packaged": (packaged, ((large, False), (large, True))),
    }
    return {
        name: [peak_memory(graph, side, threads, blocks=blocks) for side, blocks in sizes]
        for name, (graph, sizes) in graphs.items()
    }


def main() -> None:
    """Measure, print, write the results file; parts that are not measured keep their results."""
    parser = make_parser(__doc__, quick="the heads alone, fewer repeats; other results are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=PARTS, help="measure one part; other results are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = options.only or ("head" if options.quick else None)
    path = options.results / "cam_head.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if only and path.is_file() else {}
    packaged = cam_from_bundle(load_bundle(default_bundle_path()))
    networks = {"lite0": packaged, "resnet50": random_network("paper-resnet50")}
    for part in (only,) if only else PARTS:
        described = environment("torch", "onnxruntime", "timm", quick=options.quick)
        repeats = QUICK_REPEATS if options.quick else HEAD_REPEATS
        measured = measure(part, networks, options.threads, repeats)
        results[part] = {"environment": described, "threads": options.threads, "networks": measured}
    results |= {"scales": list(paper_scales()), "query_block": QUERY_BLOCK}
    save_results("cam_head", results, options.results)


if __name__ == "__main__":
    main()
