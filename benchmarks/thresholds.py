"""How much mIoU is lost by choosing background scores and class gains without ground truth.

    python benchmarks/thresholds.py --run runs/mine --data DATA     # minutes

For the walked maps of a run, and for subsets of its classes: the mIoU at Yen's score, with and without the gains of
classes, beside the best that masks of the train list can choose: one background score (the paper's protocol), and one
with a gain for each class (coordinate ascent). All before the dense CRF. In a subset, the pixels of the other classes
do not count. Writes benchmarks/results/thresholds.json.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.imaging.decode import resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import with_gains
from multisa.training.data import Dataset, read_dataset
from multisa.training.inference import load_maps
from multisa.training.run_record import load_run
from multisa.training.thresholds import count_strongest, yen_threshold

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

STEPS = np.round(np.arange(0.20, 0.60, 0.02), 2)  # background scores that are compared
FACTORS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)  # tried on the gain of one class
PASSES = 2  # over all classes
EVERY = 2  # cells of the maps' grid that count along each axis


@dataclass(frozen=True)
class Image:
    """Maps of the classes of one image that are in the subset; class ids are those of the subset, from 1."""

    maps: Float32  # [C, h, w]
    class_ids: npt.NDArray[np.intp]
    ground_truth: UInt8 | None  # [h, w]; None for images without masks


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--data", type=Path, required=True, help="the data set it was trained on")
    options = parser.parse_args(arguments)
    run, dataset = load_run(options.run), read_dataset(options.data, quiet=True)
    walked = run.folder(options.run, "walk")
    rows = {", ".join(names): measure(images(dataset, walked, names)) for names in subsets(run.classes[1:])}
    results = {"environment": environment("multisa", "numpy"), "name": run.config.name, "thresholds": rows}
    save_results("thresholds", results, options.results)


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All classes; every other class, from the first and from the second; pairs of neighbours."""
    yield tuple(names)
    if len(names) > 3:
        yield tuple(names[::2])
        yield tuple(names[1::2])
        yield from zip(names[::2], names[1::2], strict=False)


def images(dataset: Dataset, walked: Path, names: Sequence[str]) -> list[Image]:
    """The train images that show one of the classes `names`."""
    ids = {dataset.class_names.index(name): position for position, name in enumerate(names, 1)}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[[0, *ids]] = [0, *ids.values()]
    masks = {item.id: item.mask for item in dataset.train}
    found = []
    for item in dataset.train_images:
        rows = [row for row, class_id in enumerate(item.classes) if class_id in ids]
        if not rows:
            continue
        maps = load_maps(walked / f"{item.id}.npy")[rows]
        truth, mask = None, masks.get(item.id)
        if mask is not None:
            truth = table[resize_mask(mask.read(), (maps.shape[1], maps.shape[2]))][::EVERY, ::EVERY]
        found.append(Image(maps, np.array([ids[item.classes[row]] for row in rows]), truth))
    return found


def measure(found: Sequence[Image]) -> Mapping[str, Any]:
    """mIoU in percent at the chosen and at the best thresholds."""
    n_classes = 1 + max(int(image.class_ids.max()) for image in found)
    counts = sum(count_strongest(image.maps, image.class_ids.tolist(), n_classes) for image in found)
    assert isinstance(counts, np.ndarray)
    background = yen_threshold(counts.sum(0))
    gains = np.array([background / yen_threshold(row) if row.any() else 1.0 for row in counts[1:]])
    with_masks = [image for image in found if image.ground_truth is not None]

    def miou(score: float, tried: npt.NDArray[np.float64]) -> float:
        confusion = np.zeros((n_classes, n_classes), np.int64)
        for image in with_masks:
            assert image.ground_truth is not None
            maps = with_gains(image.maps[:, ::EVERY, ::EVERY], image.class_ids.tolist(), tuple(tried))
            labels = np.where(maps.max(0) >= score, image.class_ids[maps.argmax(0)], 0)
            confusion += confusion_matrix(labels.astype(np.uint8), image.ground_truth, n_classes)
        return 100 * mean_iou(confusion)

    ones = np.ones(n_classes - 1)
    curve = {float(score): miou(float(score), ones) for score in STEPS}
    best = max(curve, key=curve.__getitem__)
    highest, best_gains = curve[best], ones
    for _, position, factor in itertools.product(range(PASSES), range(n_classes - 1), FACTORS):
        tried = best_gains.copy()
        tried[position] *= factor
        if (value := miou(best, tried)) > highest:
            highest, best_gains = value, tried
    chosen = miou(background, gains)
    return {
        "images": len(with_masks),
        "background": background,
        "gains": gains.round(3).tolist(),
        "miou": round(chosen, 2),
        "miou_without_gains": round(miou(background, ones), 2),
        "best_background": best,
        "best_miou": round(curve[best], 2),
        "regret": round(curve[best] - chosen, 2),
        "best_miou_with_gains": round(highest, 2),
        "regret_with_gains": round(highest - chosen, 2),
    }


if __name__ == "__main__":
    main()
