"""What folding the Multi-SA head and attention in blocks are worth: PyTorch eager against the exported graph.

    python benchmarks/cam_head.py     # a quarter of an hour; --quick: the heads alone

The network as trained (not folded) in PyTorch eager, the exported graph (folded) on ONNX Runtime, on the same
threads, in turn: the head alone on one pyramid, and the whole CAM graph with the scales of the paper's
presets, each with its mirror image. Folding is for the graph: in PyTorch its narrow values (a column for each
class) miss the fused attention, which wants them as wide as the keys, so "eager-folded" may be slower. Beside
the times: the error of folding, multiply-adds and bytes of activations, what the number of classes costs, and
the peak memory of a process. ResNet-50 and ResNeSt-101 have random weights, which take as long as trained
ones. Writes benchmarks/results/cam_head.json.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multisa.benchmarks.cam_graphs import (
    SCALES,
    exported,
    head_session,
    photograph,
    random_network,
    with_whole_matrix,
)
from multisa.benchmarks.harness import Times, environment, interleave, results_folder, save_results
from multisa.export.attention import QUERY_BLOCK
from multisa.export.cost import Cost, costs_of_parts
from multisa.export.fold import FoldedMultiSACAM
from multisa.export.unfold import cam_from_bundle
from multisa.kernels.cpu import native
from multisa.runtime.backends.base import CAM, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM

HEAD_REPEATS, QUICK_REPEATS, REPEATS = 31, 7, 5
SIZE = 512  # pixels, for heads, costs and the packaged network
MEMORY_SIZES = (500, 1000)  # pixels; a whole matrix only for the first: 31 GB for the second


def compare_heads(network: MultiSACAM, threads: int, repeats: int) -> dict[str, Any]:
    """Times of the head alone on the pyramid of one photograph and its mirror image, and folding's error."""
    image = network.backbone.normalise(photograph(SIZE))
    pyramid = [level.contiguous() for level in network.backbone(torch.cat([image, image.flip(-1)]))]
    single = copy.deepcopy(network)
    single.classifier = nn.Conv2d(network.classifier.in_channels, 1, 1, bias=False)
    sessions = {
        "onnxruntime-folded": head_session(network, pyramid, threads),
        "onnxruntime-folded-one-class": head_session(single, pyramid, threads),
    }
    given = {f"level_{index}": level.numpy() for index, level in enumerate(pyramid)}
    feeds = {
        name: {i.name: given[i.name] for i in session.get_inputs()} for name, session in sessions.items()
    }
    folded = FoldedMultiSACAM(network)
    times = interleave(
        {
            "eager": lambda: network.head(pyramid),
            "eager-folded": lambda: folded.head(pyramid),
            **{name: partial(sessions[name].run, None, feeds[name]) for name in sessions},
        },
        repeats=repeats,
    )
    wide = copy.deepcopy(network).double().head([level.double() for level in pyramid]).numpy()
    answers = {
        "eager": network.head(pyramid).numpy(),
        "eager-folded": folded.head(pyramid).numpy(),
        "onnxruntime-folded": sessions["onnxruntime-folded"].run(None, feeds["onnxruntime-folded"])[0],
    }
    graph = times["onnxruntime-folded"].median
    # Of the pyramid of a photograph and its mirror image.
    operations = 2 * costs_of_parts(network, folded, (SIZE, SIZE))["folded head"].multiply_adds
    floor = operations / (threads * native.peak_multiply_adds(0.5))
    return {
        "limit": {
            "multiply_adds": operations,
            "floor_ms": round(1000 * floor, 3),
            "share": round(floor / graph, 3),
            "text": "multiply-adds over the measured float32 peak of one thread, times the threads",
        },
        "size": SIZE,
        "times": {name: value.to_json() for name, value in times.items()},
        "ratio": round(times["eager"].median / graph, 2),
        **growth(times["onnxruntime-folded"], times["onnxruntime-folded-one-class"]),
        # Largest difference from the network in float64, not folded, over its largest value.
        "relative_error": {
            name: float(f"{np.abs(answer - wide).max() / np.abs(wide).max():.2g}")
            for name, answer in answers.items()
        },
    }


def growth(all_classes: Times, one_class: Times) -> dict[str, Any]:
    """The share of the time that the classes beyond the first take, turn by turn: median and quartiles.

    None where the lower quartile is not above zero: it is lost in the scatter of the times, or in the other
    way that a product takes to a single column.
    """
    shares = [1 - one / every for every, one in zip(all_classes.seconds, one_class.seconds, strict=True)]
    low, median, high = (round(float(share), 3) for share in np.quantile(shares, (0.25, 0.5, 0.75)))
    return {
        "share_of_time_that_grows_with_classes": median if low > 0 else None,
        "quartiles_of_that_share": [low, high],
    }


def compare_graphs(
    network: MultiSACAM, graph: bytes, size: int, threads: int, repeats: int
) -> dict[str, Any]:
    """Times of the whole CAM graph, four scales and mirror images, for one photograph."""
    image = photograph(size)
    eager = MultiScaleCAM(network, scales=SCALES).eval()
    with OnnxRuntimeBackend(graph, threads=threads, contract=CAM) as backend:
        times = interleave(
            {"eager": lambda: eager(image), "onnxruntime-folded": lambda: backend.run(image.numpy())},
            repeats=repeats,
        )
        errors = [
            float(np.abs(answer - expected.numpy()).max())
            for answer, expected in zip(backend.run(image.numpy()).values(), eager(image), strict=True)
        ]
    return {
        "size": size,
        "times": {name: value.to_json() for name, value in times.items()},
        "ratio": round(times["eager"].median / times["onnxruntime-folded"].median, 2),
        "largest_difference": dict(zip(CAM.outputs, errors, strict=True)),
    }


