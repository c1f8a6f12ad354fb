"""Scores of maps and masks, and the choice of background scores, with and without ground truth.

The paper takes the background score with the highest mIoU on the train list. Without ground truth, Yen's criterion
finds the score between the two groups of pixels, and a gain for each class: maps of one class are compact (a
horse's head), those of another spread over its surroundings (a dog's sofa).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import DatasetError
from multisa.runtime.evaluation import confusion_matrix, iou_per_class, mean_iou
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import Float32, UInt8, pseudo_masks, resize_maps, with_gains
from multisa.training.config import AFFINITY_MARGIN, AffinityLabelConfig, TrainConfig
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
SCORE_BINS = 200


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
    """Score the masks ID.png of `folder` against the items' ground truth; unknown pixels (255) do not count."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    for item in items:
        if item.mask is not None:
            ground_truth = item.mask.read()
            size = (ground_truth.shape[0], ground_truth.shape[1])
            mask = resize_mask(read_mask(folder / f"{item.id}.png"), size)
            # Only a correction leaves pixels unknown.
            ground_truth = np.where(mask == IGNORE_INDEX, np.uint8(IGNORE_INDEX), ground_truth)
            confusion += confusion_matrix(np.where(mask == IGNORE_INDEX, np.uint8(0), mask), ground_truth, n_classes)
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


def yen_scores(folder: Path, items: Iterable[Item], n_classes: int) -> dict[str, Any]:
    """Background scores of the maps ID.npy without any ground truth, by Yen's criterion (Yen, Chang & Chang 1995).

    At each pixel the score of the strongest class counts. Results: "background", the threshold of all these scores,
    and "classes", the threshold of the scores where each foreground class is the strongest (None for a class that no
    image has). Raises DatasetError if no image has a class.
    """
    counts = strongest_scores(folder, items, n_classes)
    if not counts.any():
        raise DatasetError("no image of the train list has a class: expected image-level labels to train on")
    return {
        "background": yen_threshold(counts.sum(0)),
        "classes": [yen_threshold(row) if row.any() else None for row in counts[1:]],
    }


def strongest_scores(folder: Path, items: Iterable[Item], n_classes: int, class_gain: tuple[float, ...] = ()) -> Counts:
    """Histograms of the score of the strongest class at each pixel of the maps ID.npy, by that class.

    n_classes counts the background. class_gain: factor on the map of each foreground class; empty: all 1. Returns
    int64 [n_classes, SCORE_BINS] over 0..1, where the last bin also counts higher scores and the row of the
    background is 0.
    """
    counts = np.zeros((n_classes, SCORE_BINS), np.int64)
    for item in items:
        if item.classes:
            maps = with_gains(load_maps(folder / f"{item.id}.npy"), item.classes, class_gain)
            counts += count_strongest(maps, item.classes, n_classes)
    return counts


def count_strongest(maps: Float32, class_ids: Sequence[int], n_classes: int) -> Counts:
    """`strongest_scores` of one image: maps float32 [C, h, w] of `class_ids`, at least one."""
    step = np.clip((maps.max(0) * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1)
    index = np.array(class_ids)[maps.argmax(0)] * SCORE_BINS + step
    return np.bincount(index.ravel(), minlength=n_classes * SCORE_BINS).reshape(n_classes, SCORE_BINS)


def yen_threshold(counts: Counts) -> float:
    """The threshold in [0, 1] between two groups of values, by Yen's criterion (Yen, Chang & Chang 1995).

    counts: int64 [bins], a histogram of values in [0, 1]. Maximises -log(sum p_i^2 / P^2), the correlation of a
    group with shares p_i that sum to P, added up over the values below and from the threshold. The middle of all
    equally good thresholds; that of [0, 1] where all values are in one bin.
    """
    share = counts / counts.sum()
    below, squares = np.cumsum(share)[:-1], np.cumsum(share**2)
    above_squares = squares[-1] - squares[:-1]
    divides = (below > 0) & (squares[:-1] > 0) & (above_squares > 1e-15)
    if not divides.any():
        return 0.5
    product = np.where(divides, squares[:-1] * above_squares, 1.0)
    criterion = np.where(divides, 2 * np.log(np.maximum(below * (1 - below), 1e-15)) - np.log(product), -np.inf)
    best = np.flatnonzero(criterion >= criterion.max() - 1e-9)
    return round(float(best.mean() + 1) / len(counts), 3)


def around(background: float, config: AffinityLabelConfig) -> AffinityLabelConfig:
    """Put the scores of certain foreground and background AFFINITY_MARGIN above and below a background score."""
    # Within 0..1 even if the maps are almost empty or almost full.
    margin = min(AFFINITY_MARGIN, background / 2, (1 - background) / 2)
    return replace(config, foreground=round(background + margin, 3), background=round(background - margin, 3))


def choose_background(
    config: TrainConfig, label: LabelParameters, dataset: Dataset, walked: Stage, background: float, folder: Path
) -> Results:
    """Choose the background score of the pseudo-masks on the train masks (the paper's protocol).

    background: the best score for the walked maps themselves, before the dense CRF.
    """
    best = background
    curve: dict[float, float] = {}
    if label.use_crf:
        candidates = [round(background + offset, 2) for offset in BACKGROUND_OFFSETS]
        candidates = [score for score in candidates if 0 < score < 1]
        confusions = _confusions_after_crf(config, label, dataset, walked, candidates, folder)
        curve = {score: mean_iou(counts) for score, counts in zip(candidates, confusions, strict=True)}
        best = max(curve, key=curve.__getitem__)
    return {"background": best, "curve": {f"{score:.2f}": round(100 * value, 2) for score, value in curve.items()}}


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
        ground_truth = item.mask.read()
        image = read_working_image(item.image, config.long_side)
        scores = load_maps(walked.folder / f"{item.id}.npy")
        results = pseudo_masks(image, scores, item.classes, label, candidates)
        size = (ground_truth.shape[0], ground_truth.shape[1])
        counts = [confusion_matrix(resize_mask(result.mask, size), ground_truth, n_classes) for result in results]
        save_array(path, np.stack(counts))

    for_each_item(work, items, folder, (".npy",), workers=config.workers, title="background score")
    counts = [np.load(folder / f"{item.id}.npy", allow_pickle=False) for item in items]
    return np.asarray(np.sum(counts, axis=0), dtype=np.int64)
