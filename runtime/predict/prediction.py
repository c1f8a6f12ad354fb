"""What a predictor returns for one image, and what a run needs of any predictor."""

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

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

DECIMALS = 4  # of every share, score and time in the records


@dataclass(frozen=True, eq=False)
class ClassProbabilities:
    """Class probabilities before the argmax, at the working size."""

    class_ids: tuple[int, ...]  # 0 is the background
    probabilities: Float16  # [len(class_ids), h, w], 0..1


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask of one image, how sure the networks are, and which classes they found.

    Networks see an image at its working size (long side at most that of the bundle). `mask` and `confidence`
    are enlarged to the image's own size, upright, when they are first read.
    """

    working_mask: UInt8  # [h, w] class ids, 0 is the background
    working_confidence: UInt8  # [h, w] probability of the chosen class, 0..255 for 0..1
    size: tuple[int, int]  # (H, W) of the image itself, upright
    classes: Labels  # foreground classes: those given as labels, else those found
    manifest: Manifest  # of the bundle: names and colours of the classes
    missing: Labels = ()  # given as labels and absent from the mask
    disagreement: float = 0.0  # 0..1, how far the steps of the prediction contradict each other
    details: Mapping[str, Any] = field(default_factory=dict)  # further keys of the record
    probabilities: ClassProbabilities | None = None  # only where they were asked for
    orientation: int = 1  # EXIF orientation as found, 1..8; masks are upright
    notes: tuple[str, ...] = ()  # what decoding lost, in words

    @cached_property
    def mask(self) -> UInt8:
        """Class ids, uint8 [H, W], at the image's own size (nearest neighbour)."""
        return resize_mask(self.working_mask, self.size)

    @cached_property
    def confidence(self) -> UInt8:
        """Probability of the chosen class, uint8 [H, W], 0..255 for 0..1, at the image's own size."""
        return resize_mask(self.working_confidence, self.size)

    @property
    def mean_confidence(self) -> float:
        """Mean over the pixels at the working size, 0..1."""
        levels = int(histogram(self.working_confidence) @ np.arange(256))
        return levels / (255 * self.working_confidence.size)

    @property
    def uncertainty(self) -> float:
        """Score in 0..1 to rank images for review; not a calibrated probability."""
        found = set(self.classes) - set(self.missing)
        return uncertainty(self.mean_confidence, self.disagreement, self.classes, found)

    @cached_property
    def png(self) -> bytes:
        """`mask` as a palette PNG in the bundle's colours: the bytes that `multisa segment` writes."""
        return encode_palette_png(self.mask, self.manifest.mask_palette()[: len(self.manifest.classes)])

    def save(self, path: str | Path) -> None:
        """Write `png` to `path`, atomically. Raises UsageError for a name that does not end in .png."""
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise UsageError(f"{target}: expected a file name ending in .png, masks are palette PNGs")
        write_bytes_atomically(target, self.png)

    def overlay(self, image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Lay the mask over the image it was made from, at the image's own size.

        Raises ImageError for an image that cannot be read, UsageError for one of another size.
        """
        loaded = load_image(image, max_pixels=max_pixels, long_side=None)
        if loaded.size != self.size:
            raise UsageError(f"got an image of {loaded.size}, expected {self.size} as the mask (H, W)")
        return Image.fromarray(overlay_mask(loaded.rgb, self.mask, self.manifest.mask_palette()))

    def record(self) -> dict[str, Any]:
        """The keys of a line of labels.jsonl that are about the image and its mask, as JSON values."""
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
        """How notebooks show a prediction."""
        buffer = io.BytesIO()
        Image.open(io.BytesIO(self.png)).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()


class StageTimer:
    """Seconds of work in each stage, summed over the threads; may be used by several at once."""

    def __init__(self, listener: Callable[[str, float], None] | None = None) -> None:
        """`listener` is called with the name and the seconds each time a stage has worked."""
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._listener = listener

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add to one stage."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self._listener is not None:
            self._listener(name, seconds)

    def seconds(self) -> dict[str, float]:
        """A copy of the sums."""
        with self._lock:
            return dict(self._seconds)


def timed(timer: StageTimer | None, stage: str) -> AbstractContextManager[None]:
    """The stage of a timer; without a timer a context that does nothing."""
    return nullcontext() if timer is None else timer.stage(stage)


class Predictor(Protocol):
    """What a run needs of `Segmenter` and `PseudoLabeler`; each method may be called from several threads.

    What they raise as MultisaError is about the images given, and about no others.
    """

    command: str  # "label" or "segment"
    backends: Sequence[SelectedBackend]

    @property
    def device(self) -> str:
        """Where masks are made, "cpu" or "gpu": their bytes may differ."""

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
        """Decode an image file and reduce it to the working size. Raises ImageError."""

    def predict_batch(
        self, images: UInt8, labels: Sequence[Labels | None], timer: StageTimer | None = None
    ) -> Sequence[Any]:
        """Run the graphs on uint8 [N, h, w, 3]; returns one result an image, as `postprocess` takes it.

        labels: for each image the classes it is known to show, or None where nothing is known.
        """

    def postprocess(self, raw: Any, image: DecodedImage, timer: StageTimer | None = None) -> Prediction:
        """Turn one result of `predict_batch` into the image's prediction."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class BundlePredictor(Closeable):
    """What `Segmenter` and `PseudoLabeler` share: a bundle, its open graphs, and how images are decoded."""

    def __init__(
        self,
        bundle: Bundle | str | Path | None,
        contracts: Sequence[GraphContract],
        request: BackendRequest,
        threads: int | None,
    ) -> None:
        """Open a backend for each contract; the packaged bundle, and all usable CPUs, where None is given."""
        self._bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self._manifest = self._bundle.manifest
        self._long_side = self._manifest.parameters.long_side
        self._opened = open_backends(self._bundle, contracts, request, threads=threads or usable_cpus())
        self.backends: Sequence[SelectedBackend] = self._opened.backends

    @property
    def classes(self) -> Labels:
        """Names of the classes in the order of their ids, "background" first."""
        return self._manifest.classes

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
        """Decode an image file and reduce it to the working size. Raises ImageError."""
        return load_image(data, max_pixels=max_pixels, long_side=self._long_side)

    def close(self) -> None:
        """Free the memory of the graphs; calls are an error afterwards."""
        self._opened.close()
