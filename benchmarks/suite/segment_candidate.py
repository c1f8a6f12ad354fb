"""One way to segment, inside its own process: the methods that `segmenting.py` calls there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

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
from multisa.kernels import enlarge_probabilities
from multisa.runtime.backends.base import SEGMENTER, graph_file
from multisa.runtime.bundle import load_bundle
from multisa.runtime.evaluation import mean_iou
from multisa.runtime.imaging.png import UInt8
from multisa.runtime.predict.segmenter import Segmenter
from multisa.runtime.system import usable_cpus

Size = tuple[int, int]


class SegmentCandidate:
    """An opened candidate and the images it is measured on."""

    def __init__(
        self,
        bundle: Path,
        candidate: Candidate,
        engine_cache: Path | None,
        first: Path,
        weights: Path,
        threads: int | None = None,
    ) -> None:
        """Open the candidate and segment the image `first`: this is what start-up includes.

        weights: where `write_weights` wrote the PyTorch networks. threads: of one call; all cores by default.
        """
        self._bundle = load_bundle(bundle)
        self._on_gpu = candidate.device == "cuda"
        self._long_side = self._bundle.manifest.parameters.long_side
        self._loaded: list[UInt8] = []
        # Labels and confidence, [*size] each, of every image of uint8 [N, h, w, 3].
        self.segment: Callable[[UInt8, Size], Sequence[tuple[UInt8, UInt8]]]
        threads = threads or usable_cpus()
        if candidate.is_ours:
            segmenter = Segmenter(
                self._bundle,
                backend=candidate.backend,
                precision=candidate.precision,
                threads=threads,
                engine_cache=engine_cache,
            )
            self.segment = lambda images, size: [
                enlarge_probabilities(each, size) for each in segmenter.predict_batch(images, [None] * len(images))
            ]
            files = self._bundle.manifest.files
            name = graph_file(SEGMENTER, candidate.precision)
            self._model_bytes = files[name if name in files else graph_file(SEGMENTER)].bytes
        else:
            from multisa.benchmarks.suite.pytorch import PyTorchSegmenter

            network = PyTorchSegmenter(self._bundle, candidate, threads, weights)
            self.segment = network.segment
            self._model_bytes = network.model_bytes
        self._at_input_size(read_working(first, self._long_side))

    def load(self, images: Sequence[Path]) -> None:
        """Decode the images that `latencies` and `images_per_second` measure."""
        self._loaded = [read_working(path, self._long_side) for path in images]

    def latencies(self) -> list[float]:
        """Seconds of each loaded image by itself, on all cores."""
        return [_seconds(self._at_input_size, image) for image in self._loaded]

    def batch(self, image: Path, count: int, repeats: int) -> list[float]:
        """Seconds of `count` copies of an image in one call."""
        batch = np.repeat(read_working(image, self._long_side), count, axis=0)
        self._at_input_size(batch)
        return [_seconds(self._at_input_size, batch) for _ in range(repeats)]

    def at_side(self, path: Path, long_side: int, repeats: int) -> tuple[int, list[float]]:
        """Pixels of an image at that long side, and seconds to segment it."""
        image = scaled_to(path, long_side)
        self._at_input_size(image)
        return image[0, :, :, 0].size, [_seconds(self._at_input_size, image) for _ in range(repeats)]

    def sizes(self) -> tuple[int, float | None]:
        """Bytes of the graph's file or of PyTorch's tensors, and the GPU memory of the process in MiB."""
        return self._model_bytes, gpu_memory_mib() if self._on_gpu else None

    def masks(
        self, images: Sequence[LabelledImage], reference: Path | None, is_reference: bool
    ) -> dict[str, float | None]:
        """mIoU in percent, and the share of labels at the images' own size that equal the reference's.

        reference: folder where the reference candidate stores its labels; None compares nothing.
        """
        n_classes = len(self._bundle.manifest.classes)
        confusion = np.zeros((n_classes, n_classes), np.int64)
        same = 0
        pixels = 0
        for image in images:
            rgb, size = read_plainly(image.path, self._long_side)
            labels, _ = self.segment(rgb[np.newaxis], size)[0]
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
            labels, _ = self.segment(rgb[np.newaxis], size)[0]
            write_plainly(labels, out / f"{path.stem}.png")
        return len(images) / (time.perf_counter() - start)

    def images_per_second(self, threads: int, repeats: int) -> float:
        """Throughput on the loaded images, `threads` of them at a time."""
        with ThreadPoolExecutor(threads) as pool:

            def work(images: list[UInt8]) -> None:
                list(pool.map(self._at_input_size, images))

            work(self._loaded)
            seconds = [_seconds(work, self._loaded) for _ in range(repeats)]
        return len(self._loaded) / float(np.median(seconds))

    def _at_input_size(self, images: UInt8) -> Sequence[tuple[UInt8, UInt8]]:
        """Labels and confidence at the size of the images, uint8 [N, H, W, 3]."""
        return self.segment(images, (images.shape[1], images.shape[2]))


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start
