"""Streaming runs: end to end against the slowest stage alone, and memory over a tenfold corpus.

    python benchmarks/pipeline.py --data VOC_LAYOUT [--segment 10000] [--label 1000]

The corpus repeats the images of a VOC layout as JPEG files in several sizes. Each stage alone runs in as many
threads as in the pipeline, on the same images; stages and runs alternate. segmenting.py and labelling.py
compare with PyTorch. Writes benchmarks/results/pipeline.json.
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.benchmarks.suite.worker_process import run_command
from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.imaging.decode import WorkingImage, decode_working_image
from multisa.runtime.jobs.encoder import Encoder
from multisa.runtime.jobs.snapshot import Work
from multisa.runtime.jobs.spec import Job, RunOptions, make_job
from multisa.runtime.predict.prediction import Labels, Prediction, Predictor, StageTimer
from multisa.runtime.progress import Progress
from multisa.runtime.sources.base import SourceItem
from multisa.runtime.writers.base import WriterContext
from multisa.runtime.writers.registry import open_writers
from multisa.training.data import read_dataset

SCALES = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # of the repeated images
QUALITY = 90
SAMPLE = {"segment": 512, "label": 48}  # images of a stage alone


def make_corpus(folder: Path, originals: Sequence[Path], count: int) -> None:
    """Write `count` JPEGs below `folder`, a thousand per folder: the originals again and again, scaled."""
    if len(list(folder.rglob("*.jpg"))) == count:
        return
    shutil.rmtree(folder, ignore_errors=True)

    def make(index: int) -> None:
        target = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        scale = SCALES[index % len(SCALES)]
        with Image.open(originals[index % len(originals)]) as image:
            size = (round(image.width * scale), round(image.height * scale))
            image.resize(size, Image.Resampling.BICUBIC).save(target, quality=QUALITY)

    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(count, "corpus") as bar:
        for _ in pool.map(make, range(count)):
            bar.advance()


class StagesAlone:
    """The stages of the pipeline, one after the other over the same images, in as many threads each."""

    def __init__(
        self,
        job: Job,
        bundle: Bundle,
        method: Predictor,
        files: Sequence[Path],
        labels: Sequence[Labels | None],
    ) -> None:
        self._method = method
        self._long_side = bundle.manifest.parameters.long_side
        context = WriterContext(job.out, job.command, bundle.manifest, "")
        self._encoder = Encoder(job.out, bundle.manifest, open_writers(job.sinks, context))
        self._max_pixels = job.max_pixels
        self._threads = job.sizes.workers
        self._files = files
        self._labels = labels
        self._clock = StageTimer()

    def images_per_second(self) -> dict[str, float]:
        """Throughput of each stage with nothing else running."""
        rates: dict[str, float] = {}
        data = self._timed(rates, "read", Path.read_bytes, self._files)
        images = self._timed(rates, "decode", self._decode, data)
        inferred = self._timed(rates, "infer", self._infer, list(zip(images, self._labels, strict=True)))
        done = list(zip(images, inferred, strict=True))
        annotations = self._timed(rates, "refine", self._refine, done)
        works = [Work(i, SourceItem(f.name, "", -1), f.stem, None) for i, f in enumerate(self._files)]
        self._timed(rates, "encode", self._encode, list(zip(works, images, annotations, strict=True)))
        return rates

    def _timed(
        self, rates: dict[str, float], name: str, stage: Callable[[Any], Any], inputs: Sequence[Any]
    ) -> list[Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            start = time.perf_counter()
            outputs = list(pool.map(stage, inputs))
            rates[name] = len(inputs) / (time.perf_counter() - start)
        return outputs

    def _decode(self, data: bytes) -> WorkingImage:
        return decode_working_image(data, max_pixels=self._max_pixels, long_side=self._long_side)

    def _infer(self, image_and_labels: tuple[WorkingImage, Labels | None]) -> object:
        image, labels = image_and_labels
        return self._method.infer(image.rgb[np.newaxis], [labels], self._clock)[0]

    def _refine(self, image_and_result: tuple[WorkingImage, object]) -> Prediction:
        image, result = image_and_result
        return self._method.refine(result, image.rgb, self._clock)

    def _encode(self, parts: tuple[Work, WorkingImage, Prediction]) -> object:
        return self._encoder.encode(*parts)


def measure(command: str, options: argparse.Namespace) -> dict[str, Any]:
    """One command: its throughput, its stages alone, memory."""
    bundle = load_bundle(options.bundle)
    work: Path = options.work
    dataset = read_dataset(options.data)
    items = dataset.val if command == "segment" else dataset.train
    count = getattr(options, command)
    corpus = work / f"corpus-{command}"
    small = work / f"corpus-{command}-tenth"
    make_corpus(corpus, [item.image for item in items], count)
    make_corpus(small, [item.image for item in items], count // 10)
    labels = [
        tuple(dataset.class_names[i] for i in items[index % len(items)].classes) for index in range(count)
    ]
    arguments = ["--bundle", str(options.bundle)]
    if command == "label":
        labels_file = work / f"labels-{command}.csv"
        rows = (f"{index:06d}.jpg,{' '.join(names)}" for index, names in enumerate(labels))
        labels_file.write_text("\n".join(["image,labels", *rows]) + "\n", encoding="utf-8")
        arguments += ["--labels", str(labels_file)]

    chosen = sorted(random.Random(0).sample(range(count), min(SAMPLE[command], count)))
    everything = sorted(corpus.rglob("*.jpg"))
    files = [everything[i] for i in chosen]
    given: list[Labels | None] = [labels[i] if command == "label" else None for i in chosen]
    job = make_job(command, str(corpus), work / "out", options.bundle, BackendRequest(), RunOptions())
    alone: dict[str, list[float]] = {}

    def all_stages() -> None:
        with job.open_predictor(bundle) as method:
            for name, rate in StagesAlone(job, bundle, method, files, given).images_per_second().items():
                alone.setdefault(name, []).append(rate)

    all_stages()
    tenth = run_command(command, small, work / "out", *arguments)
    all_stages()
    whole = run_command(command, corpus, work / "out", *arguments)
    all_stages()
    rates = {name: round(statistics.median(values), 2) for name, values in alone.items()}
    slowest = min(rates, key=lambda name: rates[name])
    return {
        "images": whole["images"],
        "failures": whole["failures"],
        "images_per_second": whole["images_per_second"],
        "stages_alone_images_per_second": rates,
        "slowest_stage": slowest,
        "efficiency": round(whole["images_per_second"] / rates[slowest], 3),
        # All stages share the cores: together they cannot be faster than their seconds added up.
        "sum_of_stages_images_per_second": round(1 / sum(1 / rate for rate in rates.values()), 2),
        "peak_mib": {str(run["images"]): round(run["peak_mib"], 1) for run in (tenth, whole)},
        "memory_ratio": round(whole["peak_mib"] / tenth["peak_mib"], 3),
    }


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument(
        "--segment", type=int, default=10_000, metavar="N", help="number of images to segment"
    )
    parser.add_argument("--label", type=int, default=1_000, metavar="N", help="number of images to label")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "multisa-pipeline")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    described = environment("onnxruntime")
    measured = {command: measure(command, options) for command in SAMPLE}
    save_results("pipeline", {"environment": described, **measured}, options.results)


if __name__ == "__main__":
    main()
