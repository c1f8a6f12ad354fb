"""Scoring maps and masks against ground truth, on whole sets."""

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

BINS = 100  # background scores 0.01, 0.02, .. 0.99 are compared


class ThresholdSweep:
    """mIoU of class maps for every background score at once.

    Pixels are counted by truth, strongest class and that class's score in steps of 0.01; the confusion
    matrix for any background score is a sum over the steps below and above it.
    """

    def __init__(self, n_classes: int) -> None:
        """n_classes counts the background."""
        self.n_classes = n_classes
        self.counts = np.zeros((n_classes, n_classes, BINS), np.int64)

    def add(
        self, scores: npt.NDArray[np.float32], class_ids: tuple[int, ...], truth: npt.NDArray[np.uint8]
    ) -> None:
        """Count one photograph: scores float32 [C, h, w] in [0, 1] for `class_ids`, truth uint8 [H, W]."""
        kept = truth != IGNORE_INDEX
        if class_ids:
            full = resize_maps(scores, (truth.shape[0], truth.shape[1]))
            winner = np.array(class_ids, np.int64)[full.argmax(0)][kept]
            strength = full.max(0)[kept]
        else:
            winner = np.zeros(int(kept.sum()), np.int64)
            strength = np.zeros(winner.shape, np.float32)
        step = np.clip((strength * BINS).astype(np.int64), 0, BINS - 1)
        index = (truth[kept].astype(np.int64) * self.n_classes + winner) * BINS + step
        self.counts += np.bincount(index, minlength=self.counts.size).reshape(self.counts.shape)

    def confusion(self, background: float) -> npt.NDArray[np.int64]:
        """Confusion matrix where the background scores `background` (rounded to 0.01)."""
        step = round(background * BINS)
        foreground = self.counts[:, :, step:].sum(2)
        foreground[:, 0] += self.counts[:, :, :step].sum((1, 2))
        return np.asarray(foreground, dtype=np.int64)

    def results(self, background: float) -> dict[str, Any]:
        """IoUs at `background` and at the background score with the highest mIoU."""
        # 0 is no background score: the walked maps are nowhere below it.
        curve = {step / BINS: mean_iou(self.confusion(step / BINS)) for step in range(1, BINS)}
        best = max(curve, key=curve.__getitem__)
        return {
            "configured": {"background": background, **scores_of(self.confusion(background))},
            "best": {"background": best, **scores_of(self.confusion(best))},
            "curve": {f"{score:.2f}": round(100 * value, 2) for score, value in curve.items()},
        }


def scores_of(confusion: npt.NDArray[np.int64]) -> dict[str, Any]:
    """mIoU and IoU of each class in percent, for JSON (None where a class does not occur)."""
    ious = [None if np.isnan(value) else round(100 * float(value), 2) for value in iou_per_class(confusion)]
    return {"miou": round(100 * mean_iou(confusion), 2), "iou": ious}


def score_masks(folder: Path, items: Iterable[Item], n_classes: int) -> dict[str, Any]:
    """Score the masks ID.png of `folder` against the items' ground truth."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    for item in items:
        if item.mask is not None:
            truth = read_mask(item.mask)
            mask = resize_mask(read_mask(folder / f"{item.id}.png"), (truth.shape[0], truth.shape[1]))
            confusion += confusion_matrix(mask, truth, n_classes)
    return scores_of(confusion)
