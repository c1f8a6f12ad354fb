"""Run graphs beside the bundle's fp32 graphs on ONNX Runtime's CPU and compare; no PyTorch, no onnx.

Also which images graphs are compared on, and which they are calibrated on (`read_image_sets`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.export.output_masks import add_masks
from multisa.export.parity import CONFIDENCE, Compared, Outputs, ParityReport
from multisa.export.report import check_report, describe_parity, open_bundle, report_to_bytes
from multisa.runtime.backends.base import CONTRACTS, SEGMENTER, Backend, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import BackendRequest, backend_precisions, describe_selection, select_backend
from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import UInt8, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import Progress, log
from multisa.runtime.sources.folders import list_images
from multisa.training.annotations.base import Mask, MaskFile
from multisa.training.data import read_dataset, read_working_image, spread

CALIBRATION_IMAGES = 64  # to take the ranges of values from; more hardly widen a range
# The segmenter is one small graph, compared on this many times as many images as cam and affinity.
SEGMENTER_FACTOR = 8
_TOGETHER = tuple(c for c in CONTRACTS if c != SEGMENTER)  # cam and affinity: pseudo-masks need both


@dataclass(frozen=True)
class LabelledImage:
    """One image file, with its image-level labels and ground truth where they are known."""

    path: Path
    classes: tuple[int, ...] | None  # foreground class ids; None if the image has no labels
    mask: Mask | None


@dataclass(frozen=True)
class ImageSets:
    """The images for each step; calibration shares none with the others unless there are no more."""

    calibration: tuple[LabelledImage, ...]
    labelled: tuple[LabelledImage, ...]  # for cam, affinity and the pseudo-masks made from them
    segmenter: tuple[LabelledImage, ...]


@dataclass(frozen=True)
class ParityOptions:
    """How to compare a backend."""

    precision: str = "fp32"  # of the graphs; "bf16", which has no file, for the segmenter on openvino
    masks: Path | None = None  # ground truth for a folder of images: PNG masks of the same names
    num_images: int = 128  # most images for cam and affinity; the segmenter gets eight times as many
    engine_cache: Path | None = None  # TensorRT engines, besides those in the bundle
    threads: int = 2  # of the CPU
    report: Path | None = None  # also write the report here, as JSON, even if a limit is exceeded


@dataclass(frozen=True)
class ParityResult:
    """A backend compared with the fp32 graphs."""

    title: str  # "fp16 on tensorrt-rtx"
    backend: str  # what ran the graphs
    bundle: Path
    report: ParityReport
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit."""
        return not self.report.problems()

    def describe(self) -> str:
        """A table of figures and limits, then the bundle that was compared."""
        table = describe_parity(self.title, self.report)
        return f"{table}\n\ntime: {self.seconds:.1f} s\nbundle: {self.bundle}"

    def as_json(self) -> dict[str, Any]:
        """JSON values; times in seconds."""
        return {
            "bundle": str(self.bundle),
            "backend": self.backend,
            "precision": self.report.precision,
            "passed": self.passed,
            "parity": {self.title: self.report.full_json()},
            "seconds": round(self.seconds, 2),
        }

    def require(self) -> None:
        """Raise ParityError that names every figure beyond its limit."""
        self.report.require(
            f"{self.title} differs from fp32 on onnxruntime-cpu",
            "use another --backend or --precision (fp32 differs least), or compare on more images with --num-images",
        )


@dataclass(frozen=True)
class Variant:
    """Graphs of one precision and one way of running them; each variant gets a report of its own."""

    title: str
    precision: str
    contracts: tuple[GraphContract, ...]  # of the graphs it has
    open: Callable[[GraphContract], Backend]


