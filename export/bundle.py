"""From a finished training run to a bundle: fold, convert, compare, and only then write."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from multisa.export.fold import FoldedMultiSACAM
from multisa.export.graphs import AffinityPhotographs
from multisa.export.parity import Compared, Outputs, ParityReport, measure_parity
from multisa.export.photographs import add_pseudo_mask, truth_of
from multisa.export.report import REPORT_NAME, check_destinations, report_to_bytes
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.bundle import Bundle, BundleParameters, Manifest, write_bundle
from multisa.runtime.engines.contract import AFFINITY, CAM, SEGMENTER, GraphContract, graph_file
from multisa.runtime.engines.ort import OnnxRuntimeEngine
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.palette import IGNORE_INDEX
from multisa.runtime.progress import Progress, say
from multisa.runtime.records import record_to_dict
from multisa.runtime.versions import installed_versions
from multisa.training.affinity_net import head_stride
from multisa.training.data import Dataset, Item
from multisa.training.inference import as_batch, read_working_image
from multisa.training.loop import CHECKPOINT
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiScaleCAM
from multisa.training.pipeline import RunRecord
from multisa.training.segmenter import SegmentImages

UInt8 = npt.NDArray[np.uint8]
PREPROCESSING = (
    "EXIF orientation applied, RGB, 8 bits",
    "reduced to a long side of at most parameters.long_side (bilinear, averaged over the pixels it replaces)",
    "inside the graphs: cast to float32, mean and standard deviation of the backbone",
    "inside cam.onnx: bilinear resizing to each of parameters.cam_scales, each with its mirror image",
)


@dataclass(frozen=True)
class Graph:
    """One file of the bundle: what it answers, the module as trained, what is exported of it."""

    contract: GraphContract
    reference: nn.Module
    exported: nn.Module

    @property
    def file(self) -> str:
        """Name of the file in the bundle."""
        return graph_file(self.contract)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(self.contract.outputs)


def export_bundle(
    run: RunRecord,
    root: Path,
    dataset: Dataset,
    output: Path,
    *,
    photographs: int,
    half_weights: bool = True,
    report: Path | None = None,
) -> Bundle:
    """Write the bundle of the run in `root` to `output`.

    Every graph is compared with its PyTorch network (not folded) on `photographs` photographs of the weak
    list. Raises ParityError, and writes nothing but the parity report to the file `report`, when one of them
    answers differently, UsageError for another data set than the run's, and what `check_destinations` raises.
    """
    check_destinations(output, report)
    if dataset.class_names != run.classes or dataset.train_images_digest() != run.data_digest:
        raise UsageError(f"{dataset.root}: not the data set that {root} was trained on; give the same one")
    graphs = graphs_of_run(run, root)
    files: dict[str, bytes] = {}
    with Progress(len(graphs), "export", "graph") as bar:
        for graph in graphs:
            notes = {"name": run.config.name, "classes": list(run.classes), "graph": graph.file}
            files[graph.file] = onnx_from_module(
                graph.exported, graph.outputs, notes, half_weights=half_weights
            )
            bar.advance(note=graph.file)
    # Spread over the weak list: its photographs have the image-level labels that pseudo-masks need.
    items = dataset.train_images[:: max(len(dataset.train_images) // photographs, 1)][:photographs]
    parity = compare_with_networks(run, graphs, files, items)
    files[REPORT_NAME] = report_to_bytes({"fp32": parity.full_json()})
    if report:
        write_bytes_atomically(report, files[REPORT_NAME])
    parity.require("the exported graphs answer differently from the networks")
    say(f"parity on {parity.photographs} photographs: every figure within its limit")
    return write_bundle(output, _manifest(run, parity), files)


def compare_with_networks(
    run: RunRecord, graphs: tuple[Graph, ...], files: dict[str, bytes], items: tuple[Item, ...]
) -> ParityReport:
    """Compare the graphs with the networks on photographs, the pseudo-masks made from both included."""
    threads = torch.get_num_threads()
    engines = {
        graph.file: OnnxRuntimeEngine(files[graph.file], threads=threads, contract=graph.contract)
        for graph in graphs
    }

    def pairs() -> Iterator[Compared]:
        with Progress(len(items), "parity") as bar:
            for item in items:
                image = read_working_image(item, run.config.long_side)
                expected, got = _network_outputs(graphs, image), {}
                for graph in graphs:
                    got.update(engines[graph.file].run(image[None]))
                for outputs in (expected, got):
                    add_pseudo_mask(image, item.classes, outputs, run.label)
                yield Compared(expected, got, truth_of(item.mask, image))
                bar.advance()

    return measure_parity(pairs(), n_classes=len(run.classes))


def graphs_of_run(run: RunRecord, root: Path) -> tuple[Graph, ...]:
    """Load the three trained networks of the run in `root`, each as trained and as it is exported."""
    config, n_classes = run.config, len(run.classes)
    cam = create_model(config.cam, n_classes, checkpoint=run.folder(root, "cam") / CHECKPOINT)
    affinity = create_model(config.affinity, checkpoint=run.folder(root, "affinity") / CHECKPOINT)
    segmenter = create_model(
        config.segmenter, n_classes, checkpoint=run.folder(root, "segmenter") / CHECKPOINT
    )
    affinities = AffinityPhotographs(affinity, run.label.walk_radius).eval()
    segment = SegmentImages(segmenter).eval()
    scales = config.cam.scales
    return (
        Graph(
            CAM,
            MultiScaleCAM(cam, scales=scales).eval(),
            MultiScaleCAM(FoldedMultiSACAM(cam), scales=scales).eval(),
        ),
        Graph(AFFINITY, affinities, affinities),
        Graph(SEGMENTER, segment, segment),
    )


def _network_outputs(graphs: tuple[Graph, ...], image: UInt8) -> Outputs:
    outputs: Outputs = {}
    for graph in graphs:
        with torch.inference_mode():
            made = graph.reference(as_batch(image))
        made = made if isinstance(made, tuple) else (made,)
        outputs.update({name: tensor.numpy() for name, tensor in zip(graph.outputs, made, strict=True)})
    return outputs


def _manifest(run: RunRecord, report: ParityReport) -> Manifest:
    measured = {f"{row.stage} ({row.measured_on})": {"miou": row.miou, "iou": row.iou} for row in run.rows}
    return Manifest(
        schema_version=1,
        name=run.config.name,
        classes=run.classes,
        palette=run.palette,
        ignore_index=IGNORE_INDEX,
        parameters=BundleParameters(
            long_side=run.config.long_side,
            cam_scales=run.config.cam.scales,
            walk_stride=head_stride(run.config.affinity.head),
            label=run.label,
            score_thresholds=dict(zip(run.classes[1:], run.score_thresholds, strict=True)),
        ),
        preprocessing=PREPROCESSING,
        metrics={"training": measured, "parity": report.as_json()},
        provenance={
            "config": record_to_dict(run.config),
            "data_digest": run.data_digest,
            "training_seconds": run.seconds,
            "python": platform.python_version(),
            "versions": installed_versions(("multisa", "torch", "timm", "onnx", "onnxruntime")),
        },
        files={},
    )
