"""TensorRT engines for GPUs that are not in this machine: sizes, build times, and parity of their graphs.

    python benchmarks/engines.py                                       # the packaged bundle, minutes
    python benchmarks/engines.py --preset paper-resnet50 --work DIR    # networks of a preset, random weights

A preset's networks have random weights: sizes, times and parity do not depend on what a network has learnt.
TensorRT-RTX builds the engines on the CPU; none is run, and no figure is of a GPU. --library tensorrt builds
for the GPU of this machine. Graphs and engines stay in --work, so that an interrupted run resumes from there.
Each run replaces its own rows in benchmarks/results/engines.json. A known failure (KNOWN) is a row that says
so; any other ends the run with exit code 1.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.export.bundle import Graph
from multisa.export.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.export.tensorrt.build import BuildOptions, build_engines
from multisa.export.tensorrt.builder import TURING_PRODUCT
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.backends.base import AFFINITY, CAM, CONTRACTS, PRECISIONS, SEGMENTER
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import bundle_precisions
from multisa.runtime.backends.tensorrt_runtime import TENSORRT, TENSORRT_RTX
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.errors import BackendError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.decode import read_image, resize_image, working_size
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import log
from multisa.training.affinity_net import head_stride
from multisa.training.config import TrainConfig, load_config
from multisa.training.inference import as_batch
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiScaleCAM, SelfAttention
from multisa.training.segmenter import SegmentImages

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
# (graph, target, part of the message): what TensorRT-RTX cannot build in any precision.
KNOWN = ((CAM.name, "sm75", TURING_PRODUCT),)
CLASSES = 21
BETA = 0.1  # of every self-attention; at its initial 0, attention would not affect the output
PARITY_SIDE = 256  # pixels: the eager network of a preset takes seconds per image
PACKAGED = "packaged"


def packaged_images() -> list[np.ndarray]:
    """The packaged images, uint8 [h, w, 3], reduced to PARITY_SIDE."""
    paths = sorted((default_bundle_path().parents[1] / "demo_images").glob("*.jpg"))
    images = [read_image(path).rgb for path in paths]
    return [resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], PARITY_SIDE)) for rgb in images]


def random_graphs(config: TrainConfig) -> Iterator[Graph]:
    """A preset's three networks with random weights, as `multisa export` would get them."""
    torch.manual_seed(0)
    cam = create_model(replace(config.cam, weights="none"), CLASSES)
    calibrate_batch_norm(cam)
    for layer in cam.attention:
        cast(SelfAttention, layer).beta.data.fill_(BETA)
    yield Graph(
        CAM,
        MultiScaleCAM(cam, scales=config.cam.scales).eval(),
        MultiScaleCAM(FoldedMultiSACAM(cam), scales=config.cam.scales).eval(),
    )
    affinity = create_model(replace(config.affinity, weights="none"))
    calibrate_batch_norm(affinity.backbone)
    wrapped = AffinityFromImages(affinity, config.label.walk_radius).eval()
    yield Graph(AFFINITY, wrapped, wrapped)
    segmenter = create_model(replace(config.segmenter, weights="none"), CLASSES)
    calibrate_batch_norm(segmenter)
    segment = SegmentImages(segmenter).eval()
    yield Graph(SEGMENTER, segment, segment)