def check_parity(
    bundle: Bundle | str | Path, backend: str, images: str | Path, options: ParityOptions | None = None
) -> ParityResult:
    """Compare a bundle's graphs in one precision, on one backend, with its fp32 graphs on the CPU.

    backend: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu or openvino. images: a data set in VOC
    layout, or a folder of images. Writes `options.report` and nothing else.

    Figures beyond their limits are in the result: see `passed`, or call `require` to have them raised. Raises
    UsageError for an unknown backend, a precision that the bundle lacks, or images that do not fit;
    BackendUnavailable if the backend cannot run here; ParityError for outputs that are missing or of another
    shape than those of fp32.
    """
    start = time.perf_counter()
    options = options or ParityOptions()
    opened = open_bundle(bundle)
    check_report(options.report, opened.path)
    sets = read_image_sets(
        images, opened.manifest.classes, num_images=options.num_images, masks=options.masks, calibrate=False
    )
    request = BackendRequest(backend, options.precision, options.engine_cache)
    available = [c for c in CONTRACTS if options.precision in backend_precisions(opened, c, backend)]
    alone = [c for c in available if c in _TOGETHER]
    if len(alone) == 1:
        log.info(f"{alone[0].name}: left out, cam and affinity are compared through the masks they make together")
        available.remove(alone[0])
    with ExitStack() as stack:
        choices = []
        for contract in available or CONTRACTS:  # if there are none, the first raises the error
            choices.append(select_backend(opened, contract, request, threads=options.threads))
            stack.callback(choices[-1].backend.close)
        for line in describe_selection(choices):
            log.info(line)
        engines = {choice.graph: choice.backend for choice in choices}
        name = choices[0].backend.name
        title = f"{options.precision} on {name}"
        variant = Variant(title, options.precision, tuple(available), lambda c: engines[c.name])
        report = compare_variants(opened, [variant], sets, threads=options.threads)[title]
    if options.report:
        write_bytes_atomically(options.report, report_to_bytes({title: report.full_json()}))
    return ParityResult(title, name, opened.path, report, time.perf_counter() - start)


def on_cpu(graphs: Mapping[str, bytes], threads: int) -> Callable[[GraphContract], Backend]:
    """Open graphs, by the name of their contract, on ONNX Runtime's CPU."""
    return lambda contract: OnnxRuntimeBackend(graphs[contract.name], threads=threads, contract=contract)


def compare_variants(
    bundle: Bundle, variants: Sequence[Variant], sets: ImageSets, *, threads: int
) -> dict[str, ParityReport]:
    """Compare each variant with the bundle's fp32 graphs, with the masks that both make and ground truth; by title.

    Pseudo-masks from the segmenter, each of which takes a dense CRF, are made of as many of its images as cam and
    affinity have.
    """
    reports = {variant.title: ParityReport(variant.precision) for variant in variants}
    n_classes = len(bundle.manifest.classes)
    parameters = bundle.manifest.parameters
    refined = set(spread(sets.segmenter, len(sets.labelled)))
    for contracts, images in ((_TOGETHER, sets.labelled), ((SEGMENTER,), sets.segmenter)):
        taking = [v for v in variants if all(contract in v.contracts for contract in contracts)]
        if not taking:
            continue
        graphs = {contract.name: bundle.read_file(graph_file(contract)) for contract in contracts}
        with ExitStack() as stack, Progress(len(images), f"parity of {', '.join(graphs)}") as bar:
            openers = {"": on_cpu(graphs, threads), **{variant.title: variant.open for variant in taking}}
            runners = {
                title: [stack.enter_context(open_one(contract)) for contract in contracts]
                for title, open_one in openers.items()
            }
            reference = runners.pop("")
            for image in images:
                rgb = read_working_image(image.path, parameters.long_side)
                expected = run_all(reference, rgb)
                truth = truth_of(image.mask, rgb)
                if "cam" in expected:
                    classes = _classes_for_cam(bundle.manifest, image, expected)
                else:
                    classes = _classes_for_segmenter(image, truth) if image in refined else ()
                add_masks(rgb, classes, expected, parameters)
                for title, backends in runners.items():
                    got = run_all(backends, rgb)
                    add_masks(rgb, classes, got, parameters)
                    reports[title].add(Compared(expected, got, truth), n_classes=n_classes)
                bar.advance()
    return reports


