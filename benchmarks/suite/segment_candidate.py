"""One way to segment, inside its own process: the methods that `segmenting.py` calls there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from multisa.benchmarks.harness import gpu_memory_mib
from multisa.benchmarks.suite.candidates import Candidate
from multisa.benchmarks.suite.images import (
    LabelledImage,
    count_confusion,
    read_plainly,
    read_working,
    scaled_to,
    write_plainly,
)
from multisa.runtime.backends.base import SEGMENTER, graph_file
from multisa.runtime.backends.registry import BackendRequest, select_backend
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.system import usable_cpus

if TYPE_CHECKING:
    from multisa.benchmarks.suite.pytorch import PyTorchSegmenter

UInt8 = npt.NDArray[np.uint8]


class BackendRunner:
    """A backend of the runtime, with the methods of `PyTorchSegmenter`."""

    def __init__(self, bundle: Bundle, candidate: Candidate, threads: int, engine_cache: Path | None) -> None:
        self._bundle = bundle
        self._request = BackendRequest(candidate.backend, candidate.precision, engine_cache)
        self._on_gpu = candidate.device == "cuda"
        self._backend = select_backend(bundle, SEGMENTER, self._request, threads=threads).backend
        files = bundle.manifest.files
        name = graph_file(SEGMENTER, candidate.precision)
        self.model_bytes = files[name if name in files else graph_file(SEGMENTER)].bytes

    def labels(self, images: UInt8) -> UInt8:
        """Labels uint8 [N, H, W] of uint8 [N, H, W, 3]."""
        return np.asarray(self._backend.run(images)["labels"], np.uint8)

    def use_one_thread_per_image(self) -> bool:
        if self._on_gpu:
            return False
        self._backend.close()
        self._backend = select_backend(self._bundle, SEGMENTER, self._request, threads=1).backend
        return True

    def device_mib(self) -> float | None:
        return gpu_memory_mib() if self._on_gpu else None


class SegmentCandidate:
    """An opened candidate and the images it is measured on."""

    def __init__(
        self, bundle: Path, candidate: Candidate, engine_cache: Path | None, first: Path, weights: Path
    ) -> None:
        """Open the candidate and segment the image `first`: this is what start-up includes.

        weights: where `WeightFiles` wrote the PyTorch networks.
        """
        self._bundle = load_bundle(bundle)
        self._cores = usable_cpus()
        self._long_side = self._bundle.manifest.parameters.long_side
        self._runner = _open(self._bundle, candidate, self._cores, engine_cache, weights)
        self._loaded: list[UInt8] = []
        self._runner.labels(read_working(first, self._long_side))

    def load(self, images: Sequence[Path]) -> None:
        """Decode the images that `latencies` and `images_per_second` measure."""
        self._loaded = [read_working(path, self._long_side) for path in images]

    def latencies(self) -> list[float]:
        """Seconds of each loaded image by itself, on all cores."""
        return [_seconds(partial(self._runner.labels, image)) for image in self._loaded]

    def batch(self, images: Sequence[Path], repeats: int) -> list[float]:
        """Seconds of all these images, which have one size, in one call."""
        batch = np.concatenate([read_working(path, self._long_side) for path in images])
        self._runner.labels(batch)
        return [_seconds(lambda: self._runner.labels(batch)) for _ in range(repeats)]

    def at_side(self, path: Path, long_side: int, repeats: int) -> tuple[int, list[float]]:
        """Pixels of an image at that long side, and seconds to segment it."""
        image = scaled_to(path, long_side)
        self._runner.labels(image)
        return image[0, :, :, 0].size, [_seconds(lambda: self._runner.labels(image)) for _ in range(repeats)]

    def model_bytes(self) -> int:
        """Size of the graph's file, or of PyTorch's tensors."""
        return self._runner.model_bytes

    def device_mib(self) -> float | None:
        """GPU memory of the process in MiB."""
        return self._runner.device_mib()

    def masks(
        self, images: Sequence[LabelledImage], reference: Path | None, is_reference: bool
    ) -> dict[str, float | None]:
        """mIoU in percent, and the share of labels at the working size that equal the reference's.

        reference: folder where the reference candidate stores its labels; None compares nothing.
        """
        n_classes = len(self._bundle.manifest.classes)
        confusion = np.zeros((n_classes, n_classes), np.int64)
        same = 0
        pixels = 0
        for image in images:
            labels = self._runner.labels(read_working(image.path, self._long_side))[0]
            confusion += count_confusion(labels, image.mask, n_classes)
            pixels += labels.size
            if reference is not None:
                kept = reference / f"{image.id}.npy"
                if is_reference:
                    np.save(kept, labels, allow_pickle=False)
                same += int((np.load(kept, allow_pickle=False) == labels).sum())
        agreement = None if reference is None else round(same / pixels, 6)
        return {"miou": round(100 * mean_iou(confusion), 3), "label_agreement": agreement}

    def loop(self, images: Sequence[Path], out: Path) -> float:
        """Images per second from file to file in a plain loop: Pillow reads, resizes and writes."""
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        for path in images:
            rgb, size = read_plainly(path, self._long_side)
            write_plainly(self._runner.labels(rgb[np.newaxis])[0], size, out / f"{path.stem}.png")
        return len(images) / (time.perf_counter() - start)

    def images_per_second(self, repeats: int) -> float:
        """Best throughput of all cores on the loaded images: one after the other, or one thread per image.

        Call it last: afterwards a CPU candidate runs on one thread per image.
        """
        best = self._rate(lambda: [self._runner.labels(image) for image in self._loaded], repeats)
        if self._runner.use_one_thread_per_image():
            with ThreadPoolExecutor(self._cores) as pool:
                rate = self._rate(lambda: list(pool.map(self._runner.labels, self._loaded)), repeats)
                best = max(best, rate)
        return best

    def _rate(self, work: Callable[[], object], repeats: int) -> float:
        work()
        return len(self._loaded) / float(np.median([_seconds(work) for _ in range(repeats)]))


def _open(
    bundle: Bundle, candidate: Candidate, threads: int, engine_cache: Path | None, weights: Path
) -> "BackendRunner | PyTorchSegmenter":
    if candidate.is_ours:
        return BackendRunner(bundle, candidate, threads, engine_cache)
    from multisa.benchmarks.suite.pytorch import PyTorchSegmenter

    return PyTorchSegmenter(bundle, candidate, threads, weights)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
