"""Segmentation metrics: counts first (int64), ratios of them afterwards.

Protocol of PASCAL VOC: one confusion matrix over the whole set, pixels marked 255 in the truth left out,
IoU = TP / (TP + FP + FN) per class, mIoU their mean.
"""

import numpy as np
import numpy.typing as npt

from multisa.runtime.palette import IGNORE_INDEX


def confusion_matrix(
    prediction: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], n_classes: int
) -> npt.NDArray[np.int64]:
    """Count pixels, int64 [n_classes, n_classes], rows = truth, columns = prediction.

    Both inputs are uint8 of one shape. Pixels whose truth is 255 are left out. Raises ValueError for a class
    outside 0..n_classes-1 (a prediction of 255 included: a segmenter has no right to abstain).
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}: they must be equal")
    kept = truth != IGNORE_INDEX
    rows = truth[kept].astype(np.int64)
    columns = prediction[kept].astype(np.int64)
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.size and values.max() >= n_classes:
            raise ValueError(f"{name} holds class {values.max()}, expected 0..{n_classes - 1}")
    counts = np.bincount(rows * n_classes + columns, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def iou_per_class(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU of each class, float64 [n_classes]; NaN for a class neither in the truth nor predicted."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    ratios = np.full_like(hits, np.nan)
    np.divide(hits, union, out=ratios, where=union > 0)
    return ratios


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Mean of `iou_per_class` over the classes that occur."""
    return float(np.nanmean(iou_per_class(confusion)))


def pixel_accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Share of counted pixels that are right; NaN when none was counted."""
    total = int(confusion.sum())
    return float(np.diag(confusion).sum()) / total if total else float("nan")
