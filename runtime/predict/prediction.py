"""The prediction for one image, and the common base of the predictors."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import histogram
from multisa.runtime.backends.base import Closeable, GraphContract
from multisa.runtime.backends.registry import BackendRequest, SelectedBackend, open_backends
from multisa.runtime.bundle import Bundle, Manifest, load_bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image, resize_mask
from multisa.runtime.imaging.png import encode_palette_png, overlay_mask
from multisa.runtime.predict.uncertainty import uncertainty
from multisa.runtime.system import usable_cpus

UInt8 = npt.NDArray[np.uint8]
Float16 = npt.NDArray[np.float16]
Labels = tuple[str, ...]

DECIMALS = 4  # of every share, score and time in labels.jsonl


@dataclass(frozen=True, eq=False)
class ClassProbabilities:
    """Class probabilities before the argmax, at the working size [h, w]."""

    class_ids: tuple[int, ...]  # 0 is the background
    probabilities: Float16  # [len(class_ids), h, w], 0..1


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask of one image, its confidence, and the classes in it.

    The networks run at a working size [h, w], whose long side is at most the bundle's `long_side`. `mask` and
    `confidence` are resized to the size of the upright image, [H, W], on first access.
    """

    working_mask: UInt8  # [h, w] class ids, 0 is the background
    working_confidence: UInt8  # [h, w] probability of the chosen class, 0..255 for 0..1
    size: tuple[int, int]  # (H, W) of the upright image
    classes: Labels  # foreground classes: the image-level labels, if any, else those of the mask
    manifest: Manifest  # of the bundle: names and colours of the classes
    missing: Labels = ()  # image-level labels that are absent from the mask
    disagreement: float = 0.0  # 0..1, between the steps of the prediction (`multisa.runtime.predict.uncertainty`)
    details: Mapping[str, Any] = field(default_factory=dict)  # further keys of `record()`, such as scores
    probabilities: ClassProbabilities | None = None  # if the predictor keeps them
    orientation: int = 1  # EXIF orientation of the file, 1..8; masks are upright
    notes: tuple[str, ...] = ()  # descriptions of lossy conversions while decoding

    def __repr__(self) -> str:
        height, width = self.size
        return f"Prediction({height}x{width}, classes={self.classes}, uncertainty={self.uncertainty:.2f})"

    @cached_property
    def mask(self) -> UInt8:
        """Class ids, uint8 [H, W], resized by nearest neighbour."""
        return resize_mask(self.working_mask, self.size)

    @cached_property
    def confidence(self) -> UInt8:
        """Probability of the chosen class, uint8 [H, W], 0..255 for 0..1, resized by nearest neighbour."""
        return resize_mask(self.working_confidence, self.size)

    @property
    def mean_confidence(self) -> float:
        """Mean confidence over the pixels at the working size, 0..1."""
        levels = int(histogram(self.working_confidence) @ np.arange(256))
        return levels / (255 * self.working_confidence.size)

    @property
    def uncertainty(self) -> float:
        """Score in [0, 1] to rank images for review; not a calibrated probability."""
        present = set(self.classes) - set(self.missing)
        return uncertainty(self.mean_confidence, self.disagreement, self.classes, present)

    @cached_property
    def png(self) -> bytes:
        """`mask` as a palette PNG in the bundle's colours, the bytes that `multisa segment` writes."""
        return encode_palette_png(self.mask, self.manifest.mask_palette()[: len(self.manifest.classes)])

    def save(self, path: str | Path) -> None:
        """Write `png` to `path` atomically. Raises UsageError if the name does not end in .png."""
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise UsageError(f"{target}: expected a file name ending in .png, because masks are palette PNGs")
        write_bytes_atomically(target, self.png)

    def overlay(self, image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Blend the mask into its image and return the result at the image's size, RGB.

        image: the predicted image, in any form that the predictors accept. Raises ImageError for an image
        that cannot be read, UsageError for one whose upright size is not that of the mask.
        """
        loaded = load_image(image, max_pixels=max_pixels, long_side=None)
        if loaded.size != self.size:
            raise UsageError(f"got an image of {loaded.size}, expected {self.size} as the mask (H, W)")
        return Image.fromarray(overlay_mask(loaded.rgb, self.mask, self.manifest.mask_palette()))

    def record(self) -> dict[str, Any]:
        """Return the keys of labels.jsonl that describe the image and its mask, as JSON values."""
        height, width = self.size
        counts = histogram(self.mask)[: len(self.manifest.classes)].tolist()
        pairs = zip(self.manifest.classes, counts, strict=True)
        record = {
            "width": width,
            "height": height,
            "orientation": self.orientation,
            "classes": self.classes,
            "missing": self.missing,
            "pixel_shares": {name: round(n / (height * width), DECIMALS) for name, n in pairs if n},
            "confidence": round(self.mean_confidence, DECIMALS),
            "disagreement": round(self.disagreement, DECIMALS),
            "uncertainty": round(self.uncertainty, DECIMALS),
            **self.details,
        }
        return {**record, "notes": self.notes} if self.notes else record

    def _repr_png_(self) -> bytes:
        """Show the mask in notebooks."""
        return self.png


class StageTimer:
    """Sums the seconds of work per stage over all threads. Thread-safe."""

    def __init__(self, listener: Callable[[str, float], None] | None = None) -> None:
        """Call `listener`, if any, with the name and the seconds after each use of a stage."""
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._listener = listener

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to one stage."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self._listener is not None:
            self._listener(name, seconds)

    def seconds(self) -> dict[str, float]:
        """Return a copy of the sums."""
        with self._lock:
            return dict(self._seconds)


def timed(timer: StageTimer | None, stage: str) -> AbstractContextManager[None]:
    """Return `timer.stage(stage)`, or a context that does nothing if `timer` is None."""
    return nullcontext() if timer is None else timer.stage(stage)


class Predictor(Closeable):
    """The common base of `Segmenter` and `PseudoLabeler`: a bundle, its open graphs, and decoding.

    Several threads may call every method at once. A MultisaError that a method raises concerns only the
    images of that call.
    """

    command: str  # "label" or "segment"
    device = "cpu"  # what makes the masks, "cpu" or "gpu"; their bytes may differ

    def __init__(
        self,
        bundle: Bundle | str | Path | None,
        contracts: Sequence[GraphContract],
        request: BackendRequest,
        threads: int | None,
    ) -> None:
        """Open a backend for each contract. None stands for the packaged bundle and for all usable CPUs."""
        if threads is not None and not (isinstance(threads, int) and threads > 0):
            raise UsageError(f"threads: got {threads!r}, expected an integer of at least 1")
        self._bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self._manifest = self._bundle.manifest
        self._long_side = self._manifest.parameters.long_side
        self._opened = open_backends(self._bundle, contracts, request, threads=threads or usable_cpus())
        self.backends: Sequence[SelectedBackend] = self._opened.backends

    def __repr__(self) -> str:
        backends = ", ".join(f"{selected.backend.name} {selected.precision}" for selected in self.backends)
        return f"{type(self).__name__}({self._bundle!r}, {backends})"

    @property
    def classes(self) -> Labels:
        """Class names in the order of their ids, "background" first."""
        return self._manifest.classes

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
        """Decode the bytes of an image file and resize the image to the working size. Raises ImageError."""
        return load_image(data, max_pixels=max_pixels, long_side=self._long_side)

    @abstractmethod
    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None = None
    ) -> Sequence[Any]:
        """Run the graphs on uint8 [N, h, w, 3]. Returns one result per image, the input of `postprocess`.

        labels: for each image its image-level labels, or None if they are unknown.
        """

    @abstractmethod
    def postprocess(self, raw: Any, image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Turn one result of `predict_batch` into the prediction for the image."""

    def close(self) -> None:
        """Free the memory of the graphs. The predictor cannot be used afterwards."""
        self._opened.close()
