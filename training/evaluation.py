"""Scores of maps and masks against the ground truth, over whole lists."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.evaluation import confusion_matrix, iou_per_class, mean_iou
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import resize_maps
from multisa.training.data import Item

BINS = 100  # compares the background scores 0.01, 0.02, .. 0.99


class ThresholdSweep:
    """mIoU of class maps for every background score at once.

    Counts pixels by ground truth, strongest class, and score of that class in steps of 0.01. The confusion
    matrix for any background score is then a sum over the steps below and above it.
    """

    def __init__(self, n_classes: int) -> None:
        """n_classes counts the background."""
        self.n_classes = n_classes
        self.counts = np.zeros((n_classes, n_classes, BINS), np.int64)

    def add(
        self, scores: npt.NDArray[np.float32], class_ids: tuple[int, ...], ground_truth: npt.NDArray[np.uint8]
    ) -> None:
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

    def confusion(self, background: float) -> npt.NDArray[np.int64]:
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


def scores_of(confusion: npt.NDArray[np.int64]) -> dict[str, Any]:
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
