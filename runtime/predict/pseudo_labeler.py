"""Pseudo-masks as a method of a run: class activation maps and affinities to masks.

`multisa label IMAGES -o OUT --labels FILE` does this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import stencil_offsets
from multisa.kernels.label_maps import confidence_levels
from multisa.runtime.backends.base import AFFINITY, CAM, AsyncBackend, Backend, DeviceBackend
from multisa.runtime.backends.registry import BackendRequest, SelectedBackend, selected_backends
from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.image_labels import labels_from_scores
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores
from multisa.runtime.predict.prediction import DECIMALS, Labels, Prediction, StageTimer
from multisa.runtime.predict.uncertainty import no_class_disagreement, segmenter_disagreement
from multisa.runtime.progress import log
from multisa.runtime.writers.base import ClassProbabilities

if TYPE_CHECKING:
    from multisa.runtime.gpu.pipeline import GpuPipeline
    from multisa.runtime.gpu.request import GpuLabels

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WalkResult:
    """One image after the engines and the random walk."""

    classes: Labels
    walked: Float32  # [len(classes), h, w] in [0, 1]
    scores: Mapping[str, float]  # of every foreground class
    labels_from: str  # "file", or "scores"


@dataclass(frozen=True)
class _Affinity:
    """What runs the affinity graph; the errors of the device, if its output stays there for the walk."""

    run: Callable[[UInt8], Mapping[str, Any]]
    device_errors: tuple[type[Exception], ...] = ()


class PseudoLabeler:
    """Which classes, roughly where (cam), spread along affinities (walk), sharpened (dense CRF)."""

    command, device = "label", "cpu"

    def __init__(
        self, manifest: Manifest, backends: Sequence[SelectedBackend], *, probabilities: bool
    ) -> None:
        self.backends = backends
        self._manifest, self._probabilities = manifest, probabilities
        self._thresholds = manifest.parameters.score_thresholds
        self._cam = backends[0].backend
        self._affinity = _affinity_for_the_walk(backends[1].backend, manifest.parameters.label.walk_radius)

    def predict_batch(
        self, images: UInt8, given: Sequence[Labels | None], timer: StageTimer
    ) -> Sequence[WalkResult]:
        """Run cam and affinity on uint8 [N, h, w, 3] and walk."""
        with timer.stage("cam"):
            outputs = self._cam.run(images)
        maps: Float32 = outputs["cam"]
        scores: Float32 = outputs["scores"]
        foreground = self._manifest.foreground
        if maps.shape[1] != len(foreground) or scores.shape[1] != len(foreground):
            raise BackendError(
                f"cam: got {maps.shape[1]} maps, expected one for each of {len(foreground)} classes"
            )
        found = []
        for image, class_maps, class_scores, names in zip(images, maps, scores, given, strict=True):
            named = dict(zip(foreground, class_scores.tolist(), strict=True))
            classes = labels_from_scores(named, self._thresholds) if names is None else names
            walked = self._walk(image, class_maps, classes, timer)
            found.append(WalkResult(classes, walked, named, "scores" if names is None else "file"))
        return found

    def postprocess(self, inferred: WalkResult, image: UInt8, timer: StageTimer) -> Prediction:
        """Background, dense CRF and argmax of one image."""
        parameters = self._manifest.parameters.label
        ids = tuple(self._manifest.classes.index(name) for name in inferred.classes)
        with timer.stage("crf"), _kernel_errors_of_the_image():
            made = pseudo_mask(image, inferred.walked, ids, parameters)
        present = set(np.unique(made.mask).tolist())
        missing = tuple(name for i, name in zip(ids, inferred.classes, strict=True) if i not in present)
        by_scores = not inferred.classes and inferred.labels_from == "scores"
        return Prediction(
            mask=made.mask,
            confidence=confidence_levels(made.confidence),
            classes=inferred.classes,
            missing=missing,
            disagreement=no_class_disagreement(inferred.scores, self._thresholds)
            if by_scores
            else made.disagreement,
            details=_details(inferred.scores, inferred.labels_from),
            probabilities=ClassProbabilities((0, *ids), made.probabilities.astype(np.float16))
            if self._probabilities
            else None,
        )

    def _walk(self, image: UInt8, maps: Float32, classes: Labels, timer: StageTimer) -> Float32:
        parameters, stride = self._manifest.parameters.label, self._manifest.parameters.walk_stride
        if not classes:  # there is nothing to spread
            return np.zeros((0, 1, 1), np.float32)
        with timer.stage("affinity"):
            edges: Float32 = self._affinity.run(image[np.newaxis])["affinity"]  # or an array of the device
        expected = len(stencil_offsets(parameters.walk_radius))
        offsets, grid = edges.shape[1], tuple(edges.shape[2:])
        if offsets != expected:
            raise BackendError(
                f"affinity: got {offsets} offsets, expected {expected} at radius {parameters.walk_radius}"
            )
        wanted = tuple(-(-side // stride) for side in image.shape[:2])
        if grid != wanted:
            raise BackendError(
                f"affinity: got a grid of {grid}, expected {wanted} at stride {stride} of {image.shape[:2]}"
            )
        rows = [self._manifest.foreground.index(name) for name in classes]
        with timer.stage("walk"), _kernel_errors_of_the_image(self._affinity.device_errors):
            return walk_scores(maps[rows], edges, parameters)


class GpuPseudoLabeler:
    """The same where the whole chain stays on a GPU, and masks are what comes back."""

    command, device = "label", "gpu"

    def __init__(
        self,
        manifest: Manifest,
        backends: Sequence[SelectedBackend],
        chain: "GpuPipeline",
        *,
        probabilities: bool,
    ) -> None:
        self.backends = backends
        self._manifest, self._chain, self._probabilities = manifest, chain, probabilities

    def predict_batch(
        self, images: UInt8, given: Sequence[Labels | None], timer: StageTimer
    ) -> "Sequence[tuple[GpuLabels | ImageError, str]]":
        """Label uint8 [N, h, w, 3] on the GPU; where an image fails, its error is in its place."""
        origins = ["scores" if names is None else "file" for names in given]
        return list(zip(self._chain.label(images, given, timer), origins, strict=True))

    def postprocess(
        self, inferred: "tuple[GpuLabels | ImageError, str]", image: UInt8, timer: StageTimer
    ) -> Prediction:
        """Make the annotation of one image. Raises ImageError where the GPU has found one."""
        labelled, labels_from = inferred
        if isinstance(labelled, ImageError):
            raise labelled
        present = set(np.unique(labelled.mask).tolist())
        index = self._manifest.classes.index
        return Prediction(
            mask=labelled.mask,
            confidence=labelled.confidence,
            classes=labelled.classes,
            missing=tuple(name for name in labelled.classes if index(name) not in present),
            # What the walk alone would have said stays on the GPU, so it is the mask's own uncertainty here.
            disagreement=segmenter_disagreement(labelled.mask, labelled.confidence),
            details=_details(labelled.scores, labels_from),
            probabilities=None
            if labelled.probabilities is None
            else ClassProbabilities((0, *map(index, labelled.classes)), labelled.probabilities),
        )


@contextmanager
def open_pseudo_labeler(
    bundle: Bundle, request: BackendRequest | None = None, *, probabilities: bool = False
) -> Iterator[PseudoLabeler | GpuPseudoLabeler]:
    """Open the engines of cam and affinity, chosen and said; close them at the end.

    soft: whether annotations hold the class probabilities. Raises BackendUnavailable and BackendError for an
    engine that is not there or cannot run the graphs.
    """
    with selected_backends(bundle, (CAM, AFFINITY), request) as chosen:
        cam, affinity = chosen[0].backend, chosen[1].backend
        if isinstance(cam, AsyncBackend) and isinstance(affinity, AsyncBackend):
            from multisa.runtime.gpu.pipeline import open_gpu_pipeline

            chain = open_gpu_pipeline(cam, affinity, bundle.manifest, probabilities=probabilities)
            if chain is not None:
                with chain:
                    yield GpuPseudoLabeler(bundle.manifest, chosen, chain, probabilities=probabilities)
                return
        yield PseudoLabeler(bundle.manifest, chosen, probabilities=probabilities)


def _affinity_for_the_walk(backend: Backend, radius: int) -> _Affinity:
    """Leave affinities, by far the largest output, on the device where the walk can run there, too."""
    if not isinstance(backend, DeviceBackend):
        return _Affinity(backend.run)
    from multisa.kernels.cuda import calls
    from multisa.kernels.cuda.limits import MAX_RADIUS
    from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext

    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        log.info(f"the random walk runs on the CPU: {error}")
        return _Affinity(backend.run)
    if radius > MAX_RADIUS:
        return _Affinity(backend.run)
    return _Affinity(backend.run_on_device, device.errors if isinstance(device, PrimaryContext) else ())


@contextmanager
def _kernel_errors_of_the_image(of_the_device: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What a kernel refuses about one image, say NaN from a network, is a failure of that image."""
    try:
        yield
    except of_the_device as error:
        raise BackendError(f"random walk: cannot be run on the GPU: {error}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"post-processing: {error}") from error


def _details(scores: Mapping[str, float], labels_from: str) -> dict[str, Any]:
    rounded = {name: round(score, DECIMALS) for name, score in scores.items()}
    return {"labels_from": labels_from, "scores": rounded}
