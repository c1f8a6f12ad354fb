"""The trained segmenter: from an image to its mask."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from multisa.kernels.enlarge import ROUNDING
from multisa.runtime.backends.base import SEGMENTER, Backend
from multisa.runtime.backends.registry import AUTO, BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image
from multisa.runtime.predict.prediction import ClassProbabilities, Labels, Prediction, Predictor, StageTimer

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

STRIDE = 4  # of the probabilities


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
        min_area: float | None = None,
    ) -> None:
        """Load the segmenter's graph.

        bundle: a bundle or its folder; by default the packaged bundle.
        backend: what runs the graph, one of `multisa.available_backends()`; "auto" takes the first usable.
        precision: "fp32", "fp16", "int8" or "bf16", if bundle and backend support it; "auto" takes fp16 on a
        GPU if the bundle has it, else fp32.
        threads: CPU threads of one call; by default all usable CPUs.
        engine_cache: a folder with TensorRT engines, besides those of the bundle.
        min_area: connected parts of the mask with a smaller share of the image take the class around them; 0
        keeps every part; by default the bundle's `min_area`.

        Raises BundleError for a damaged bundle, UsageError for an unknown backend or precision,
        BackendUnavailable or BackendError for a backend that cannot run on this machine.
        """
        request = BackendRequest(backend, precision, Path(engine_cache) if engine_cache else None)
        super().__init__(bundle, (SEGMENTER,), request, threads, min_area)

    def __call__(self, image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Prediction:
        """Segment one image.

        image: a path, the bytes of an image file, a PIL image, or RGB as uint8 [H, W, 3]. EXIF orientation
        is applied. The network sees the image at its working size; the mask has the size of the image, [H, W].

        Raises ImageError for an image that cannot be read or has more than `max_pixels`, BackendError if the
        backend fails.
        """
        loaded = load_image(image, max_pixels=max_pixels, long_side=self._long_side)
        (raw,) = self.predict_batch(loaded.rgb[np.newaxis], (None,))
        return self.postprocess(raw, loaded)

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None = None
    ) -> Sequence[Float32]:
        """Run the graph on uint8 [N, h, w, 3]. Returns the class probabilities of each image, at stride 4.

        Ignores `labels`: the segmenter uses no image-level labels. Raises BackendError and ImageError.
        """
        return list(run_segmenter(self.backends[0].backend, images, len(self._manifest.classes), timer))

    def postprocess(self, raw: Float32, image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Make the prediction from class probabilities, float32 [C, h, w]."""
        return self._prediction(image, ClassProbabilities(tuple(range(len(raw))), raw))


def run_segmenter(backend: Backend, images: UInt8, n_classes: int, timer: StageTimer | None) -> Float32:
    """Run segmenter.onnx on uint8 [N, h, w, 3]: float32 [N, n_classes, ceil(h/4), ceil(w/4)].

    Raises BackendError for an output of another shape, ImageError for values that are no probabilities.
    """
    with timer.stage("segmenter") if timer else nullcontext():
        probabilities: Float32 = backend.run(images)["probabilities"]
    count, height, width = images.shape[:3]
    expected = (count, n_classes, -(-height // STRIDE), -(-width // STRIDE))
    if probabilities.shape != expected:
        raise BackendError(
            f"segmenter: got probabilities {probabilities.shape}, expected {expected} for images of "
            f"{height} x {width} and the bundle's classes: export the bundle again"
        )
    low, high = float(probabilities.min()), float(probabilities.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # or NaN
        raise ImageError(
            f"segmenter: got probabilities from {low} to {high}, expected 0..1: "
            "try precision fp32 or another backend, or export the bundle again"
        )
    return probabilities
