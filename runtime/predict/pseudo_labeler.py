"""Pseudo-masks from image-level labels: class activation maps, affinities, random walk and dense CRF."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import confidence_levels, stencil_offsets
from multisa.runtime.backends.base import AFFINITY, CAM, AsyncBackend, Backend, DeviceBackend
from multisa.runtime.backends.registry import AUTO, BackendRequest, SelectedBackend
from multisa.runtime.bundle import Bundle, Manifest
from multisa.runtime.errors import BackendError, ImageError, UsageError
from multisa.runtime.image_labels import ClassNames, labels_from_scores
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores
from multisa.runtime.predict.prediction import (
    DECIMALS,
    ClassProbabilities,
    Labels,
    Prediction,
    Predictor,
    StageTimer,
    timed,
)
from multisa.runtime.predict.uncertainty import no_class_disagreement, segmenter_disagreement
from multisa.runtime.progress import log

if TYPE_CHECKING:
    from multisa.runtime.gpu.pipeline import GpuPipeline
    from multisa.runtime.gpu.stages import GpuLabels

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


class PseudoLabeler(Predictor):
    """Makes pseudo-masks from image-level labels (Multi-SA CAM, AffinityNet, random walk, dense CRF).

    >>> with PseudoLabeler() as label:
    ...     result = label("photo.jpg", labels=["dog", "person"])

    Several threads may call one labeler at once. Use it as a context manager, or call `close`.
    """

    command = "label"

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        backend: str = AUTO,
        precision: str = AUTO,
        threads: int | None = None,
        engine_cache: str | Path | None = None,
        probabilities: bool = False,
    ) -> None:
        """Load the graphs of the CAM network and of AffinityNet.

        Arguments and errors are those of `Segmenter`. probabilities: keep the class probabilities before the
        argmax in `Prediction.probabilities`. If both graphs run as TensorRT engines and the CUDA kernels are
        usable, all steps run on the GPU.
        """
        request = BackendRequest(backend, precision, Path(engine_cache) if engine_cache else None)
        super().__init__(bundle, (CAM, AFFINITY), request, threads)
        with ExitStack() as stack:
            stack.callback(super().close)
            self._steps = _make_steps(self._manifest, self.backends, stack, probabilities=probabilities)
            self._stack = stack.pop_all()
        self.device = self._steps.device

    def __call__(
        self, image: ImageInput, labels: Sequence[str] | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> Prediction:
        """Make the pseudo-mask of one image.

        image: a path, the bytes of an image file, a PIL image, or RGB as uint8 [H, W, 3].
        labels: the foreground classes in the image, in any order; an empty sequence for background only; None
        to take the classes whose classifier score reaches its threshold.

        Raises UsageError for a label that is not a foreground class of the bundle, ImageError for an image
        that cannot be read or processed or has more than `max_pixels`, BackendError if a backend fails.
        """
        ordered = None if labels is None else self._in_order(labels)
        loaded = load_image(image, max_pixels=max_pixels, long_side=self._long_side)
        (raw,) = self.predict_batch(loaded.rgb[np.newaxis], (ordered,))
        return self.postprocess(raw, loaded)

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None = None
    ) -> Sequence[Any]:
        """Run CAM network, AffinityNet and random walk on uint8 [N, h, w, 3]. Returns one result per image.

        labels: for each image its classes in the bundle's order, or None to take them from the scores. Raises
        BackendError if the outputs of a graph do not have the sizes in the bundle.
        """
        return self._steps.predict_batch(images, labels, timer)

    def postprocess(self, raw: Any, image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Add the background, run dense CRF and argmax. Raises ImageError if a kernel refuses the image."""
        return self._steps.postprocess(raw, image, timer)

    def close(self) -> None:
        """Free the memory of the graphs. The labeler cannot be used afterwards."""
        self._stack.close()

    def _in_order(self, labels: Sequence[str]) -> Labels:
        if isinstance(labels, (str, Mapping)):
            raise UsageError(f"labels: got {labels!r:.80}, expected a sequence of class names")
        return ClassNames(self._manifest.foreground).resolve(map(str, labels), "labels")


