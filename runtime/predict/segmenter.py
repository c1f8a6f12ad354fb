"""The trained segmenter: from an image to its mask."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from multisa.kernels import joint_histogram
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.registry import AUTO, BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image
from multisa.runtime.predict.prediction import DECIMALS, Labels, Prediction, Predictor, StageTimer
from multisa.runtime.predict.uncertainty import histogram_disagreement

UInt8 = npt.NDArray[np.uint8]


class Segmenter(Predictor):
    """Segments images with the trained segmenter of a bundle (DeepLabV3+ by default).

    >>> with Segmenter() as segment:
    ...     result = segment("photo.jpg")
    ...     result.save("mask.png")

    Several threads may call one segmenter at once. Use it as a context manager, or call `close`.
    """

    command = "segment"

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        backend: str = AUTO,
        precision: str = AUTO,
        threads: int | None = None,
        engine_cache: str | Path | None = None,
    ) -> None:
        """Load the segmenter's graph.

        bundle: a bundle or its folder; by default the packaged bundle.
        backend: what runs the graph, one of `multisa.available_backends()`; "auto" takes the first usable.
        precision: "fp32", "fp16", "int8" or "bf16", if bundle and backend support it; "auto" takes fp16 on a
        GPU if the bundle has it, else fp32.
        threads: CPU threads of one call; by default all usable CPUs.
        engine_cache: a folder with TensorRT engines, besides those of the bundle.

        Raises BundleError for a damaged bundle, UsageError for an unknown backend or precision,
        BackendUnavailable or BackendError for a backend that cannot run on this machine.
        """
        request = BackendRequest(backend, precision, Path(engine_cache) if engine_cache else None)
        super().__init__(bundle, (SEGMENTER,), request, threads)

    def __call__(self, image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Prediction:
        """Segment one image.

        image: a path, the bytes of an image file, a PIL image, or RGB as uint8 [H, W, 3]. EXIF orientation
        is applied. The network sees large images at a reduced size; the mask has the full size, [H, W].

        Raises ImageError for an image that cannot be read or has more than `max_pixels`, BackendError if the
        backend fails.
        """
        loaded = load_image(image, max_pixels=max_pixels, long_side=self._long_side)
        (raw,) = self.predict_batch(loaded.rgb[np.newaxis], (None,))
        return self.postprocess(raw, loaded)

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None = None
    ) -> Sequence[tuple[UInt8, UInt8]]:
        """Run the graph on uint8 [N, h, w, 3]. Returns class ids and confidence, uint8 [h, w], of each image.

        Ignores `labels`: the segmenter uses no image-level labels. Raises BackendError.
        """
        with timer.stage("segmenter") if timer else nullcontext():
            outputs = self.backends[0].backend.run(images)
        masks, confidence = outputs["labels"], outputs["confidence"]
        if masks.shape != images.shape[:3] or confidence.shape != images.shape[:3]:
            raise BackendError(
                f"segmenter: got labels {masks.shape} and confidence {confidence.shape}, expected "
                f"{images.shape[:3]} as the images: export the bundle again"
            )
        return list(zip(masks, confidence, strict=True))

    def postprocess(self, raw: tuple[UInt8, UInt8], image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Count the classes of one mask. Raises BackendError for a class that the bundle does not have."""
        mask, confidence = raw
        classes = self._manifest.classes
        histograms = joint_histogram(mask, confidence)
        counts = histograms.sum(axis=1)
        present = np.flatnonzero(counts).tolist()
        if present[-1] >= len(classes):
            raise BackendError(f"segmenter: got class {present[-1]}, expected 0..{len(classes) - 1}")
        histograms = histograms[: len(classes)]
        sums = histograms @ np.arange(256)
        # Mean confidence over the pixels of each class in the mask, including the background.
        scores: dict[str, float] = {}
        for index in present:
            scores[classes[index]] = round(float(sums[index] / counts[index]) / 255, DECIMALS)
        return Prediction(
            working_mask=mask,
            working_confidence=confidence,
            size=image.size,
            classes=tuple(scores)[1:] if present[0] == 0 else tuple(scores),
            manifest=self._manifest,
            disagreement=histogram_disagreement(histograms),
            details={"scores": scores},
            orientation=image.orientation,
            notes=image.notes,
        )
