"""TensorRT engines for GPUs that are not in this machine: sizes and build times.

    python benchmarks/engines.py                                       # the packaged bundle, minutes
    python benchmarks/engines.py --preset paper-resnet50 --work DIR    # networks of a preset, random weights

A preset's networks have random weights: sizes and times do not depend on what a network has learnt.
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
from typing import Any

import torch
from torch import nn

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.export.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.export.tensorrt.build import BuildOptions, build_engines
from multisa.export.tensorrt.builder import TURING_PRODUCT
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.backends.base import (
    AFFINITY,
    CAM,
    CONTRACTS,
    PRECISIONS,
    SEGMENTER,
    GraphContract,
    graph_file,
)
from multisa.runtime.backends.registry import bundle_precisions
from multisa.runtime.backends.tensorrt_runtime import TENSORRT, TENSORRT_RTX
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.errors import BackendError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import log
from multisa.training.affinity_net import head_stride
from multisa.training.config import TrainConfig, load_config
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.segmenter import SegmentImages

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
# (graph, target, part of the message): what TensorRT-RTX cannot build in any precision.
KNOWN = ((CAM.name, "sm75", TURING_PRODUCT),)
CLASSES = 21
PACKAGED = "packaged"


def random_graphs(config: TrainConfig) -> Iterator[tuple[GraphContract, nn.Module]]:
    """A preset's three networks with random weights, as `multisa export` would export them."""
    torch.manual_seed(0)
    cam = create_model(replace(config.cam, weights="none"), CLASSES).eval()
    yield CAM, MultiScaleCAM(FoldedMultiSACAM(cam), scales=config.cam.scales).eval()
    affinity = create_model(replace(config.affinity, weights="none"))
    yield AFFINITY, AffinityFromImages(affinity, config.label.walk_radius).eval()
    segmenter = create_model(replace(config.segmenter, weights="none"), CLASSES)
    yield SEGMENTER, SegmentImages(segmenter).eval()


def random_bundle(preset: str, folder: Path) -> Bundle:
    """Export a preset's networks to `folder`; the bundle's metrics have the figures of each export."""
    config = load_config(preset)
    files: dict[str, bytes] = {}
    figures: dict[str, Any] = {}
    for contract, network in random_graphs(config):
        start = time.perf_counter()
        data = onnx_from_module(network, tuple(contract.outputs), {"name": config.name}, half_weights=False)
        seconds = round(time.perf_counter() - start, 1)
        files[graph_file(contract)] = data
        figures[contract.name] = {"onnx_megabytes": round(len(data) / 1e6, 2), "export_seconds": seconds}
        log.info(f"{config.name} {contract.name}: {figures[contract.name]}")
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
