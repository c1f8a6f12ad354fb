"""Stage 6: the numbers of a pseudo-mask that are chosen on masks, for runs that ask for it.

The paper takes the background score with the highest mIoU on the train list. Beside it, each class may get a
gain: activation maps of one class are compact (a horse's head), those of another spread over its
surroundings (a dog's sofa), and one background score cannot suit both.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.predict.postprocess import pseudo_masks
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.inference import for_each_item, load_maps, read_working_image
from multisa.training.workspace import Stage

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

# Background scores compared, relative to the best one before the CRF, and how many photographs are asked.
BACKGROUND_STEPS = (-0.08, -0.06, -0.04, -0.02, 0.0, 0.02, 0.04)
BACKGROUND_SAMPLE = 128
# One class's gain is multiplied by each of these while the others stay, in rounds until none changes.
GAIN_STEPS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)
GAIN_ROUNDS = 3


def calibrate(
    run: TrainConfig, dataset: DataSet, walked: Stage, background: float, folder: Path
) -> Mapping[str, Any]:
    """Choose the background score and, when the run asks for them, the classes' gains, on the train masks.

    background: the best score of the walked maps as they are, before the dense CRF.
    """
    label = run.label
    if run.background_from == "train-masks-per-class":
        photographs = _maps_with_truth(dataset, walked)
        gains = choose_class_gains(photographs, background, len(dataset.class_names))
        label = replace(label, class_gain=gains)
    chosen, curve = background, {}
    if label.use_crf:
        candidates = [round(background + step, 2) for step in BACKGROUND_STEPS]
        candidates = [score for score in candidates if 0 < score < 1]
        curve = _miou_after_crf(run, label, dataset, walked, candidates, folder)
        chosen = max(curve, key=curve.__getitem__)
    return {
        "background": chosen,
        "class_gain": list(label.class_gain),
        "curve": {f"{score:.2f}": round(100 * value, 2) for score, value in curve.items()},
    }


@dataclass(frozen=True)
class MapsWithTruth:
    """Walked maps of one photograph and the true mask on their grid."""

    scores: Float32  # [C, h, w]
    class_ids: tuple[int, ...]
    truth: UInt8  # [h, w]


def choose_class_gains(
    photographs: Sequence[MapsWithTruth], background: float, n_classes: int
) -> tuple[float, ...]:
    """Find the gain of each foreground class by coordinate ascent on mIoU, at a fixed background score.

    n_classes counts the background. The mIoU is that on the maps' grid, before the dense CRF.
    """
    gains = np.ones(n_classes, np.float32)

    def quality(tried: Float32) -> float:
        confusion = np.zeros((n_classes, n_classes), np.int64)
        for photograph in photographs:
            ids = np.array((0, *photograph.class_ids), np.uint8)
            scores = photograph.scores * tried[ids[1:]][:, None, None]
            constant = np.full((1, *scores.shape[1:]), background, np.float32)
            mask = ids[np.concatenate([constant, scores]).argmax(0)]
            confusion += confusion_matrix(mask, photograph.truth, n_classes)
        return mean_iou(confusion)

    best = quality(gains)
    for _ in range(GAIN_ROUNDS):
        before = gains.copy()
        for class_id in range(1, n_classes):
            start = gains[class_id]
            for step in GAIN_STEPS:
                tried = gains.copy()
                tried[class_id] = start * step
                if (value := quality(tried)) > best:
                    best, gains = value, tried
        if np.array_equal(gains, before):
            break
    return tuple(round(float(gain), 3) for gain in gains[1:])


def _maps_with_truth(dataset: DataSet, walked: Stage) -> list[MapsWithTruth]:
    found = []
    for item in dataset.train:
        assert item.mask is not None
        scores = load_maps(walked.folder / f"{item.id}.npy")
        truth = resize_mask(read_mask(item.mask), (scores.shape[1], scores.shape[2]))
        found.append(MapsWithTruth(scores, item.classes, truth))
    return found


def _miou_after_crf(
    run: TrainConfig,
    label: LabelParameters,
    dataset: DataSet,
    walked: Stage,
    candidates: Sequence[float],
    folder: Path,
) -> dict[float, float]:
    """The mIoU of the pseudo-masks for each background score, on photographs spread over the train list."""
    n_classes = len(dataset.class_names)
    items = dataset.train[:: -(-len(dataset.train) // BACKGROUND_SAMPLE)]

    def work(item: Item) -> None:
        assert item.mask is not None
        truth = read_mask(item.mask)
        image = read_working_image(item, run.long_side)
        scores = load_maps(walked.folder / f"{item.id}.npy")
        made = pseudo_masks(image, scores, item.classes, label, candidates)
        size = (truth.shape[0], truth.shape[1])
        counts = [confusion_matrix(resize_mask(each.mask, size), truth, n_classes) for each in made]
        buffer = io.BytesIO()
        np.save(buffer, np.stack(counts), allow_pickle=False)
        write_bytes_atomically(folder / f"{item.id}.npy", buffer.getvalue())

    for_each_item(
        work, items, lambda item: (folder / f"{item.id}.npy",), workers=run.workers, title="background score"
    )
    confusion = sum(np.load(folder / f"{item.id}.npy", allow_pickle=False) for item in items)
    return {score: mean_iou(counts) for score, counts in zip(candidates, confusion, strict=True)}
