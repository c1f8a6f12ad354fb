"""Export a finished training run to a bundle: fold, convert to ONNX, compare, and only then write."""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from multisa.export.compare import run_all, truth_of
from multisa.export.label_method import MethodEvidence, compare_label_methods
from multisa.export.licences import Origin, licence_files, origins_of
from multisa.export.model_card import model_card
from multisa.export.output_masks import add_masks
from multisa.export.parity import Compared, Outputs, ParityReport, measure_parity
from multisa.export.report import (
    REPORT_NAME,
    GraphFile,
    check_report,
    describe_graphs,
    describe_parity,
    graphs_as_json,
    report_to_bytes,
)
from multisa.export.to_onnx import onnx_from_module, with_half_weights
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, Backend, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, BundleParameters, LabelMethod, Manifest, check_replaceable, write_bundle
from multisa.runtime.bundle.manifest import SCHEMA_VERSION
from multisa.runtime.bundle.storage import MODEL_CARD
from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text, write_bytes_atomically
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import Progress, log
from multisa.runtime.records import record_to_dict
from multisa.runtime.system import installed_versions
from multisa.training.affinity_net import head_stride
from multisa.training.config import AffinityConfig, CamConfig, SegmenterConfig, TrainConfig
from multisa.training.data import Dataset, Item, read_working_image, spread
from multisa.training.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.training.inference import as_batch
from multisa.training.loop import CHECKPOINT
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.run_record import RunRecord, load_run
from multisa.training.segmenter import SegmentImages

FULL_WEIGHTS = "full_weights"  # key of the graphs that got float32 weights, and why
# Outputs -> the graphs that they come from; all others are the segmenter's.
GRAPHS_OF_OUTPUT = {"cam": (CAM,), "scores": (CAM,), "affinity": (AFFINITY,), "pseudo_mask": (CAM, AFFINITY)}
Network = TypeVar("Network", CamConfig, AffinityConfig, SegmenterConfig)

METHOD_IMAGES = 128  # to compare the methods of `multisa label` on

PREPROCESSING = (
    "EXIF orientation applied, RGB, 8 bits",
    "resized so that the long side is parameters.long_side, enlarged at most 2 times (bilinear, averaged over the "
    "pixels it replaces)",
    "inside the graphs: cast to float32, mean and standard deviation of the backbone",
    "inside cam.onnx: bilinear resizing to each of parameters.cam_scales, each with its mirror image",
)


@dataclass(frozen=True)
class ExportOptions:
    """How to export a run."""

    num_images: int = 32  # images of the weak list to compare graphs and networks on
    full_weights: bool = False  # store weights as float32 instead of float16; arithmetic is float32
    report: Path | None = None  # also write the parity report here, even if a figure is beyond its limit
    notices: tuple[Path, ...] = ()  # NOTICE and LICENSE... files to add to the bundle
    known_failures: Path | None = None  # Markdown for the section of this name in the model card


