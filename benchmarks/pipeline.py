"""Streaming runs: end to end against the slowest stage alone, and memory over a tenfold corpus.

    python benchmarks/pipeline.py --data VOC_LAYOUT [--segment 10000] [--label 1000]

The corpus repeats the images of a VOC layout as JPEG files in several sizes. Each stage alone runs in a
thread per CPU, as in a run, on the same images; stages and runs alternate. `multisa bench`
compares with PyTorch. Writes benchmarks/results/pipeline.json.
"""

import argparse
import random
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
from multisa.benchmarks.worker_process import run_command
from multisa.runtime.predict.prediction import Labels
from multisa.runtime.predict.pseudo_labeler import PseudoLabeler
from multisa.runtime.predict.segmenter import Segmenter
from multisa.runtime.progress import Progress
from multisa.runtime.system import usable_cpus
from multisa.training.data import read_dataset

SCALES = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # of the repeated images
QUALITY = 90
SAMPLE = {"segment": 512, "label": 48}  # images of a stage alone


def make_corpus(folder: Path, originals: Sequence[Path], count: int) -> None:
    """Write `count` JPEGs below `folder`, a thousand per folder: the originals again and again, scaled."""

    def make(index: int) -> None:
        target = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        scale = SCALES[index % len(SCALES)]
        with Image.open(originals[index % len(originals)]) as image:
            size = (round(image.width * scale), round(image.height * scale))
            image.resize(size, Image.Resampling.BICUBIC).save(target, quality=QUALITY)

    with ThreadPoolExecutor(usable_cpus()) as pool, Progress(count, "corpus") as bar:
        for _ in pool.map(make, range(count)):
            bar.advance()


def stages_alone(
    predictor: Segmenter | PseudoLabeler, files: Sequence[Path], labels: Sequence[Labels | None]
) -> dict[str, float]:
    """Images per second of each stage with nothing else running, one stage after the other."""
    rates: dict[str, float] = {}

    def timed(name: str, stage: Callable[..., Any], *inputs: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(usable_cpus()) as pool:
            start = time.perf_counter()
            outputs = list(pool.map(stage, *inputs))
            rates[name] = len(files) / (time.perf_counter() - start)
        return outputs

    data = timed("read", Path.read_bytes, files)
    images = timed("decode", predictor.decode, data)
    raw = timed("infer", lambda i, names: predictor.predict_batch(i.rgb[np.newaxis], [names])[0], images, labels)
    predictions = timed("refine", predictor.postprocess, raw, images)
    timed("encode", lambda prediction: prediction.png, predictions)
    return rates


def measure(command: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One command: its throughput, its stages alone, memory."""
    dataset = read_dataset(options.data)
    items = dataset.val if command == "segment" else dataset.train
    count = getattr(options, command)
    corpora = {count // 10: work / f"corpus-{command}-tenth", count: work / f"corpus-{command}"}
    for size, folder in corpora.items():
        make_corpus(folder, [item.image for item in items], size)
    labels = [tuple(dataset.class_names[i] for i in items[k % len(items)].classes) for k in range(count)]
    arguments = ["--bundle", str(options.bundle)]
    if command == "label":
        labels_file = work / "labels.csv"
        rows = (f"{index:06d}.jpg,{' '.join(names)}" for index, names in enumerate(labels))
        labels_file.write_text("\n".join(["image,labels", *rows]) + "\n", encoding="utf-8")
        arguments += ["--labels", str(labels_file)]
    chosen = sorted(random.Random(0).sample(range(count), min(SAMPLE[command], count)))
    everything = sorted(corpora[count].rglob("*.jpg"))
    files = [everything[i] for i in chosen]
    given = [labels[i] if command == "label" else None for i in chosen]
    alone: list[dict[str, float]] = []
    runs = []
    make = Segmenter if command == "segment" else PseudoLabeler
    with make(options.bundle, threads=1) as predictor:
        for folder in corpora.values():
            alone.append(stages_alone(predictor, files, given))
            runs.append(run_command(command, folder, work / "out", *arguments))
        alone.append(stages_alone(predictor, files, given))
    tenth, whole = runs
    rates = {name: round(statistics.median(each[name] for each in alone), 2) for name in alone[0]}
    slowest = min(rates, key=lambda name: rates[name])
    return {
        **{key: whole[key] for key in ("images", "failures", "images_per_second")},
        "stages_alone_images_per_second": rates,
        "slowest_stage": slowest,
        "efficiency": round(whole["images_per_second"] / rates[slowest], 3),
        # All stages share the cores: together they cannot be faster than their seconds added up.
        "sum_of_stages_images_per_second": round(1 / sum(1 / rate for rate in rates.values()), 2),
        "peak_mib": {str(run["images"]): round(run["peak_mib"], 1) for run in runs},
        "memory_ratio": round(whole["peak_mib"] / tenth["peak_mib"], 3),
    }


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__, data="data set in VOC layout", bundle=True)
    parser.add_argument("--segment", type=int, default=10_000, metavar="N", help="images to segment")
    parser.add_argument("--label", type=int, default=1_000, metavar="N", help="images to label")
    options = parser.parse_args()
    described = environment("onnxruntime")
    with tempfile.TemporaryDirectory() as work:
        measured = {command: measure(command, options, Path(work)) for command in SAMPLE}
    save_results("pipeline", {"environment": described, **measured}, options.results)


if __name__ == "__main__":
    main()