def _make_steps(
    manifest: Manifest, backends: Sequence[SelectedBackend], stack: ExitStack, *, probabilities: bool
) -> "_CpuSteps | _GpuSteps":
    """Run the steps on the GPU if both networks and the kernels can run there, else on the CPU."""
    cam, affinity = (selected.backend for selected in backends)
    if isinstance(cam, AsyncBackend) and isinstance(affinity, AsyncBackend):
        from multisa.runtime.gpu.pipeline import open_gpu_pipeline

        pipeline = open_gpu_pipeline(cam, affinity, manifest, probabilities=probabilities)
        if pipeline is not None:
            return _GpuSteps(manifest, stack.enter_context(pipeline))
    return _CpuSteps(manifest, cam, affinity, probabilities=probabilities)


@dataclass(frozen=True, eq=False)
class WalkResult:
    """The state of one image after the graphs and the random walk."""

    classes: Labels
    walked: Float32  # [len(classes), h, w] in [0, 1]
    scores: Mapping[str, float]  # of every foreground class
    labels_from: str  # "file", or "scores"


class _CpuSteps:
    """Runs the graphs on any backend, and random walk, dense CRF and argmax with the CPU kernels."""

    device = "cpu"

    def __init__(self, manifest: Manifest, cam: Backend, affinity: Backend, *, probabilities: bool) -> None:
        self._manifest = manifest
        self._probabilities = probabilities
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

    def postprocess(self, raw: WalkResult, image: DecodedImage, timer: StageTimer | None) -> Prediction:
        parameters = self._manifest.parameters.label
        ids = tuple(self._manifest.classes.index(name) for name in raw.classes)
        with timed(timer, "crf"), _kernel_errors_as_image_errors():
            result = pseudo_mask(image.rgb, raw.walked, ids, parameters)
        present = set(np.unique(result.mask).tolist())
        disagreement = result.disagreement
        if not raw.classes and raw.labels_from == "scores":
            disagreement = no_class_disagreement(raw.scores, self._thresholds)
        probabilities = None
        if self._probabilities:
            probabilities = ClassProbabilities((0, *ids), result.probabilities.astype(np.float16))
        return Prediction(
            working_mask=result.mask,
            working_confidence=confidence_levels(result.confidence),
            size=image.size,
            classes=raw.classes,
            manifest=self._manifest,
            missing=tuple(name for i, name in zip(ids, raw.classes, strict=True) if i not in present),
            disagreement=disagreement,
            details=_details(raw.scores, raw.labels_from),
            probabilities=probabilities,
            orientation=image.orientation,
            notes=image.notes,
        )

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
        with timed(timer, "walk"), _kernel_errors_as_image_errors(self._device_errors):
            return walk_scores(maps[rows], edges, parameters)


class _GpuSteps:
    """Runs all steps on a GPU and downloads only masks and confidences."""

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
        self, raw: "tuple[GpuLabels | ImageError, str]", image: DecodedImage, timer: StageTimer | None
    ) -> Prediction:
        """See `PseudoLabeler.postprocess`. Raises the ImageError that `predict_batch` recorded."""
        labelled, labels_from = raw
        if isinstance(labelled, ImageError):
            raise labelled
        present = set(np.unique(labelled.mask).tolist())
        index = self._manifest.classes.index
        probabilities = None
        if labelled.probabilities is not None:
            ids = (0, *map(index, labelled.classes))
            probabilities = ClassProbabilities(ids, labelled.probabilities)
        return Prediction(
            working_mask=labelled.mask,
            working_confidence=labelled.confidence,
            size=image.size,
            classes=labelled.classes,
            manifest=self._manifest,
            missing=tuple(name for name in labelled.classes if index(name) not in present),
            # The walked scores stay on the GPU, so this uses the mask alone.
            disagreement=segmenter_disagreement(labelled.mask, labelled.confidence),
            details=_details(labelled.scores, labels_from),
            probabilities=probabilities,
            orientation=image.orientation,
            notes=image.notes,
        )


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


@contextmanager
def _kernel_errors_as_image_errors(device_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the errors of a kernel, for example about NaN, into a failure of the image."""
    try:
        yield
    except device_errors as error:
        raise BackendError(f"random walk: cannot be run on the GPU: {error}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"post-processing: {error}") from error


def _details(scores: Mapping[str, float], labels_from: str) -> dict[str, Any]:
    rounded = {name: round(score, DECIMALS) for name, score in scores.items()}
    return {"labels_from": labels_from, "scores": rounded}
