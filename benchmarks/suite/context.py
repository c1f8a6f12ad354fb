"""What a run of the suite measures: bundle, data set, backends, and how many images and repeats."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import environment, peaks, roofline_share
from multisa.benchmarks.suite.candidates import Candidate
from multisa.benchmarks.suite.images import LabelledImage, copy_images
from multisa.benchmarks.worker_process import WorkerFailedError, WorkerProcess, run_command
from multisa.kernels import stencil_offsets
from multisa.kernels.common.walk import chebyshev_degree
from multisa.kernels.cpu import native
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.system import usable_cpus
from multisa.training.annotations.base import MaskFile
from multisa.training.data import Dataset, Item, read_dataset

PACKAGES = (
    "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch", "timm", "scipy", "pydensecrf2", "pillow",
    "simplejpeg",
)  # fmt: skip

_PEAK_SECONDS = 0.5  # spent on measuring the peak


@dataclass(frozen=True)
class Effort:
    """How many images and repeats; the defaults are a full run's."""

    latency_images: int = 24  # timed one by one, in `latency_rounds` rounds
    latency_rounds: int = 5
    masks: int = 10_000  # images for mIoU and agreement
    end_to_end: int = 96  # images from file to file, in `end_to_end_rounds` rounds
    end_to_end_rounds: int = 3
    batches: tuple[int, ...] = (1, 2, 4, 8)
    sides: tuple[int, ...] = (256, 512, 768, 1024)  # long sides in pixels
    repeats: int = 5  # of each point of a curve
    labelled: int = 48  # images through the labelling recipes
    is_quick: bool = False  # no dense matrix of kernels; torch.compile only where --backends names it
    # Pixels of the image whose matrix is squared; the networks see it at up to twice that. Cost: the 6th power.
    dense_side: int = 512


QUICK = Effort(8, 3, 32, 24, 3, (1, 4), (256, 512), 3, 9, is_quick=True, dense_side=96)


@dataclass(frozen=True)
class BenchRequest:
    """What the command line asked for."""

    bundle: Path
    data: Path
    backends: Sequence[str] = ()  # empty: all
    engine_cache: Path | None = None
    quick: bool = False


@dataclass(frozen=True)
class BenchContext:
    """Bundle, data set, backends and effort of one run."""

    bundle: Bundle
    dataset: Dataset
    backends: tuple[str, ...]  # empty: all
    engine_cache: Path | None
    effort: Effort
    scratch: Path  # folder for temporary files

    @property
    def long_side(self) -> int:
        """Long side in pixels to which the bundle reduces images."""
        return self.bundle.manifest.parameters.long_side

    @property
    def weights(self) -> Path:
        """Folder of the PyTorch networks' weights."""
        return self.scratch / "weights"

    @cached_property
    def pytorch_problem(self) -> str:
        """Why PyTorch cannot run here; where it is empty, the networks are in `weights`."""
        try:
            with WorkerProcess(write_weights, self.bundle.path, self.weights):
                return ""
        except WorkerFailedError as error:
            return str(error)

    @property
    def val(self) -> list[LabelledImage]:
        """Images with ground truth that no training used."""
        return self._labelled(self.dataset.val)

    @property
    def train(self) -> list[LabelledImage]:
        """Images with image-level labels and ground truth."""
        return [image for image in self._labelled(self.dataset.train) if image.classes]

    def _labelled(self, items: Sequence[Item]) -> list[LabelledImage]:
        names = self.dataset.class_names
        return [
            LabelledImage(item.id, item.image, item.mask.path, tuple(names[i] for i in item.classes))
            for item in items
            if isinstance(item.mask, MaskFile)
        ]

    def run_on_images(
        self, command: str, candidate: Candidate, images: Sequence[LabelledImage], out: Path, *arguments: str
    ) -> dict[str, Any]:
        """Run `multisa COMMAND` on these images with this candidate's backend; see `run_command`."""
        source = copy_images(images, self.scratch / "images")
        words = ["--bundle", str(self.bundle.path), "--backend", candidate.backend]
        words += ["--precision", candidate.precision]
        words += ["--engine-cache", str(self.engine_cache)] if self.engine_cache else []
        return run_command(command, source, out, *words, *arguments)

    def describe(self) -> dict[str, Any]:
        """Everything that figures depend on, as JSON values. Call it before measuring, for the load."""
        return {
            **environment(*PACKAGES, quick=self.effort.is_quick),
            "gpus": [gpu.name for gpu in probe_gpus().gpus],
            "bundle": {"name": self.bundle.manifest.name, "sha256": sha256_of_file(self.bundle.path / MANIFEST_NAME)},
            "data": {
                "name": self.dataset.root.name,
                "images": {"train": len(self.dataset.train), "val": len(self.dataset.val)},
                "digest": self.dataset.masks_digest(self.dataset.train + self.dataset.val),
            },
            "peaks": peaks(),
        }


