"""Uncertainty scores in [0, 1] that rank masks for review. They are not calibrated probabilities.

The definitions were chosen among several on val images: benchmarks/results/uncertainty.json.
"""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from multisa.kernels import histogram, joint_histogram

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

CONFIDENT = 0.6  # a pixel whose class has a lower probability is unsure


def uncertainty(confidence: float, disagreement: float, labels: Collection[str], present: Collection[str]) -> float:
    """Return 1 - confidence * (1 - disagreement) * share of the labels that are present; within 0..1.

    confidence: mean over the pixels, 0..1. disagreement: from one of the functions below, 0..1. labels: the
    image-level labels; without any, none can be missing. present: the classes in the mask. Raises ValueError
    for a number out of its range.
    """
    for name, value in (("confidence", confidence), ("disagreement", disagreement)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected 0..1")
    names = set(labels)
    share = len(names.intersection(present)) / len(names) if names else 1.0
    return 1 - confidence * (1 - disagreement) * share


def histogram_disagreement(histograms: Int64) -> float:
    """Return 1 - mean confidence over the classes of the mask * share of confident pixels; within 0..1.

    The mean is over classes, including the background: in a mean over pixels, a large background would hide a
    small object of uncertain class. histograms: int64 [classes, 256], for each class how many of its pixels
    have each confidence 0..255. Without pixels, the result is 0.
    """
    pixels = histograms.sum(axis=1)
    present = pixels > 0
    if not present.any():
        return 0.0
    sums = histograms @ np.arange(256)
    by_class = float((sums[present] / pixels[present]).mean()) / 255
    unsure = int(histograms[:, : round(CONFIDENT * 255)].sum())
    return 1 - by_class * (1 - unsure / int(pixels.sum()))


def label_disagreement(before: UInt8, confidence: UInt8, after: UInt8, classes: int) -> float:
    """Return 1 - agreement of two masks * share of pixels where the first is confident; within 0..1.

    The masks are those before and after the dense CRF. Agreement is their IoU, averaged over the background and
    the image's labels; a class that neither mask contains counts 0. before, after: uint8 [H, W], indices below
    `classes` into the background and the labels. confidence: uint8 [H, W] of `before`, 0..255 for 0..1. Without
    pixels, the result is 0.
    """
    if not after.size:
        return 0.0
    joint = joint_histogram(before, after)[:classes, :classes]
    both = np.diag(joint)
    either = joint.sum(axis=0) + joint.sum(axis=1) - both
    agreement = float((both / np.maximum(either, 1)).mean())
    unsure = int(histogram(confidence)[: round(CONFIDENT * 255)].sum())
    return 1 - agreement * (1 - unsure / after.size)


def no_class_disagreement(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> float:
    """Return how close the best class came to its threshold when no class reaches one; within 0..1.

    The mask is then background with full confidence, which carries no information. scores, thresholds: by
    class, thresholds in 0..1. The result is the highest ratio of score to threshold.
    """
    shares = (score / thresholds[name] if thresholds[name] > 0 else 1.0 for name, score in scores.items())
    return min(max(max(shares, default=0.0), 0.0), 1.0)
