"""How uncertain a mask is, so that people look at the uncertain ones first; it ranks, it is no probability.

The definitions were chosen among several on val images: benchmarks/results/uncertainty.json.
"""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from multisa.kernels import joint_histogram

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

SURE = 0.6  # a pixel whose class has a lower probability is an unsure one


def uncertainty(
    confidence: float, disagreement: float, given: Collection[str], found: Collection[str]
) -> float:
    """1 - confidence * (1 - disagreement) * share of the given classes that were found; within 0..1.

    confidence: mean over the pixels, 0..1. disagreement: of one of the functions below, 0..1. given: the
    image-level labels, empty when there are none (then nothing can be missing). found: the classes in the
    mask. Raises ValueError for a number out of its range.
    """
    for name, value in (("confidence", confidence), ("disagreement", disagreement)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected 0..1")
    wanted = set(given)
    share = len(wanted.intersection(found)) / len(wanted) if wanted else 1.0
    return 1 - confidence * (1 - disagreement) * share


def segmenter_disagreement(mask: UInt8, confidence: UInt8) -> float:
    """`histogram_disagreement` of a mask uint8 [h, w] and its confidence, 0..255 for 0..1."""
    return histogram_disagreement(joint_histogram(mask, confidence))


def histogram_disagreement(histograms: Int64) -> float:
    """1 - mean confidence of a class of the mask * share of the pixels that are sure; within 0..1.

    The mean is over classes, the background among them: over pixels, a small object whose class the network
    guesses at is lost in a large background. histograms: int64 [classes, 256], for each class how many of its
    pixels have a confidence of 0..255. No pixel, no disagreement.
    """
    pixels = histograms.sum(axis=1)
    present = pixels > 0
    if not present.any():
        return 0.0
    sums = histograms @ np.arange(256)
    by_class = float((sums[present] / pixels[present]).mean()) / 255
    unsure = int(histograms[:, : round(SURE * 255)].sum())
    return 1 - by_class * (1 - unsure / int(pixels.sum()))


def label_disagreement(before: Float32, after: npt.NDArray[np.intp]) -> float:
    """1 - agreement of the walk and the CRF * share of the pixels the walk is sure of; within 0..1.

    Agreement is the IoU of what each calls a class, averaged over the background and the classes labelled
    with; one that neither finds counts 0. before: float32 [1 + C, H, W], each pixel summing to one, before
    the CRF; after: integer [H, W], the row that wins after it. No pixel, no disagreement.
    """
    if not after.size:
        return 0.0
    rows = len(before)
    winners = before.argmax(axis=0)
    joint = np.bincount((winners * rows + after).ravel(), minlength=rows * rows).reshape(rows, rows)
    both = np.diag(joint)
    either = joint.sum(axis=0) + joint.sum(axis=1) - both
    agreement = float((both / np.maximum(either, 1)).mean())
    unsure = int(np.count_nonzero(before.max(axis=0) < np.float32(SURE)))
    return 1 - agreement * (1 - unsure / after.size)


def no_class_disagreement(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> float:
    """How close a class came to being present where the classifier's scores call none so; within 0..1.

    The mask is background with full confidence then, which says nothing. scores and thresholds: by class,
    thresholds of 0..1; the highest score counts as a share of its threshold.
    """
    shares = (score / thresholds[name] if thresholds[name] > 0 else 1.0 for name, score in scores.items())
    return min(max(max(shares, default=0.0), 0.0), 1.0)
