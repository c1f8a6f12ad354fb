"""Scores of maps and masks, and what is chosen by them: thresholds and gains of classes, background score.

The paper takes the background score with the highest mIoU on the train list. In addition each class may get a
gain: activation maps of one class are compact (a horse's head), those of another spread over its
surroundings (a dog's sofa), and a single background score cannot suit both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.evaluation import confusion_matrix, iou_per_class, mean_iou
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import Float32, UInt8, pseudo_masks, resize_maps
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item, read_working_image
from multisa.training.inference import for_each_item, load_maps, save_array
from multisa.training.stage_cache import Results, Stage

Counts = npt.NDArray[np.int64]

BINS = 100  # steps of the background score that are compared: 0.01, 0.02, .. 0.99
# Background scores compared after the dense CRF, relative to the best one before it. They reach further down
# than up, because the CRF smooths away thin parts, which a lower score keeps.
BACKGROUND_OFFSETS = (-0.08, -0.06, -0.04, -0.02, 0.0, 0.02, 0.04)
# Images of the train list that this comparison uses at most: each of them runs the dense CRF once per score.
BACKGROUND_SAMPLE = 128
# Factors tried on the gain of one class while the others stay: from 0.7 to its inverse, about 1.4, and finest
# around 1.
GAIN_FACTORS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)
# Passes over all classes at most; a pass without a change is the last.
GAIN_ROUNDS = 3


class ThresholdSweep:
    """mIoU of class maps for every background score at once.

    Counts pixels by ground truth, strongest class, and score of that class in steps of 0.01. The confusion
    matrix for any background score is then a sum over the steps below and above it.
    """

    def __init__(self, n_classes: int) -> None:
        """n_classes counts the background."""
        self.n_classes = n_classes
        self.counts = np.zeros((n_classes, n_classes, BINS), np.int64)

    def add(self, scores: Float32, class_ids: tuple[int, ...], ground_truth: UInt8) -> None:
        """Count one image: scores float32 [C, h, w] in [0, 1] for `class_ids`, ground truth uint8 [H, W]."""
        kept = ground_truth != IGNORE_INDEX
        if class_ids:
            full = resize_maps(scores, (ground_truth.shape[0], ground_truth.shape[1]))
            winner = np.array(class_ids, np.int64)[full.argmax(0)][kept]
            strength = full.max(0)[kept]
        else:
            winner = np.zeros(int(kept.sum()), np.int64)
            strength = np.zeros(winner.shape, np.float32)
        step = np.clip((strength * BINS).astype(np.int64), 0, BINS - 1)
        index = (ground_truth[kept].astype(np.int64) * self.n_classes + winner) * BINS + step
        self.counts += np.bincount(index, minlength=self.counts.size).reshape(self.counts.shape)

    def confusion(self, background: float) -> Counts:
        """Confusion matrix int64 [n, n] for the background score `background`, rounded to 0.01."""
        step = round(background * BINS)
        foreground = self.counts[:, :, step:].sum(2)
        foreground[:, 0] += self.counts[:, :, :step].sum((1, 2))
        return np.asarray(foreground, dtype=np.int64)

    def results(self, background: float) -> dict[str, Any]:
        """IoUs at `background` and at the background score with the highest mIoU."""
        # Not 0: no map is below it anywhere, so nothing would be background.
        curve = {step / BINS: mean_iou(self.confusion(step / BINS)) for step in range(1, BINS)}
        best = max(curve, key=curve.__getitem__)
        return {
            "configured": {"background": background, **scores_of(self.confusion(background))},
            "best": {"background": best, **scores_of(self.confusion(best))},
            "curve": {f"{score:.2f}": round(100 * value, 2) for score, value in curve.items()},
        }


def scores_of(confusion: Counts) -> dict[str, Any]:
    """mIoU and IoU of each class in percent, as JSON values (None for a class that does not occur)."""
    ious = [None if np.isnan(value) else round(100 * float(value), 2) for value in iou_per_class(confusion)]
    return {"miou": round(100 * mean_iou(confusion), 2), "iou": ious}


def score_masks(folder: Path, items: Iterable[Item], n_classes: int) -> dict[str, Any]:
    """Score the masks ID.png of `folder` against the items' ground truth."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    for item in items:
        if item.mask is not None:
            ground_truth = read_mask(item.mask)
            size = (ground_truth.shape[0], ground_truth.shape[1])
            mask = resize_mask(read_mask(folder / f"{item.id}.png"), size)
            confusion += confusion_matrix(mask, ground_truth, n_classes)
    return scores_of(confusion)