def run_all(backends: Sequence[Backend], image: UInt8) -> Outputs:
    """All outputs of the backends for one image, uint8 [H, W, 3], by name."""
    return {name: values for backend in backends for name, values in backend.run(image[None]).items()}


def truth_of(mask: Mask | None, image: UInt8) -> dict[str, UInt8]:
    """Ground truth of the outputs that are labels, uint8 [H, W] of the size of `image`; none without mask."""
    if mask is None:
        return {}
    truth = resize_mask(mask.read(), (image.shape[0], image.shape[1]))
    return dict.fromkeys(CONFIDENCE, truth)


def _classes_for_cam(manifest: Manifest, image: LabelledImage, reference: Outputs) -> tuple[int, ...]:
    """Classes of the image's labels; without labels, those the reference scores above their thresholds."""
    if image.classes is not None:
        return image.classes
    thresholds = [manifest.parameters.score_thresholds[name] for name in manifest.foreground]
    found = np.asarray(reference["scores"], np.float32)[0] >= thresholds
    return tuple((np.flatnonzero(found) + 1).tolist())


def _classes_for_segmenter(image: LabelledImage, truth: Mapping[str, UInt8]) -> tuple[int, ...]:
    """Classes of the image's labels; without labels, as on the list `val`, those of the ground truth, if any."""
    shown = {*np.unique(truth["labels"]).tolist()} if truth else set()
    return image.classes or tuple(sorted(shown - {0, IGNORE_INDEX}))


def read_image_sets(
    root: str | Path, classes: tuple[str, ...], *, num_images: int, masks: Path | None, calibrate: bool = True
) -> ImageSets:
    """Read a data set in VOC layout, or a folder of images.

    VOC layout (has its own masks): cam and affinity are compared on `train` (or the weak list if there is no
    `train`), the segmenter on `val`; the rest of the weak list is for calibration. Folder: every other image
    is for calibration, the rest for comparison; without `calibrate`, all are for comparison.
    classes: the bundle's. num_images: most images for cam and affinity. masks: folder of PNG masks with the
    names of the images in a plain folder. Raises UsageError for classes other than the bundle's, for `masks`
    with VOC layout, and for a folder of masks with no mask of any image.
    """
    root = Path(root)
    if (root / "JPEGImages").is_dir():
        if masks:
            raise UsageError(
                f"--masks {masks}: {root} is a data set in VOC layout, which has masks of its own; leave the "
                "option out, or give the folder of images alone"
            )
        dataset = read_dataset(root, quiet=True)
        if dataset.class_names != classes:
            raise UsageError(
                f"{root}: its classes are {', '.join(dataset.class_names)}, expected the bundle's, {', '.join(classes)}"
            )
        labelled = spread(dataset.train or dataset.train_images, num_images)
        segmenter = spread(dataset.val or dataset.train_images, SEGMENTER_FACTOR * num_images)
        compared = {item.image for item in (*labelled, *segmenter)}
        others = [item for item in dataset.train_images if item.image not in compared]
        calibration = spread(others or dataset.train_images, CALIBRATION_IMAGES if calibrate else 0)
        sets = (calibration, labelled, segmenter)
        return ImageSets(*(tuple(LabelledImage(i.image, i.classes, i.mask) for i in items) for items in sets))
    corpus = list_images(root).images
    found = []
    for image in corpus:
        mask = masks / f"{image.name}.png" if masks else None
        found.append(LabelledImage(image.path, None, MaskFile(mask) if mask and mask.is_file() else None))
    if masks and not any(image.mask for image in found):
        raise UsageError(f"{masks}: no mask of an image in {root}, expected {corpus[0].name}.png")
    calibration_half = found[::2] if calibrate else []
    compared_half = (found[1::2] if calibrate else found) or found
    return ImageSets(
        spread(calibration_half, CALIBRATION_IMAGES),
        spread(compared_half, num_images),
        spread(compared_half, SEGMENTER_FACTOR * num_images),
    )
