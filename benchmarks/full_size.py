"""Masks of large images: edges that follow the network's grid, accuracy, and the time of the last step.

    python benchmarks/full_size.py --data DATA     # ten minutes on two cores

Segments each image of val at its own size and enlarged FACTOR times, about 4000 x 3000. Two ways make the mask of the
large image: from class probabilities, as multisa does, and from the labels at the size that the network sees. Writes
benchmarks/results/full_size.json.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.imaging.decode import read_image
from multisa.runtime.predict.segmenter import Segmenter
from multisa.training.data import Item, read_dataset

UInt8 = npt.NDArray[np.uint8]

FACTOR = 8
OURS = "from probabilities"
LABELS = "from labels at the working size"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__, quick="every tenth image", bundle=True)
    parser.add_argument("--data", type=Path, required=True, help="data set in VOC layout")
    options = parser.parse_args(arguments)
    items = read_dataset(options.data, quiet=True).val[:: 10 if options.quick else 1]
    described = environment("multisa", "numpy", "onnxruntime", quick=options.quick)
    with Segmenter(options.bundle) as segment:
        results = {"environment": described, "images": len(items), "factor": FACTOR, **measure(segment, items)}
    save_results("full_size", results, options.results)


def measure(segment: Segmenter, items: Sequence[Item], factor: int = FACTOR) -> dict[str, Any]:
    """mIoU in percent, the share of label changes on the grid, and the milliseconds of the last step."""
    n_classes = len(segment.classes)
    ways = ("own size", OURS, LABELS)
    confusions = {way: np.zeros((n_classes, n_classes), np.int64) for way in ways}
    changes = {way: np.zeros(2, np.int64) for way in ways[1:]}
    seconds = []
    for item in items:
        assert item.mask is not None
        rgb, truth = read_image(item.image).rgb, item.mask.read()
        height, width = truth.shape
        large = np.asarray(Image.fromarray(rgb).resize((factor * width, factor * height), Image.Resampling.BICUBIC))
        prediction = segment(large)
        size = (large.shape[0], large.shape[1])
        start = time.perf_counter()
        prediction.probabilities.choose(size)
        seconds.append(time.perf_counter() - start)
        labels, _ = prediction.working
        masks = {"own size": segment(rgb).mask, OURS: prediction.mask, LABELS: nearest(labels, size)}
        for way, mask in masks.items():
            shown = truth if way == "own size" else nearest(truth, size)
            confusions[way] += confusion_matrix(mask, shown, n_classes)
        for way, counts in changes.items():
            counts += changes_on_grid(masks[way], prediction.working_size)
    return {
        "miou": {way: round(100 * mean_iou(confusion), 2) for way, confusion in confusions.items()},
        "changes_on_grid": {way: round(float(on / both), 3) for way, (on, both) in changes.items()},
        "enlarge_ms": {"median": round(1000 * median(seconds), 2), "max": round(1000 * max(seconds), 2)},
    }


def nearest(labels: UInt8, size: tuple[int, int]) -> UInt8:
    """Labels [h, w] at another size, each pixel with the label of the cell that it lies in."""
    return labels[np.ix_(cells(size[0], labels.shape[0]), cells(size[1], labels.shape[1]))]


def cells(length: int, n_cells: int) -> npt.NDArray[np.intp]:
    """The cell that each of `length` pixels lies in."""
    return np.asarray((np.arange(length) + 0.5) * n_cells / length, np.intp)


def changes_on_grid(mask: UInt8, grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """How many neighbouring pixels of different labels lie in different cells of the grid [h, w], and all of them."""
    on = every = 0
    for axis, n_cells in enumerate(grid):
        differ = np.diff(mask, axis=axis) != 0
        edges = np.flatnonzero(np.diff(cells(mask.shape[axis], n_cells)))
        on += int(np.take(differ, edges, axis).sum())
        every += int(differ.sum())
    return np.array([on, every], np.int64)


if __name__ == "__main__":
    main()