def score_thresholds(folder: Path, items: tuple[Item, ...], dataset: Dataset) -> list[float]:
    """Per foreground class, the score with the best F1 against the image-level labels, from ID.scores.npy.

    The runtime uses them for images whose labels are not known.
    """
    scores = np.stack([load_maps(folder / f"{item.id}.scores.npy") for item in items])
    present = np.zeros(scores.shape, bool)
    for row, item in enumerate(items):
        present[row, [class_id - 1 for class_id in item.classes]] = True
    candidates = np.arange(1, 100) / 100
    predicted = scores[None] >= candidates[:, None, None]
    hits = (predicted & present).sum(1)
    f1 = 2 * hits / np.maximum(predicted.sum(1) + present.sum(0), 1)
    # The median of the best candidates: scores of train images leave a wide gap, whose edges mean nothing.
    return [
        float(np.median(candidates[f1[:, column] == f1[:, column].max()]).round(2)) for column in range(f1.shape[1])
    ]


def choose_thresholds(config: TrainConfig, dataset: Dataset, walked: Stage, background: float, folder: Path) -> Results:
    """Choose the background score and, if the run asks for them, the gains of the classes on the train masks.

    background: the best score for the walked maps themselves, before the dense CRF.
    """
    label = config.label
    if config.background_from == "train-masks-per-class":
        scored = []
        for item in dataset.train:
            assert item.mask is not None
            scores = load_maps(walked.folder / f"{item.id}.npy")
            ground_truth = resize_mask(read_mask(item.mask), (scores.shape[1], scores.shape[2]))
            scored.append(ScoredMaps(scores, item.classes, ground_truth))
        label = replace(label, class_gain=choose_class_gains(scored, background, len(dataset.class_names)))
    best = background
    curve: dict[float, float] = {}
    if label.use_crf:
        candidates = [round(background + offset, 2) for offset in BACKGROUND_OFFSETS]
        candidates = [score for score in candidates if 0 < score < 1]
        confusions = _confusions_after_crf(config, label, dataset, walked, candidates, folder)
        curve = {score: mean_iou(counts) for score, counts in zip(candidates, confusions, strict=True)}
        best = max(curve, key=curve.__getitem__)
    return {
        "background": best,
        "class_gain": list(label.class_gain),
        "curve": {f"{score:.2f}": round(100 * value, 2) for score, value in curve.items()},
    }


@dataclass(frozen=True)
class ScoredMaps:
    """Walked maps of one image, and its ground truth on the grid of the maps."""

    scores: Float32  # [C, h, w]
    class_ids: tuple[int, ...]
    ground_truth: UInt8  # [h, w]


def choose_class_gains(images: Sequence[ScoredMaps], background: float, n_classes: int) -> tuple[float, ...]:
    """Find the gain of each foreground class by coordinate ascent on mIoU, at a fixed background score.

    n_classes counts the background. The mIoU is measured on the grid of the maps, before the dense CRF.
    """
    gains = np.ones(n_classes, np.float32)

    def miou(tried: Float32) -> float:
        confusion = np.zeros((n_classes, n_classes), np.int64)
        for image in images:
            ids = np.array((0, *image.class_ids), np.uint8)
            scores = image.scores * tried[ids[1:]][:, None, None]
            constant = np.full((1, *scores.shape[1:]), background, np.float32)
            mask = ids[np.concatenate([constant, scores]).argmax(0)]
            confusion += confusion_matrix(mask, image.ground_truth, n_classes)
        return mean_iou(confusion)

    best = miou(gains)
    for _ in range(GAIN_ROUNDS):
        before = gains.copy()
        for class_id in range(1, n_classes):
            start = gains[class_id]
            for factor in GAIN_FACTORS:
                tried = gains.copy()
                tried[class_id] = start * factor
                if (value := miou(tried)) > best:
                    best, gains = value, tried
        if np.array_equal(gains, before):
            break
    return tuple(round(float(gain), 3) for gain in gains[1:])


def _confusions_after_crf(
    config: TrainConfig,
    label: LabelParameters,
    dataset: Dataset,
    walked: Stage,
    candidates: Sequence[float],
    folder: Path,
) -> Counts:
    """Confusion matrices [len(candidates), n, n] of the pseudo-masks, over a sample of the train list."""
    n_classes = len(dataset.class_names)
    items = dataset.train[:: -(-len(dataset.train) // BACKGROUND_SAMPLE)]  # evenly spaced

    def work(item: Item, path: Path) -> None:
        assert item.mask is not None
        ground_truth = read_mask(item.mask)
        image = read_working_image(item.image, config.long_side)
        scores = load_maps(walked.folder / f"{item.id}.npy")
        results = pseudo_masks(image, scores, item.classes, label, candidates)
        size = (ground_truth.shape[0], ground_truth.shape[1])
        counts = [confusion_matrix(resize_mask(result.mask, size), ground_truth, n_classes) for result in results]
        save_array(path, np.stack(counts))

    for_each_item(work, items, folder, (".npy",), workers=config.workers, title="background score")
    counts = [np.load(folder / f"{item.id}.npy", allow_pickle=False) for item in items]
    return np.asarray(np.sum(counts, axis=0), dtype=np.int64)
