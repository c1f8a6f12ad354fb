"""Pseudo-masks from image-level labels, with the segmenter or with the random walk."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import numpy.typing as npt

from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, Backend
from multisa.runtime.backends.registry import AUTO, BackendRequest
from multisa.runtime.bundle import Bundle, LabelMethod, Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import ClassNames
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image
from multisa.runtime.predict.postprocess import background_mask, choose_classes, refine, restrict_probabilities
from multisa.runtime.predict.prediction import (
    ClassProbabilities,
    Labelling,
    Labels,
    Prediction,
    Predictor,
    StageTimer,
    as_bundle,
    kernel_errors_as_image_errors,
    timed,
)
from multisa.runtime.predict.segmenter import run_segmenter
from multisa.runtime.predict.uncertainty import no_class_disagreement
from multisa.runtime.predict.walk import open_walk
from multisa.runtime.progress import log

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

# Where no class wins a cell against the background, none has a probability above this.
WINNING = 0.5


class LabelSteps(Protocol):
    """The steps of one method, from images to class probabilities."""

    device: str  # what makes the masks, "cpu" or "gpu"

    def predict_batch(self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None) -> Sequence[Any]:
        """See `PseudoLabeler.predict_batch`."""

    def postprocess(self, raw: Any, rgb: UInt8, timer: StageTimer | None) -> tuple[ClassProbabilities, Labelling]:
        """Turn one result of `predict_batch` into the probabilities of its image, uint8 [h, w, 3]."""


class PseudoLabeler(Predictor):
    """Makes pseudo-masks from image-level labels.

    >>> with PseudoLabeler() as label:
    ...     result = label("photo.jpg", labels=["dog", "person"])

    Method "segmenter": the trained segmenter, restricted to the labels, and dense CRF. Method "walk": Multi-SA
    class activation maps, AffinityNet, random walk and dense CRF. Several threads may call one labeler at once.
    Use it as a context manager, or call `close`.
    """

    command = "label"

    # more than six parameters: all but the first are keyword options
    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        method: LabelMethod | None = None,
        backend: str = AUTO,
        precision: str = AUTO,
        threads: int | None = None,
        engine_cache: str | Path | None = None,
        min_area: float | None = None,
    ) -> None:
        """Load the graphs of the method.

        method: "segmenter" or "walk"; by default the bundle's `label_method`. The other arguments, and errors,
        are those of `Segmenter`. With "walk", if both graphs run as TensorRT engines and the CUDA kernels are
        usable, all steps run on the GPU.
        """
        opened = as_bundle(bundle)
        self.method = opened.manifest.parameters.label_method if method is None else method
        if self.method not in get_args(LabelMethod):
            raise UsageError(f"method: got {method!r}, expected {' or '.join(get_args(LabelMethod))}")
        request = BackendRequest(backend, precision, Path(engine_cache) if engine_cache else None)
        contracts = (SEGMENTER,) if self.method == "segmenter" else (CAM, AFFINITY)
        super().__init__(opened, contracts, request, threads, min_area)
        with ExitStack() as stack:
            stack.callback(super().close)
            self._steps = self._open_steps(stack)
            self._stack = stack.pop_all()
        self.device = self._steps.device
        log.info(f"label method: {self.method}")

    def __call__(
        self, image: ImageInput, labels: Sequence[str] | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> Prediction:
        """Make the pseudo-mask of one image.

        image: a path, the bytes of an image file, a PIL image, or RGB as uint8 [H, W, 3].
        labels: the foreground classes in the image, in any order; an empty sequence for background only; None
        to predict them: method "segmenter" takes the classes that it finds, method "walk" those whose
        classifier score reaches its threshold.

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
        """Run the graphs, and the random walk if any, on uint8 [N, h, w, 3]. Returns one result per image.

        labels: for each image its classes in the bundle's order, or None to predict them. Raises BackendError
        if the outputs of a graph do not have the sizes in the bundle.
        """
        return self._steps.predict_batch(images, labels, timer)

    def postprocess(self, raw: Any, image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Run the dense CRF and choose classes. Raises ImageError if a kernel refuses the image."""
        return self._prediction(image, *self._steps.postprocess(raw, image.rgb, timer))

    def close(self) -> None:
        """Free the memory of the graphs. The labeler cannot be used afterwards."""
        self._stack.close()

    def _open_steps(self, stack: ExitStack) -> LabelSteps:
        backends = [selected.backend for selected in self.backends]
        if self.method == "segmenter":
            return _SegmenterSteps(self._manifest, backends[0])
        return open_walk(self._manifest, backends[0], backends[1], stack)

    def _in_order(self, labels: Sequence[str]) -> Labels:
        if isinstance(labels, (str, Mapping)):
            raise UsageError(f"labels: got {labels!r:.80}, expected a sequence of class names")
        return ClassNames(self._manifest.foreground).resolve(map(str, labels), "labels")


class _SegmenterSteps:
    """Runs the segmenter on any backend, restricts it to the labels, and refines with the dense CRF on the CPU."""

    device = "cpu"

    def __init__(self, manifest: Manifest, segmenter: Backend) -> None:
        self._manifest = manifest
        self._parameters = manifest.parameters.segmenter_label
        self._segmenter = segmenter

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None
    ) -> Sequence[tuple[Float32, Labels | None]]:
        """Returns the class probabilities at stride 4, and the labels, of each image."""
        n_classes = len(self._manifest.classes)
        probabilities = run_segmenter(self._segmenter, images, n_classes, timer)
        if self._parameters.mirror:
            # A call of its own: engines are built for batches of one by default.
            mirrored = run_segmenter(self._segmenter, np.ascontiguousarray(images[:, :, ::-1]), n_classes, timer)
            probabilities = np.float32(0.5) * (probabilities + mirrored[..., ::-1])
        return list(zip(probabilities, labels, strict=True))

    def postprocess(
        self, raw: tuple[Float32, Labels | None], rgb: UInt8, timer: StageTimer | None
    ) -> tuple[ClassProbabilities, Labelling]:
        """See `PseudoLabeler.postprocess`."""
        probabilities, labels = raw
        foreground = self._manifest.foreground
        scores = dict(zip(foreground, probabilities[1:].max(axis=(1, 2)).tolist(), strict=True))
        if labels is None:
            ids = tuple(i for i in np.unique(probabilities.argmax(axis=0)).tolist() if i)
        else:
            ids = tuple(self._manifest.classes.index(name) for name in labels)
        if ids:
            with timed(timer, "crf"), kernel_errors_as_image_errors():
                # Only classes that are known to be there are given more room.
                ratio = 1.0 if labels is None else self._parameters.background_ratio
                restricted = restrict_probabilities(probabilities, ids, ratio)
                refined = refine(rgb, restricted, self._parameters.crf if self._parameters.use_crf else None)
                result = choose_classes(restricted, refined, ids)
        else:
            result = background_mask((rgb.shape[0], rgb.shape[1]))
        disagreement = result.disagreement
        if labels is None and not ids:
            disagreement = no_class_disagreement(scores, dict.fromkeys(foreground, WINNING))
        labels_from = "segmenter" if labels is None else "file"
        chosen = (result.mask, result.levels)
        labelling = Labelling(labels, labels_from, scores, chosen, disagreement)
        return ClassProbabilities((0, *ids), result.probabilities), labelling