@dataclass(frozen=True)
class ExportResult:
    """A new bundle, and how its graphs compare with the PyTorch networks."""

    bundle: Bundle
    graphs: tuple[GraphFile, ...]
    parity: ParityReport
    seconds: float

    def describe(self) -> str:
        """Tables of graphs and figures for people, then the bundle's folder."""
        tables = describe_graphs(self.graphs), describe_parity("fp32 against PyTorch", self.parity)
        return "\n\n".join((*tables, f"time: {self.seconds:.1f} s\nbundle: {self.bundle.path}"))

    def as_json(self) -> dict[str, Any]:
        """JSON values; sizes in bytes, times in seconds."""
        return {
            "bundle": str(self.bundle.path),
            "passed": not self.parity.problems(),
            "graphs": graphs_as_json(self.graphs),
            "parity": {"fp32": self.parity.full_json()},
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Graph:
    """One graph of the bundle: its contract, the network as trained, and the module to export."""

    contract: GraphContract
    reference: nn.Module
    exported: nn.Module


def export_bundle(
    run: str | Path, dataset: Dataset, output: str | Path, options: ExportOptions | None = None
) -> ExportResult:
    """Export the three networks of a training run to ONNX and write them as a bundle to `output`.

    run: the output folder of a finished `multisa train`. dataset: the data set it was trained on, as
    `multisa.training.read_dataset` reads it. Every graph is compared with its PyTorch network (not folded) on
    images of the weak list. With `label_method` "auto" the bundle gets the segmenter, unless the CAM network's
    classifier clearly prefers the pseudo-masks of the walk (label_method.py). The bundle holds the figures in
    bundle.json and the whole report in parity.json, a model card, and NOTICE with the licences of the backbones'
    weights; a bundle already in `output` is replaced.

    A graph whose figures are beyond their limits with weights stored as float16 gets float32 weights instead, which is
    logged and stored under "full_weights" in parity.json and in the provenance of bundle.json.

    Raises ParityError, and writes nothing but `options.report`, if a figure is still beyond its limit. Raises
    UsageError for a folder without a finished run, another data set than the run's, or options that cannot be
    used, CheckpointError for missing networks, BundleError for an `output` that holds anything but a bundle.
    """
    start = time.perf_counter()
    options = options or ExportOptions()
    run = Path(run)
    output = Path(output)
    record = load_run(run)
    check_replaceable(output)  # before minutes of work
    check_report(options.report, output)
    if dataset.class_names != record.classes or dataset.train_images_digest() != record.data_digest:
        raise UsageError(
            f"{dataset.root}: not the data set that {run} was trained on; give the same one, with the same "
            "--labels, --val and --corrections"
        )
    origins = origins_of(record.config, record.files)
    licences = licence_files(record.config.name, origins, options.notices)
    known_failures = read_user_text(options.known_failures) if options.known_failures else ""
    graphs = graphs_of_run(record, run)
    full, seconds = _convert(record, graphs)
    files = full if options.full_weights else {file: with_half_weights(data) for file, data in full.items()}
    # Evenly over the weak list, whose images have the image-level labels that pseudo-masks need.
    step = max(len(dataset.train_images) // options.num_images, 1)
    items = dataset.train_images[::step][: options.num_images]
    backends, parity, failed = _compare(record, graphs, (files, {} if options.full_weights else full), items)
    files[REPORT_NAME] = report_to_bytes({"fp32": {**parity.full_json(), FULL_WEIGHTS: failed}})
    if options.report:
        write_bytes_atomically(options.report, files[REPORT_NAME])
    parity.require(
        f"the exported graphs answer differently from the networks{', with float32 weights too' if failed else ''}",
        f"compare on more images with --num-images (now {len(items)}); --report FILE keeps the figures",
    )
    evidence = compare_methods(record, graphs, backends, dataset)
    manifest = _manifest(record, parity, origins, evidence, failed)
    written = tuple(GraphFile(f.removesuffix(".onnx"), "fp32", f, len(files[f]), t) for f, t in seconds.items())
    files |= licences
    card = partial(model_card, methods_compared=evidence is not None, known_failures=known_failures)
    files[MODEL_CARD] = card(record, manifest.parameters, files, origins).encode()
    bundle = write_bundle(output, manifest, files)
    return ExportResult(bundle, written, parity, time.perf_counter() - start)


def compare_with_networks(
    run: RunRecord, graphs: tuple[Graph, ...], backends: list[Backend], items: tuple[Item, ...]
) -> ParityReport:
    """Compare the graphs, which `backends` run, with the networks, including the pseudo-masks of both."""
    parameters = parameters_of_run(run)

    def pairs() -> Iterator[Compared]:
        with Progress(len(items), "parity") as bar:
            for item in items:
                image = read_working_image(item.image, run.config.long_side)
                expected: Outputs = {}
                for graph in graphs:
                    with torch.inference_mode():
                        made = graph.reference(as_batch(image))
                    tensors = made if isinstance(made, tuple) else (made,)
                    expected.update(zip(graph.contract.outputs, (t.numpy() for t in tensors), strict=True))
                got = run_all(backends, image)
                for outputs in (expected, got):
                    add_masks(image, item.classes, outputs, parameters)
                yield Compared(expected, got, truth_of(item.mask, image))
                bar.advance()

    return measure_parity(pairs(), n_classes=len(run.classes))


def compare_methods(
    run: RunRecord, graphs: tuple[Graph, ...], backends: list[Backend], dataset: Dataset
) -> MethodEvidence | None:
    """Compare both methods of `multisa label` on images of the weak list.

    None unless the run asks for it, and for a list with less than two labels.
    """
    labelled = spread([item for item in dataset.train_images if item.classes], METHOD_IMAGES)
    if run.config.label_method != "auto" or sum(len(item.classes) for item in labelled) < 2:
        return None
    maps = next(graph.reference for graph in graphs if graph.contract == CAM)
    assert isinstance(maps, MultiScaleCAM) and isinstance(maps.network, MultiSACAM)
    evidence = compare_label_methods(maps.network, backends, labelled, parameters_of_run(run))
    scores = ", ".join(f"{method} {score:.3f}" for method, score in evidence.scores.items())
    log.info(f"label method {evidence.chosen}: scores without masks {scores}, ± {evidence.standard_error:.3f}")
    return evidence


def _on_cpu(graphs: tuple[Graph, ...], files: dict[str, bytes]) -> list[Backend]:
    threads = torch.get_num_threads()
    return [OnnxRuntimeBackend(files[graph_file(g.contract)], threads=threads, contract=g.contract) for g in graphs]


def graphs_of_run(run: RunRecord, root: Path) -> tuple[Graph, ...]:
    """Load the three trained networks of the run in `root`, each as trained and as it is exported."""
    config = run.config
    n_classes = len(run.classes)
    cam = create_model(config.cam, n_classes, checkpoint=run.folder(root, "cam") / CHECKPOINT)
    affinity = create_model(config.affinity, checkpoint=run.folder(root, "affinity") / CHECKPOINT)
    checkpoint = run.folder(root, "segmenter") / CHECKPOINT
    segmenter = create_model(config.segmenter, n_classes, checkpoint=checkpoint)
    affinities = AffinityFromImages(affinity, run.label.walk_radius).eval()
    segment = SegmentImages(segmenter).eval()
    maps, folded = (MultiScaleCAM(network, scales=config.cam.scales).eval() for network in (cam, FoldedMultiSACAM(cam)))
    return (Graph(CAM, maps, folded), Graph(AFFINITY, affinities, affinities), Graph(SEGMENTER, segment, segment))


def _compare(
    run: RunRecord,
    graphs: tuple[Graph, ...],
    stored: tuple[dict[str, bytes], dict[str, bytes]],
    items: tuple[Item, ...],
) -> tuple[list[Backend], ParityReport, dict[str, list[str]]]:
    """Compare the graphs with the networks; where float16 weights fail, store float32 ones and compare again.

    stored: the files, which change in place, and those with float32 weights. Returns the graphs, opened, and for each
    file that changed what was beyond its limits.
    """
    files, full = stored
    backends = _on_cpu(graphs, files)
    parity = compare_with_networks(run, graphs, backends, items)
    failed = _failed_graphs(parity) if full else {}
    if failed:
        for file, problems in failed.items():
            log.info(f"{file}: stored with float32 weights, because float16 is not enough: {'; '.join(problems)}")
        files |= {file: full[file] for file in failed}
        backends = _on_cpu(graphs, files)
        parity = compare_with_networks(run, graphs, backends, items)
    return backends, parity, failed


def _failed_graphs(parity: ParityReport) -> dict[str, list[str]]:
    """File -> messages, for each graph with an output beyond its limits."""
    found: dict[str, list[str]] = {}
    for output in sorted(parity.failing()):
        for contract in GRAPHS_OF_OUTPUT.get(output, (SEGMENTER,)):
            found.setdefault(graph_file(contract), []).extend(parity.differences[output].breaches())
    return found


def _convert(run: RunRecord, graphs: tuple[Graph, ...]) -> tuple[dict[str, bytes], dict[str, float]]:
    """The ONNX file of each graph by name, with float32 weights, and the seconds it took."""
    files: dict[str, bytes] = {}
    seconds: dict[str, float] = {}
    with Progress(len(graphs), "export", "graph") as bar:
        for graph in graphs:
            start = time.perf_counter()
            file = graph_file(graph.contract)
            metadata = {"name": run.config.name, "classes": list(run.classes), "graph": file}
            outputs = tuple(graph.contract.outputs)
            try:
                files[file] = onnx_from_module(graph.exported, outputs, metadata, half_weights=False)
            except torch.onnx.OnnxExporterError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise UsageError(
                    f"{file}: PyTorch's exporter cannot convert this network for every image size ({reason}); train "
                    f"with a backbone of another family than {backbone_of(run.config, graph.contract)}"
                ) from error
            seconds[file] = time.perf_counter() - start
            bar.advance(note=file)
    return files, seconds


def backbone_of(config: TrainConfig, contract: GraphContract) -> str:
    """The backbone of the network of a graph."""
    return config.networks()[contract.name].backbone


def parameters_of_run(run: RunRecord, evidence: MethodEvidence | None = None) -> BundleParameters:
    """The parameters of the bundle, from those that the run used and chose.

    evidence: what `label_method` "auto" stands for; without any, the segmenter.
    """
    configured = run.config.label_method
    chosen: LabelMethod = evidence.chosen if evidence else "segmenter"
    return BundleParameters(
        long_side=run.config.long_side,
        cam_scales=run.config.cam.scales,
        walk_stride=head_stride(run.config.affinity.head),
        label_method=chosen if configured == "auto" else configured,
        label=run.label,
        segmenter_label=run.segmenter_label,
        min_area=run.config.min_area,
        score_thresholds=dict(zip(run.classes[1:], run.score_thresholds, strict=True)),
    )


def _manifest(
    run: RunRecord,
    report: ParityReport,
    origins: Sequence[Origin],
    evidence: MethodEvidence | None,
    failed: dict[str, list[str]],
) -> Manifest:
    metrics: dict[str, Any] = {
        "training": {f"{row.stage} ({row.measured_on})": {"miou": row.miou, "iou": row.iou} for row in run.rows},
        "parity": report.as_json(),
    }
    if evidence:
        metrics["label_method"] = evidence.as_json()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=run.config.name,
        classes=run.classes,
        palette=run.palette,
        ignore_index=IGNORE_INDEX,
        parameters=parameters_of_run(run, evidence),
        preprocessing=PREPROCESSING,
        metrics=metrics,
        provenance={
            "config": record_to_dict(_without_paths(run.config)),
            "data_digest": run.data_digest,
            "training_seconds": run.seconds,
            "python": platform.python_version(),
            "licences": {origin.work: origin.licence for origin in origins},
            "versions": installed_versions(("multisa", "torch", "timm", "onnx", "onnxruntime")),
            **({FULL_WEIGHTS: failed} if failed else {}),
        },
        files={},
    )


def _without_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with the names of files in place of their paths, which are of this machine."""

    def named(part: Network) -> Network:
        return replace(part, weights=Path(part.weights).name)

    return replace(
        config,
        init_from=Path(config.init_from).name,
        cam=named(config.cam),
        affinity=named(config.affinity),
        segmenter=named(config.segmenter),
        relabel=replace(config.relabel, teacher=named(config.relabel.teacher)),
    )