def costs(network: MultiSACAM) -> list[dict[str, Any]]:
    """Multiply-adds and bytes of activations for one image at one scale."""
    folded, rows = FoldedMultiSACAM(network), []
    for scale in (1.0, 2.0):
        size = (int(SIZE * scale), int(SIZE * scale))
        parts = costs_of_parts(network, folded, size)
        backbone, head, after = (parts[name].multiply_adds for name in ("backbone", "head", "folded head"))
        rows.append(
            {
                "scale": scale,
                **{name.replace(" ", "_"): _json(cost) for name, cost in parts.items()},
                "folded_over_unfolded": round((backbone + after) / (backbone + head), 3),
                "head_is_largest": after > backbone,
            }
        )
    return rows


def peak_memory(graph: bytes, side: int, threads: int, *, blocks: bool) -> dict[str, float]:
    """MiB of a fresh process before and after one photograph, attention in blocks or with a whole matrix."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(graph if blocks else with_whole_matrix(graph))
        file.flush()
        command = [sys.executable, __file__, "--memory-of", file.name, str(side), "--threads", str(threads)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(printed)
    return measured


def measure_memory(path: str, side: int, threads: int) -> dict[str, float]:
    """Run the graph once, in a process of its own."""
    with OnnxRuntimeBackend(Path(path), threads=threads, contract=CAM) as backend:
        loaded = _peak_kib()
        backend.run(photograph(side).numpy())
    return {"loaded_mib": round(loaded / 1024), "peak_mib": round(_peak_kib() / 1024)}


def _peak_kib() -> int:
    # Not ru_maxrss, which a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _json(cost: Cost) -> dict[str, float]:
    return {
        "giga_multiply_adds": round(cost.multiply_adds / 1e9, 3),
        "activation_megabytes": round(cost.activation_bytes / 1e6, 1),
    }


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="the heads, fewer repeats; other results are kept"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    which.add_argument("--only", choices=list(PARTS), help="measure one part, keep the other results")
    results_folder(parser)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = options.threads
    torch.set_num_threads(threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of[0], int(options.memory_of[1]), threads)))
        return
    only = options.only or ("head" if options.quick else None)
    path = options.results / "cam_head.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if only and path.is_file() else {}
    packaged = cam_from_bundle(load_bundle(default_bundle_path()))
    networks = {"lite0": packaged, "resnet50": random_network("paper-resnet50")}
    for part in (only,) if only else PARTS:
        described = environment("torch", "onnxruntime", "timm", quick=options.quick)
        measured = (
            measure_heads(networks, threads, QUICK_REPEATS)
            if options.quick
            else PARTS[part](networks, threads)
        )
        results[part] = {"environment": described, "threads": threads, "networks": measured}
    results |= {"scales": list(SCALES), "query_block": QUERY_BLOCK}
    save_results("cam_head", results, options.results)


def measure_heads(
    networks: dict[str, MultiSACAM], threads: int, repeats: int = HEAD_REPEATS
) -> dict[str, Any]:
    """The heads alone."""
    with torch.inference_mode():
        return {name: compare_heads(network, threads, repeats) for name, network in networks.items()}


def count_costs(networks: dict[str, MultiSACAM], threads: int) -> dict[str, Any]:
    """What they cost, ResNeSt-101 and 20 classes of lite0 too."""
    others = {
        "lite0-20-classes": random_network("lite0"),
        "resnest101": random_network("paper-resnest101"),
    }
    return {name: costs(network) for name, network in (networks | others).items()}


def measure_graphs(networks: dict[str, MultiSACAM], threads: int) -> dict[str, Any]:
    """The whole CAM graphs."""
    rows = {}
    # ResNet-50 on a smaller photograph: at 512 pixels the unfolded network takes minutes.
    for name, size, repeats in (("lite0", SIZE, REPEATS), ("resnet50", 256, 3)):
        graph = exported(networks[name])
        with torch.inference_mode():
            rows[name] = compare_graphs(networks[name], graph, size, threads, repeats)
    return rows


def measure_memories(networks: dict[str, MultiSACAM], threads: int) -> dict[str, Any]:
    """Peak memory of lite0's graph with the scales of the paper's presets, and of the packaged graph."""
    small, large = MEMORY_SIZES
    packaged = load_bundle(default_bundle_path()).read_file(graph_file(CAM))
    # At twice the larger size, the whole matrix alone would take 31 GB.
    cases = {
        "lite0": (exported(networks["lite0"]), ((small, False), (small, True), (large, True))),
        "packaged": (packaged, ((large, False), (large, True))),
    }
    return {
        name: [
            {"size": side, "blocks": blocks, **peak_memory(graph, side, threads, blocks=blocks)}
            for side, blocks in sizes
        ]
        for name, (graph, sizes) in cases.items()
    }


PARTS = {"head": measure_heads, "cost": count_costs, "whole": measure_graphs, "memory": measure_memories}


if __name__ == "__main__":
    main()
