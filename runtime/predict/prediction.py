"""The prediction for one image, and the common base of the predictors."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import enlarge_probabilities, histogram, joint_histogram
from multisa.runtime.backends.base import Closeable, GraphContract
from multisa.runtime.backends.registry import BackendRequest, SelectedBackend, open_backends
from multisa.runtime.bundle import Bundle, LabelMethod, Manifest, load_bundle
from multisa.runtime.errors import BackendError, ImageError, UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import MAX_PIXELS, DecodedImage, ImageInput, load_image
from multisa.runtime.imaging.png import display_palette, encode_palette_png, overlay_mask
from multisa.runtime.predict.postprocess import absorb_parts
from multisa.runtime.predict.uncertainty import histogram_disagreement, uncertainty
from multisa.runtime.system import usable_cpus

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Labels = tuple[str, ...]
Value = TypeVar("Value")

DECIMALS = 4  # of every share, score and time in labels.jsonl


class _Once(Generic[Value]):
    """`functools.cached_property` without its lock, by which threads wait for each other before Python 3.12."""

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self._function = function

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]  # of the class, for help()
        value = self._function(instance)
        instance.__dict__[self._function.__name__] = value
        return value


@dataclass(frozen=True, eq=False)
class ClassProbabilities:
    """Class probabilities on a grid, before the argmax."""

    class_ids: tuple[int, ...]  # 0 is the background
    probabilities: Float32  # [len(class_ids), h, w], 0..1

    def choose(self, size: tuple[int, int]) -> tuple[UInt8, UInt8]:
        """Enlarge to `size` bilinearly: ids of the most probable classes, and their probability as 0..255.

        Both are uint8 [H, W].
        """
        return enlarge_probabilities(self.probabilities, size, self.class_ids)


@dataclass(frozen=True, eq=False)
class Labelling:
    """What a pseudo-mask has besides its probabilities."""

    labels: Labels | None  # of the image, from a file or the classifier's scores; None: none but its mask's
    labels_from: str  # "file", "scores" or "segmenter"
    scores: Mapping[str, float]  # of every foreground class, 0..1
    chosen: tuple[UInt8, UInt8]  # mask and confidence at the working size, see `Prediction.working`
    disagreement: float | None = None  # 0..1, between the steps; None: from mask and confidence


@dataclass(frozen=True, eq=False)
class Prediction:
    """The class probabilities of one image, and the mask made from them.

    The networks run at a working size [h, w], whose long side is the bundle's `long_side`, or twice that of the image.
    `mask` and `confidence` have the size of the upright image, [H, W]: the probabilities are enlarged to it on first
    access.
    Mean confidence and disagreement are those at the working size, before small parts are absorbed.
    """

    probabilities: ClassProbabilities  # of `segment` at stride 4; of `label` at the working size
    working_size: tuple[int, int]  # (h, w)
    size: tuple[int, int]  # (H, W) of the upright image
    manifest: Manifest  # of the bundle: names and colours of the classes
    min_area: float = 0.0  # connected parts with a smaller share of the image take the class around them
    labelling: Labelling | None = None  # of pseudo-masks
    orientation: int = 1  # EXIF orientation of the file, 1..8; masks are upright
    notes: tuple[str, ...] = ()  # descriptions of lossy conversions while decoding

    def __repr__(self) -> str:
        height, width = self.size
        return f"Prediction({height}x{width}, classes={self.classes}, uncertainty={self.uncertainty:.2f})"

    @property
    def mask(self) -> UInt8:
        """Class ids, uint8 [H, W]: the most probable class of each pixel, small parts absorbed.

        Raises ImageError for an image with more pixels than the kernels take, as `confidence` does.
        """
        return self._pixels[0]

    @property
    def confidence(self) -> UInt8:
        """Probability of the most probable class, uint8 [H, W], 0..255 for 0..1; also where `mask` has another."""
        return self._pixels[1]

    @property
    def working(self) -> tuple[UInt8, UInt8]:
        """Class ids and confidence at the working size, uint8 [h, w] each, before small parts are absorbed."""
        return self.labelling.chosen if self.labelling else self._chosen

    @property
    def labels(self) -> Labels:
        """The image-level labels; empty if there are none."""
        return self.labelling.labels or () if self.labelling else ()

    @property
    def classes(self) -> Labels:
        """Foreground classes: the image-level labels, if known, else those of the mask."""
        if self.labelling and self.labelling.labels is not None:
            return self.labelling.labels
        return tuple(name for name in self.manifest.foreground if name in self._pixel_counts)

    @property
    def missing(self) -> Labels:
        """Image-level labels that are absent from the mask."""
        return tuple(name for name in self.labels if name not in self._pixel_counts)

    @property
    def mean_confidence(self) -> float:
        """Mean confidence over the pixels at the working size, 0..1."""
        return float(self._histograms.sum(axis=0) @ np.arange(256)) / (255 * self.working[1].size)

    @property
    def disagreement(self) -> float:
        """A part of the uncertainty, 0..1 (`multisa.runtime.predict.uncertainty`)."""
        if self.labelling and self.labelling.disagreement is not None:
            return self.labelling.disagreement
        return histogram_disagreement(self._histograms)

    @property
    def uncertainty(self) -> float:
        """Score in [0, 1] to rank images for review; not a calibrated probability."""
        present = set(self.labels) - set(self.missing)
        return uncertainty(self.mean_confidence, self.disagreement, self.labels, present)

    @property
    def scores(self) -> dict[str, float]:
        """Scores by class, 0..1.

        Of `label`, those of every foreground class. Of `segment`, those of the classes in the mask that have pixels
        at the working size, including the background: the mean confidence over these pixels.
        """
        if self.labelling:
            return dict(self.labelling.scores)
        rows = zip(self.manifest.classes, self._histograms, strict=True)
        found = {name: row for name, row in rows if name in self._pixel_counts and row.any()}
        return {name: float(row @ np.arange(256)) / (255 * int(row.sum())) for name, row in found.items()}

    @property
    def png(self) -> bytes:
        """`mask` as a palette PNG in the bundle's colours, the bytes that `multisa segment` writes."""
        return self._png

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
        colours = display_palette(len(self.manifest.classes))
        return Image.fromarray(overlay_mask(loaded.rgb, self.mask, colours))

    def record(self) -> dict[str, Any]:
        """Return the keys of labels.jsonl that describe the image and its mask, as JSON values."""
        height, width = self.size
        record = {
            "width": width,
            "height": height,
            "orientation": self.orientation,
            "classes": self.classes,
            "missing": self.missing,
            "pixel_shares": {name: round(n / (height * width), DECIMALS) for name, n in self._pixel_counts.items()},
            "confidence": round(self.mean_confidence, DECIMALS),
            "disagreement": round(self.disagreement, DECIMALS),
            "uncertainty": round(self.uncertainty, DECIMALS),
            "scores": {name: round(score, DECIMALS) for name, score in self.scores.items()},
        }
        if self.labelling:
            record["labels_from"] = self.labelling.labels_from
        return {**record, "notes": self.notes} if self.notes else record

    @_Once
    def _chosen(self) -> tuple[UInt8, UInt8]:
        return self.probabilities.choose(self.working_size)

    @_Once
    def _pixels(self) -> tuple[UInt8, UInt8]:
        """Mask and confidence at the size of the image."""
        named = [self.manifest.classes.index(name) for name in self.labels]
        with kernel_errors_as_image_errors():
            mask, confidence = self.working if self.size == self.working_size else self.probabilities.choose(self.size)
            return absorb_parts(mask, self.min_area, named), confidence

    @_Once
    def _png(self) -> bytes:
        return encode_palette_png(self.mask, self.manifest.mask_palette())

    @_Once
    def _pixel_counts(self) -> dict[str, int]:
        """Pixels of each class in the mask, in the order of ids."""
        counts = histogram(self.mask).tolist()
        return {name: count for name, count in zip(self.manifest.classes, counts, strict=False) if count}

    @_Once
    def _histograms(self) -> Int64:
        """For each class of the bundle, how many pixels at the working size have each confidence 0..255."""
        return joint_histogram(*self.working)[: len(self.manifest.classes)].copy()

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


