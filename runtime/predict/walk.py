"""Method "walk": class activation maps, affinities, random walk and dense CRF, on the CPU or on a GPU."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import stencil_offsets
from multisa.runtime.backends.base import AsyncBackend, Backend, DeviceBackend
from multisa.runtime.bundle import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.image_labels import labels_from_scores
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores
from multisa.runtime.predict.prediction import (
    ClassProbabilities,
    Labelling,
    Labels,
    StageTimer,
    kernel_errors_as_image_errors,
    timed,
)
from multisa.runtime.predict.uncertainty import no_class_disagreement
from multisa.runtime.progress import log

if TYPE_CHECKING:
    from multisa.runtime.gpu.pipeline import GpuPipeline
    from multisa.runtime.gpu.stages import GpuLabels

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def open_walk(manifest: Manifest, cam: Backend, affinity: Backend, stack: ExitStack) -> "CpuWalk | GpuWalk":
    """Run the steps on the GPU if both networks and the kernels can run there, else on the CPU.

    stack: closes what is opened here.
    """
    if isinstance(cam, AsyncBackend) and isinstance(affinity, AsyncBackend):
        from multisa.runtime.gpu.pipeline import open_gpu_pipeline

        pipeline = open_gpu_pipeline(cam, affinity, manifest)
        if pipeline is not None:
            return GpuWalk(manifest, stack.enter_context(pipeline))
    return CpuWalk(manifest, cam, affinity)


@dataclass(frozen=True, eq=False)
class WalkResult:
    """The state of one image after the graphs and the random walk."""

    classes: Labels
    walked: Float32  # [len(classes), h, w] in [0, 1]
    scores: Mapping[str, float]  # of every foreground class
    labels_from: str  # "file", or "scores"


class CpuWalk:
    """Runs the graphs on any backend, and random walk, dense CRF and argmax with the CPU kernels."""

    device = "cpu"

    def __init__(self, manifest: Manifest, cam: Backend, affinity: Backend) -> None:
        self._manifest = manifest
        self._thresholds = manifest.parameters.score_thresholds
        self._cam = cam
        radius = manifest.parameters.label.walk_radius
        self._run_affinity, self._device_errors = _affinity_for_the_walk(affinity, radius)

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None
    ) -> Sequence[WalkResult]:
        with timed(timer, "cam"):
            outputs = self._cam.run(images)
        maps: Float32 = outputs["cam"]
        scores: Float32 = outputs["scores"]
        foreground = self._manifest.foreground
        if maps.shape[1] != len(foreground) or scores.shape[1] != len(foreground):
            raise BackendError(f"cam: got {maps.shape[1]} maps, expected one for each of {len(foreground)} classes")
        results = []
        for image, class_maps, class_scores, names in zip(images, maps, scores, labels, strict=True):
            named = dict(zip(foreground, class_scores.tolist(), strict=True))
            classes = labels_from_scores(named, self._thresholds) if names is None else names
            walked = self._walk(image, class_maps, classes, timer)
            results.append(WalkResult(classes, walked, named, "scores" if names is None else "file"))
        return results

    def postprocess(
        self, raw: WalkResult, rgb: UInt8, timer: StageTimer | None
    ) -> tuple[ClassProbabilities, Labelling]:
        """Add the background, run the dense CRF and choose classes."""
        parameters = self._manifest.parameters.label
        ids = tuple(self._manifest.classes.index(name) for name in raw.classes)
        with timed(timer, "crf"), kernel_errors_as_image_errors():
            result = pseudo_mask(rgb, raw.walked, ids, parameters)
        disagreement = result.disagreement
        if not raw.classes and raw.labels_from == "scores":
            disagreement = no_class_disagreement(raw.scores, self._thresholds)
        chosen = (result.mask, result.levels)
        labelling = Labelling(raw.classes, raw.labels_from, raw.scores, chosen, disagreement)
        return ClassProbabilities((0, *ids), result.probabilities), labelling

    def _walk(self, image: UInt8, maps: Float32, classes: Labels, timer: StageTimer | None) -> Float32:
        parameters, stride = self._manifest.parameters.label, self._manifest.parameters.walk_stride
        if not classes:  # nothing to spread
            return np.zeros((0, 1, 1), np.float32)
        with timed(timer, "affinity"):
            edges: Float32 = self._run_affinity(image[np.newaxis])["affinity"]  # or a device array
        expected = len(stencil_offsets(parameters.walk_radius))
        offsets, grid = edges.shape[1], tuple(edges.shape[2:])
        if offsets != expected:
            raise BackendError(
                f"affinity: got {offsets} offsets, expected {expected} at radius {parameters.walk_radius}"
            )
        strided = tuple(-(-side // stride) for side in image.shape[:2])
        if grid != strided:
            raise BackendError(
                f"affinity: got a grid of {grid}, expected {strided} at stride {stride} of {image.shape[:2]}"
            )
        rows = [self._manifest.foreground.index(name) for name in classes]
        with timed(timer, "walk"), kernel_errors_as_image_errors(self._device_errors):
            return walk_scores(maps[rows], edges, parameters)


class GpuWalk:
    """Runs all steps on a GPU and downloads masks, confidences and class probabilities."""

    device = "gpu"

    def __init__(self, manifest: Manifest, pipeline: "GpuPipeline") -> None:
        self._manifest = manifest
        self._pipeline = pipeline

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None
    ) -> "Sequence[tuple[GpuLabels | ImageError, str]]":
        """See `PseudoLabeler.predict_batch`. The result of a failed image is its error."""
        origins = ["scores" if names is None else "file" for names in labels]
        return list(zip(self._pipeline.label(images, labels, timer), origins, strict=True))

    def postprocess(
        self, raw: "tuple[GpuLabels | ImageError, str]", rgb: UInt8, timer: StageTimer | None
    ) -> tuple[ClassProbabilities, Labelling]:
        """See `PseudoLabeler.postprocess`. Raises the ImageError that `predict_batch` recorded."""
        labelled, labels_from = raw
        if isinstance(labelled, ImageError):
            raise labelled
        ids = (0, *map(self._manifest.classes.index, labelled.classes))
        # The walked scores stay on the GPU, so the disagreement is that of mask and confidence alone.
        chosen = (labelled.mask, labelled.confidence)
        labelling = Labelling(labelled.classes, labels_from, labelled.scores, chosen)
        return ClassProbabilities(ids, labelled.probabilities.astype(np.float32)), labelling


def _affinity_for_the_walk(
    backend: Backend, radius: int
) -> tuple[Callable[[UInt8], Mapping[str, Any]], tuple[type[Exception], ...]]:
    """Return a function that runs the affinity graph, and the errors of the device that keeps its output.

    Affinities, by far the largest output, stay on the device if the walk can run there too.
    """
    if not isinstance(backend, DeviceBackend):
        return backend.run, ()
    from multisa.kernels.cuda import calls
    from multisa.kernels.cuda.device import MAX_RADIUS
    from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext

    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        log.info(f"the random walk runs on the CPU: {error}")
        return backend.run, ()
    if radius > MAX_RADIUS:
        return backend.run, ()
    return backend.run_on_device, device.errors if isinstance(device, PrimaryContext) else ()