def write_weights(bundle: Path, folder: Path) -> None:
    """What a worker process runs to write the PyTorch networks' weights; needs torch."""
    from multisa.benchmarks.suite.pytorch import save_weights

    save_weights(bundle, folder)


def make_context(request: BenchRequest, scratch: Path) -> BenchContext:
    """Read the bundle and the data set. Raises UsageError where they do not belong together."""
    bundle = load_bundle(request.bundle)
    dataset = read_dataset(request.data, quiet=True)
    if bundle.manifest.classes != dataset.class_names:
        raise UsageError(
            f"{request.data}: got the classes {', '.join(dataset.class_names)}; expected those of the bundle "
            f"{bundle.path}, {', '.join(bundle.manifest.classes)}: choose another --bundle or --data"
        )
    effort = QUICK if request.quick else Effort()
    context = BenchContext(bundle, dataset, tuple(request.backends), request.engine_cache, effort, scratch)
    if not context.val or not context.train:
        raise UsageError(
            f"{request.data}: got {len(context.val)} val images with masks and {len(context.train)} train "
            "images with masks and labels, expected at least one of each: the suite measures on them"
        )
    return context


@dataclass(frozen=True)
class Roofline:
    """Multiply-adds of one image over what all cores can do per second."""

    seconds: float | None  # None where they cannot be counted: torch is not installed
    problem: str = ""

    def limit(self, candidate: Candidate, seconds: float) -> dict[str, Any] | None:
        """How close `seconds` per image come to the roofline; only for fp32 on the CPU, whose peak is
        measured."""
        if candidate.device != "cpu" or candidate.precision != "fp32":
            return None
        if self.seconds is None:
            return {"roofline_ms": None, "share": None, "text": f"not counted: {self.problem}"}
        text = "multiply-adds alone over the measured float32 peak of all cores"
        return roofline_share(self.seconds, seconds, text)


def peak_of_all_cores() -> float:
    """Measured float32 multiply-adds per second with a thread on every core."""
    cores = usable_cpus()
    with ThreadPoolExecutor(cores) as pool:  # the kernel releases the GIL
        return sum(pool.map(native.peak_multiply_adds, [_PEAK_SECONDS] * cores))


def mean_roofline(context: BenchContext, method: str, inputs: Sequence[object]) -> Roofline:
    """The mean over `inputs`: sizes (height, width) for "segmenting" and "segmenter_labels"; (size, number of
    labelled classes) for "walk_labels", which counts the networks and the walk. The CRF is not counted."""
    if context.pytorch_problem:
        return Roofline(None, context.pytorch_problem)
    try:
        with WorkerProcess(_Counter, context.bundle.path, context.weights) as worker:
            counts = [worker.call(method, given) for given in inputs]
    except WorkerFailedError as error:
        return Roofline(None, str(error))
    return Roofline(sum(counts) / len(counts) / peak_of_all_cores())


class _Counter:
    """Counts the multiply-adds of one image; needs torch."""

    def __init__(self, bundle: Path, weights: Path) -> None:
        from multisa.benchmarks.suite.pytorch import load_affinity, load_cam, load_segmenter
        from multisa.export.cost import cost_of
        from multisa.training.fold import FoldedMultiSACAM

        opened = load_bundle(bundle)
        self._parameters = opened.manifest.parameters
        self._segmenter = load_segmenter(opened, weights)
        self._cam = FoldedMultiSACAM(load_cam(opened, weights))
        self._affinity = load_affinity(opened, weights).backbone
        self._cost_of = cost_of

    def segmenting(self, size: tuple[int, int]) -> int:
        """The segmenter on an image of `size` (height, width)."""
        return self._cost_of(self._segmenter, size).multiply_adds

    def segmenter_labels(self, size: tuple[int, int]) -> int:
        """The segmenter on an image of `size` (height, width), and on its mirror image if the bundle says so."""
        return self.segmenting(size) * (2 if self._parameters.segmenter_label.mirror else 1)

    def walk_labels(self, image: tuple[tuple[int, int], int]) -> int:
        """The folded cam at every scale with its mirror image, affinity, and the walk."""
        (height, width), classes = image
        scaled = [(math.ceil(height * s), math.ceil(width * s)) for s in self._parameters.cam_scales]
        cam = sum(2 * self._cost_of(self._cam, size).multiply_adds for size in scaled)
        affinity = self._cost_of(self._affinity, (height, width)).multiply_adds
        label = self._parameters.label
        stride = self._parameters.walk_stride
        points = -(-height // stride) * -(-width // stride)
        pairs = 2 * len(stencil_offsets(label.walk_radius)) + 1
        return cam + affinity + chebyshev_degree(label.walk_steps) * points * classes * pairs
