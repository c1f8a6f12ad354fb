"""What a run does with images: `multisa label` and `multisa segment` are each one Method."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from multisa.runtime.backends.registry import SelectedBackend
from multisa.runtime.writers.base import ClassProbabilities

UInt8 = npt.NDArray[np.uint8]
Labels = tuple[str, ...]

DECIMALS = 4  # of every share, score and time in the records


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the engines and the post-processing say about one image at its working size."""

    mask: UInt8  # [h, w] class ids
    confidence: UInt8  # [h, w] of the chosen class, 0..255 for 0..1
    classes: Labels  # that the image shows: as it was said, or as it was found
    missing: Labels = ()  # said to be there, and not in the mask
    disagreement: float = 0.0  # 0..1, how far the ways to look at the image differ
    details: Mapping[str, Any] = field(default_factory=dict)  # further keys of the image's record
    probabilities: ClassProbabilities | None = None


class StageTimer:
    """Seconds of work in each stage, summed over the threads; may be used by several at once."""

    def __init__(self, listener: Callable[[str, float], None] | None = None) -> None:
        """Tell `listener` each time a stage has worked: its name and the seconds."""
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


class Predictor(Protocol):
    """Two steps: the engines, for images of one size at once, and the rest, for each image by itself.

    Both may be called from several threads at once; what they raise as MultisaError is about the images.
    """

    command: str  # "label"
    device: str  # where masks are made, "cpu" or "gpu": their bytes may differ
    backends: Sequence[SelectedBackend]

    def predict_batch(
        self, images: UInt8, given: Sequence[Labels | None], timer: StageTimer
    ) -> Sequence[Any]:
        """Run the graphs on uint8 [N, h, w, 3]; one result for each image, as `refine` takes it.

        given: the classes each image is said to show, None where nothing is said.
        """

    def postprocess(self, inferred: Any, image: UInt8, timer: StageTimer) -> Prediction:
        """Make the annotation of one image, uint8 [h, w, 3]."""