def calibrate_batch_norm(network: nn.Module) -> None:
    """Give batch norm the statistics of real images; without them a deep random network overflows."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    backbone: Any = getattr(network, "backbone", network)
    batch = torch.cat([as_batch(image[:128, :128]) for image in packaged_images()])
    network.train()
    with torch.no_grad():
        network(backbone.normalise(batch))
    network.eval()


def parity(graph: Graph, data: bytes) -> dict[str, float]:
    """Largest errors of ONNX Runtime against eager PyTorch, not folded, by output."""
    errors: dict[str, float] = {}
    with OnnxRuntimeBackend(data, threads=torch.get_num_threads(), contract=graph.contract) as backend:
        for image in packaged_images():
            with torch.inference_mode():
                made = graph.reference(as_batch(image))
            made = made if isinstance(made, tuple) else (made,)
            got = backend.run(image[None])
            for name, tensor in zip(graph.outputs, made, strict=True):
                expected = tensor.numpy()
                if name == "labels":
                    key, error = "labels: share that differs", float((expected != got[name]).mean())
                else:
                    span = float(np.abs(expected).max()) or 1.0
                    difference = np.abs(expected.astype(np.float64) - got[name]).max()
                    key, error = f"{name}: error by maximum", float(difference) / span
                errors[key] = max(errors.get(key, 0.0), float(f"{error:.3g}"))
    return errors


def random_bundle(preset: str, folder: Path) -> Bundle:
    """Export a preset's networks to `folder`; the bundle's metrics have the figures of each export."""
    config = load_config(preset)
    files: dict[str, bytes] = {}
    figures: dict[str, Any] = {}
    for graph in random_graphs(config):
        start = time.perf_counter()
        data = onnx_from_module(graph.exported, graph.outputs, {"name": config.name}, half_weights=False)
        seconds = time.perf_counter() - start
        files[graph.file] = data
        figures[graph.contract.name] = {
            "onnx_megabytes": round(len(data) / 1e6, 2),
            "export_seconds": round(seconds, 1),
            "onnxruntime_against_eager": parity(graph, data),
        }
        log.info(f"{config.name} {graph.file}: {figures[graph.contract.name]}")
    names = ("background", *(f"class {index}" for index in range(1, CLASSES)))
    manifest = load_bundle(default_bundle_path()).manifest
    manifest = replace(
        manifest,
        name=f"{config.name}, random weights",
        classes=names,
        palette=tuple((int(r), int(g), int(b)) for r, g, b in voc_palette()[:CLASSES]),
        parameters=replace(
            manifest.parameters,
            long_side=config.long_side,
            cam_scales=config.cam.scales,
            walk_stride=head_stride(config.affinity.head),
            label=config.label,
            score_thresholds=dict.fromkeys(names[1:], 0.5),
        ),
        metrics={"export": figures},
    )
    return write_bundle(folder, manifest, files)


def engine_rows(bundle: Bundle, options: BuildOptions) -> Iterator[dict[str, Any]]:
    """One row per target and graph that has the precision, as each is built."""
    for contract in CONTRACTS:
        if options.precision not in bundle_precisions(bundle, contract):
            continue
        for target in options.targets:
            names = {"graph": contract.name, "target": target, "precision": options.precision}
            cpu = time.process_time()
            report = build_engines(bundle, replace(options, targets=(target,), graphs=(contract.name,)))
            cpu = time.process_time() - cpu
            for failure in report.failures:
                yield {**names, "failure": failure, "known": is_known(contract.name, target, failure)}
            for row in report.rows:
                yield {
                    **names,
                    "profiles": [str(profile) for profile in row.profiles],
                    "megabytes": round(row.bytes / 1e6, 2),
                    "build_seconds": round(row.build_seconds, 2),
                    "build_cpu_seconds": None if row.is_cached else round(cpu, 2),
                }


def is_known(graph: str, target: str, failure: str) -> bool:
    """Whether this failure is expected of this graph on this target."""
    return any((graph, target) == (g, t) and part in failure for g, t, part in KNOWN)


def exit_code(rows: Sequence[dict[str, Any]]) -> int:
    """0 where every row is an engine or a known failure."""
    failed = any("failure" in row and not row["known"] for row in rows)
    return BackendError.exit_code if failed else 0


def main() -> None:
    """Build, and write the results after each engine."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--preset", default=PACKAGED, help="a preset's name or file; default: packaged bundle"
    )
    parser.add_argument("--work", type=Path, default=Path("build/engines"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the bundle's graphs")
    parser.add_argument("--library", default=TENSORRT_RTX, choices=(TENSORRT_RTX, TENSORRT))
    options = parser.parse_args()

    path = options.results / "engines.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures: dict[str, Any] = {}
    if options.preset == PACKAGED:
        bundle = load_bundle(default_bundle_path())
    else:
        folder = options.work / Path(options.preset).stem
        if not (folder / "bundle.json").is_file():
            random_bundle(options.preset, folder)
        bundle = load_bundle(folder)
        figures = bundle.manifest.metrics["export"]
    described = environment("torch", "onnxruntime", "tensorrt-rtx-cu13-libs")
    results |= described
    entry: dict[str, Any] = {
        "graphs": figures,
        "engines": [],
        "load_average_at_start": described["load_at_start"],
    }
    # Other precisions and libraries have entries of their own.
    unusual = [text for text in (options.precision, options.library) if text not in ("fp32", TENSORRT_RTX)]
    results.setdefault("bundles", {})[", ".join((bundle.manifest.name, *unusual))] = entry
    requested = BuildOptions(
        tuple(options.targets.split(",")),
        precision=options.precision,
        library=options.library,
        engine_cache=options.work / "cache",
    )
    for row in engine_rows(bundle, requested):
        entry["engines"].append(row)
        log.info(json.dumps(row))
        write_json_atomically(path, results)  # an interrupted run keeps its rows
    save_results("engines", results, options.results)
    raise SystemExit(exit_code(entry["engines"]))


if __name__ == "__main__":
    main()
