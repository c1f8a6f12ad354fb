"""The segmenter on ONNX Runtime against PyTorch eager: equal masks, and how much faster.

Both segment every photograph of the val list in turn, one image at a time, so that a noisy machine slows
both alike. Writes benchmarks/results/engine_against_eager.json.

    python benchmarks/engine_against_eager.py --run runs/voc-animals --data VOC_LAYOUT
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.engine import SEGMENTER, OnnxRuntimeEngine
from multisa.runtime.files import write_json_atomically
from multisa.runtime.images import read_mask
from multisa.runtime.metrics import confusion_matrix, mean_iou
from multisa.runtime.progress import Progress
from multisa.training.cams import CHECKPOINT
from multisa.training.data import read_dataset
from multisa.training.inference import as_batch, read_working_image
from multisa.training.pipeline import load_run
from multisa.training.segmentation import load_segmenter
from multisa.training.segmenter import SegmentPhotographs

UInt8 = npt.NDArray[np.uint8]
RESULTS = Path(__file__).parent / "results" / "engine_against_eager.json"


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    run, dataset = load_run(options.run), read_dataset(options.data)
    torch.set_num_threads(options.threads)
    n_classes = len(run.classes)
    eager = SegmentPhotographs(
        load_segmenter(run.config.segmenter, n_classes, run.folder(options.run, "segmenter") / CHECKPOINT)
    ).to(memory_format=torch.channels_last)
    engine = OnnxRuntimeEngine(
        load_bundle(options.bundle).read_file("segmenter.onnx"), threads=options.threads, contract=SEGMENTER
    )
    segmenters: dict[str, Callable[[UInt8], UInt8]] = {
        "pytorch-eager": lambda image: eager(as_batch(image))[0][0].numpy(),
        "onnxruntime": lambda image: engine.run(image[None])["labels"][0],
    }
    confusion = {name: np.zeros((n_classes, n_classes), np.int64) for name in segmenters}
    seconds: dict[str, list[float]] = {name: [] for name in confusion}
    equal = pixels = 0
    with Progress(len(dataset.val), "engine against eager") as bar, torch.inference_mode():
        for item in dataset.val:
            image = read_working_image(item, run.config.long_side)
            truth = read_mask(item.mask) if item.mask else np.full(image.shape[:2], 255, np.uint8)
            answers = {}
            for name, segment in segmenters.items():
                start = time.perf_counter()
                answers[name] = segment(image)
                seconds[name].append(time.perf_counter() - start)
                confusion[name] += confusion_matrix(answers[name], truth, n_classes)
            equal += int((answers["pytorch-eager"] == answers["onnxruntime"]).sum())
            pixels += answers["onnxruntime"].size
            bar.advance()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "photographs": len(dataset.val),
        "threads": options.threads,
        "miou": {name: round(100 * mean_iou(counts), 3) for name, counts in confusion.items()},
        "label_agreement": equal / pixels,
        "median_milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "engine_speedup": round(medians["pytorch-eager"] / medians["onnxruntime"], 2),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
    write_json_atomically(RESULTS, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
