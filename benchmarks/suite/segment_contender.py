"""One way to segment, inside its own process: what `segmenting.py` calls there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from multisa.benchmarks.suite.contender import Contender
from multisa.benchmarks.suite.gpu_memory import gpu_mib_of_this_process
from multisa.benchmarks.suite.plain import read_plainly, write_plainly
from multisa.benchmarks.suite.sample import Photograph, count_confusion, read_working, scaled_to
from multisa.runtime.backends.base import SEGMENTER, graph_file
from multisa.runtime.backends.registry import BackendRequest, select_backend
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.system import usable_cpus

UInt8 = npt.NDArray[np.uint8]


class Runner(Protocol):
    """Runs the segmenter; what every contender is once it is open."""

    model_bytes: int

    def labels(self, images: UInt8) -> UInt8:
        """Labels uint8 [N, H, W] of uint8 [N, H, W, 3]."""

    def side_by_side(self) -> bool:
        """Let images run on one thread each from now on; False where that is not possible."""

    def device_mib(self) -> float | None:
        """MiB of the GPU that the process holds now; None without one."""


class EngineRunner:
    """An engine of the runtime."""

    def __init__(self, bundle: Bundle, contender: Contender, threads: int, plans: Path | None) -> None:
        self._bundle = bundle
        self._request = BackendRequest(contender.backend, contender.precision, plans)
        self._on_gpu = contender.device == "cuda"
        self._engine = select_backend(bundle, SEGMENTER, self._request, threads=threads).backend
        files = bundle.manifest.files
        name = graph_file(SEGMENTER, contender.precision)
        self.model_bytes = files[name if name in files else graph_file(SEGMENTER)].bytes

    def labels(self, images: UInt8) -> UInt8:
        """See `Runner`."""
        return np.asarray(self._engine.run(images)["labels"], np.uint8)

    def side_by_side(self) -> bool:
        """See `Runner`: as a run of many images opens it, one thread for each call."""
        if self._on_gpu:
            return False
        self._engine.close()
        self._engine = select_backend(self._bundle, SEGMENTER, self._request, threads=1).backend
        return True

    def device_mib(self) -> float | None:
        """See `Runner`."""
        return gpu_mib_of_this_process() if self._on_gpu else None


class SegmentContender:
    """A contender that is open, and the photographs that it is measured on."""

    def __init__(
        self, bundle: Path, contender: Contender, plans: Path | None, first: Path, states: Path
    ) -> None:
        """Open it and segment the photograph `first`: what starting it takes.

        states: where `eager_state.States` wrote PyTorch's networks.
        """
        self._bundle, self._cores = load_bundle(bundle), usable_cpus()
        self._long_side = self._bundle.manifest.parameters.long_side
        self._runner = _open(self._bundle, contender, self._cores, plans, states)
        self._loaded: list[UInt8] = []
        self._runner.labels(read_working(first, self._long_side))

    def load(self, photographs: Sequence[Path]) -> None:
        """Decode these photographs; `latencies` and `images_per_second` are of them."""
        self._loaded = [read_working(path, self._long_side) for path in photographs]

    def latencies(self) -> list[float]:
        """Seconds of each photograph by itself, on all cores."""
        return [_seconds(partial(self._runner.labels, image)) for image in self._loaded]

    def batch(self, photographs: Sequence[Path], repeats: int) -> list[float]:
        """Seconds of all these photographs, of one size, at once."""
        images = np.concatenate([read_working(path, self._long_side) for path in photographs])
        self._runner.labels(images)
        return [_seconds(lambda: self._runner.labels(images)) for _ in range(repeats)]

    def at_side(self, photograph: Path, long_side: int, repeats: int) -> tuple[int, list[float]]:
        """Pixels of a photograph at that long side, and seconds for it."""
        image = scaled_to(photograph, long_side)
        self._runner.labels(image)
        return image[0, :, :, 0].size, [_seconds(lambda: self._runner.labels(image)) for _ in range(repeats)]

    def model_bytes(self) -> int:
        """Of the file that is run, or of PyTorch's tensors."""
        return self._runner.model_bytes

    def device_mib(self) -> float | None:
        """MiB of the GPU that the process holds now."""
        return self._runner.device_mib()

    def masks(
        self, photographs: Sequence[Photograph], reference: Path | None, is_reference: bool
    ) -> dict[str, float | None]:
        """mIoU in percent, and the share of labels at the working size that are the reference's.

        The reference leaves its labels in that folder; without one nothing is compared.
        """
        n_classes = len(self._bundle.manifest.classes)
        confusion, same, pixels = np.zeros((n_classes, n_classes), np.int64), 0, 0
        for photograph in photographs:
            labels = self._runner.labels(read_working(photograph.image, self._long_side))[0]
            confusion += count_confusion(labels, photograph.mask, n_classes)
            pixels += labels.size
            if reference is not None:
                kept = reference / f"{photograph.id}.npy"
                if is_reference:
                    np.save(kept, labels, allow_pickle=False)
                same += int((np.load(kept, allow_pickle=False) == labels).sum())
        agreement = None if reference is None else round(same / pixels, 6)
        return {"miou": round(100 * mean_iou(confusion), 3), "label_agreement": agreement}

    def loop(self, photographs: Sequence[Path], out: Path) -> float:
        """Images a second from file to file in a plain loop: Pillow reads, resizes and writes."""
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        for path in photographs:
            image, size = read_plainly(path, self._long_side)
            write_plainly(self._runner.labels(image[np.newaxis])[0], size, out / f"{path.stem}.png")
        return len(photographs) / (time.perf_counter() - start)

    def images_per_second(self, repeats: int) -> float:
        """The loaded photographs, as fast as all cores segment them: one after the other, or side by side.

        Nothing else is measured afterwards: one that can runs on one thread each from here on.
        """
        best = self._rate(lambda: [self._runner.labels(image) for image in self._loaded], repeats)
        if self._runner.side_by_side():
            with ThreadPoolExecutor(self._cores) as pool:
                best = max(
                    best, self._rate(lambda: list(pool.map(self._runner.labels, self._loaded)), repeats)
                )
        return best

    def _rate(self, work: Callable[[], object], repeats: int) -> float:
        work()
        return len(self._loaded) / float(np.median([_seconds(work) for _ in range(repeats)]))


def _open(bundle: Bundle, contender: Contender, threads: int, plans: Path | None, states: Path) -> Runner:
    if contender.is_ours:
        return EngineRunner(bundle, contender, threads, plans)
    from multisa.benchmarks.suite.eager import EagerSegmenter

    return EagerSegmenter(bundle, contender, threads, states)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
