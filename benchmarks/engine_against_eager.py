"""`multisa segment` against PyTorch eager on the val list: the same masks, and how much faster the engine is.

Masks: the command's own (decoding, engine, PNG) against those the training run kept from its PyTorch
network. Speed: engine and network on one photograph at a time, in turn, so that a noisy machine slows both
alike. Writes benchmarks/results/engine_against_eager.json.

    python benchmarks/engine_against_eager.py --run runs/voc-animals --data VOC_LAYOUT
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from multisa.runtime.bulk.crew import LocalCrew
from multisa.runtime.bulk.options import RunOptions
from multisa.runtime.bulk.request import make_job
from multisa.runtime.bulk.run import run as run_job
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.engines.choice import EngineRequest, open_engine
from multisa.runtime.engines.contract import SEGMENTER
from multisa.runtime.files import write_json_atomically
from multisa.runtime.images import read_mask, resize_mask
from multisa.runtime.metrics import confusion_matrix, mean_iou
from multisa.runtime.progress import Progress
from multisa.training.cams import CHECKPOINT
from multisa.training.data import Item, read_dataset
from multisa.training.inference import as_batch, read_working_image
from multisa.training.pipeline import RunRecord, load_run
from multisa.training.segmentation import load_segmenter
from multisa.training.segmenter import SegmentPhotographs

UInt8 = npt.NDArray[np.uint8]
COMMAND = "multisa segment"
RESULTS = Path(__file__).parent / "results" / "engine_against_eager.json"


def compare_masks(run: RunRecord, eager: Path, items: tuple[Item, ...], bundle: Bundle) -> dict[str, Any]:
    """mIoU of the command's masks and of PyTorch's, and the share of pixels on which they agree.

    eager: folder of ID.png at the working size; they are enlarged as the command enlarges its own.
    """
    n_classes = len(run.classes)
    confusion = {name: np.zeros((n_classes, n_classes), np.int64) for name in ("pytorch-eager", COMMAND)}
    equal = pixels = 0
    with tempfile.TemporaryDirectory() as work:
        photographs, out = Path(work, "photographs"), Path(work, "out")
        photographs.mkdir()
        for item in items:
            shutil.copy(item.image, photographs / f"{item.id}{item.image.suffix}")
        options = RunOptions()
        job = make_job("segment", str(photographs), out, bundle.path, EngineRequest(), options)
        run_job(job, options, LocalCrew)
        for item in items:
            assert item.mask is not None
            answer, truth = read_mask(out / "masks" / f"{item.id}.png"), read_mask(item.mask)
            reference = resize_mask(read_mask(eager / f"{item.id}.png"), (answer.shape[0], answer.shape[1]))
            confusion["pytorch-eager"] += confusion_matrix(reference, truth, n_classes)
            confusion[COMMAND] += confusion_matrix(answer, truth, n_classes)
            equal += int((reference == answer).sum())
            pixels += answer.size
    miou = {name: round(100 * mean_iou(counts), 3) for name, counts in confusion.items()}
    return {"miou": miou, "label_agreement": equal / pixels}


def compare_speed(
    run: RunRecord, root: Path, items: tuple[Item, ...], bundle: Bundle, threads: int
) -> dict[str, Any]:
    """Median milliseconds for one photograph, both on `threads` threads."""
    torch.set_num_threads(threads)
    network = load_segmenter(
        run.config.segmenter, len(run.classes), run.folder(root, "segmenter") / CHECKPOINT
    )
    eager = SegmentPhotographs(network)
    engine = open_engine(bundle, SEGMENTER, threads=threads, engine="onnxruntime-cpu")
    segmenters: dict[str, Callable[[UInt8], object]] = {
        "pytorch-eager": lambda image: eager(as_batch(image)),
        "onnxruntime": lambda image: engine.run(image[None]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in segmenters}
    with Progress(len(items), "engine against eager") as bar, torch.inference_mode():
        for item in items:
            image = read_working_image(item, run.config.long_side)
            for name, segment in segmenters.items():
                start = time.perf_counter()
                segment(image)
                seconds[name].append(time.perf_counter() - start)
            bar.advance()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "threads": threads,
        "median_milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "engine_speedup": round(medians["pytorch-eager"] / medians["onnxruntime"], 2),
    }


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    run, items, bundle = load_run(options.run), read_dataset(options.data).val, load_bundle(options.bundle)
    results = {
        "photographs": len(items),
        # What was measured: the README's check compares them with the run and the bundle it speaks of.
        "segmenter_stage": next(stage.digest for stage in run.stages if stage.name == "segmenter"),
        "segmenter_sha256": bundle.manifest.files["segmenter.onnx"].sha256,
        **compare_masks(run, run.folder(options.run, "val"), items, bundle),
        **compare_speed(run, options.run, items, bundle, options.threads),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
    write_json_atomically(RESULTS, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