@contextmanager
def kernel_errors_as_image_errors(device_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the errors of a kernel, for example about NaN, into a failure of the image."""
    try:
        yield
    except device_errors as error:
        raise BackendError(f"random walk: cannot be run on the GPU: {error}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"post-processing: {error}") from error


class Predictor(Closeable):
    """The common base of `Segmenter` and `PseudoLabeler`: a bundle, its open graphs, and decoding.

    Several threads may call every method at once. A MultisaError that a method raises concerns only the
    images of that call.
    """

    command: str  # "label" or "segment"
    method: LabelMethod | None = None  # of `label`
    device = "cpu"  # what makes the masks, "cpu" or "gpu"; their bytes may differ

    def __init__(
        self,
        bundle: Bundle | str | Path | None,
        contracts: Sequence[GraphContract],
        request: BackendRequest,
        threads: int | None,
        min_area: float | None,
    ) -> None:
        """Open a backend for each contract.

        None stands for the packaged bundle, for all usable CPUs, and for the bundle's `min_area`.
        """
        if threads is not None and not (isinstance(threads, int) and threads > 0):
            raise UsageError(f"threads: got {threads!r}, expected an integer of at least 1")
        if min_area is not None and not (isinstance(min_area, (int, float)) and 0 <= min_area < 1):
            raise UsageError(f"min_area: got {min_area!r}, expected a share of the image from 0, below 1")
        self._bundle = as_bundle(bundle)
        self._manifest = self._bundle.manifest
        self.min_area = self._manifest.parameters.min_area if min_area is None else min_area
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

    def _prediction(
        self, image: DecodedImage, probabilities: ClassProbabilities, labelling: Labelling | None = None
    ) -> Prediction:
        return Prediction(
            probabilities=probabilities,
            working_size=(image.rgb.shape[0], image.rgb.shape[1]),
            size=image.size,
            manifest=self._manifest,
            min_area=self.min_area,
            labelling=labelling,
            orientation=image.orientation,
            notes=image.notes,
        )


def as_bundle(bundle: Bundle | str | Path | None) -> Bundle:
    """Return a bundle, loaded unless it is one already; None stands for the packaged bundle."""
    return bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
