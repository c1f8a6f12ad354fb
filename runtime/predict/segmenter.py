"""The trained segmenter as a method of a run: `multisa segment IMAGES -o OUT`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from multisa.kernels import joint_histogram
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.registry import BackendRequest, SelectedBackend, selected_backends
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError, UsageError
from multisa.runtime.predict.prediction import DECIMALS, Labels, Prediction, StageTimer
from multisa.runtime.predict.uncertainty import histogram_disagreement

UInt8 = npt.NDArray[np.uint8]
LabelsAndConfidence = tuple[UInt8, UInt8]


class Segmenter:
    """Labels and confidence from the graph; what is left to do is to check and to count."""

    command, device = "segment", "cpu"

    def __init__(self, classes: Sequence[str], backends: Sequence[SelectedBackend]) -> None:
        self._classes, self.backends = tuple(classes), backends

    def predict_batch(
        self, images: UInt8, given: Sequence[Labels | None], timer: StageTimer
    ) -> Sequence[LabelsAndConfidence]:
        """Run the segmenter on uint8 [N, h, w, 3]; labels and confidence uint8 [h, w] of each image."""
        with timer.stage("segmenter"):
            outputs = self.backends[0].backend.run(images)
        labels, confidence = outputs["labels"], outputs["confidence"]
        if labels.shape != images.shape[:3]:
            raise BackendError(
                f"segmenter: got labels {labels.shape}, expected the images' size {images.shape[:3]}"
            )
        if confidence.shape != labels.shape:
            raise BackendError(
                f"segmenter: got confidence {confidence.shape}, expected {labels.shape} as the labels"
            )
        return list(zip(labels, confidence, strict=True))

    def postprocess(self, inferred: LabelsAndConfidence, image: UInt8, timer: StageTimer) -> Prediction:
        """The annotation of one image. Raises BackendError for a class that the bundle has not."""
        mask, confidence = inferred
        histograms = joint_histogram(mask, confidence)
        counts = histograms.sum(axis=1)
        present = np.flatnonzero(counts).tolist()
        if present[-1] >= len(self._classes):
            raise BackendError(f"segmenter: got class {present[-1]}, expected 0..{len(self._classes) - 1}")
        histograms = histograms[: len(self._classes)]
        sums = histograms @ np.arange(256)
        means = {self._classes[i]: float(sums[i] / counts[i]) / 255 for i in present}
        return Prediction(
            mask=mask,
            confidence=confidence,
            classes=tuple(self._classes[i] for i in present if i > 0),
            disagreement=histogram_disagreement(histograms),
            # Of each class in the mask, the background too: mean confidence over its pixels.
            details={"scores": {name: round(mean, DECIMALS) for name, mean in means.items()}},
        )


@contextmanager
def open_segmenter(
    bundle: Bundle, request: BackendRequest | None = None, *, probabilities: bool = False
) -> Iterator[Segmenter]:
    """Open the segmenter's engine, chosen and said; close it at the end.

    Raises UsageError where soft maps are asked for, which the graph does not give; BackendUnavailable and
    BackendError for an engine that is not there or cannot run the graph.
    """
    if probabilities:
        raise UsageError(
            "segment has no class probabilities: the graph ends in the argmax; leave out --writer probabilities"
        )
    with selected_backends(bundle, (SEGMENTER,), request) as chosen:
        yield Segmenter(bundle.manifest.classes, chosen)
