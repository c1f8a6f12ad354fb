"""From the networks' outputs to class probabilities and masks: random walk, background, dense CRF, small parts.

Training and the deployed runtime both call these functions, so each step has one definition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import CrfParameters, DenseCRF, absorb_small_parts, enlarge_probabilities, random_walk
from multisa.runtime.bundle.manifest import LabelParameters
from multisa.runtime.predict.uncertainty import label_disagreement

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PseudoMask:
    """A mask at the image's size, with the probabilities that it is the argmax of."""

    mask: UInt8  # [H, W] class ids, 0 = background
    levels: UInt8  # [H, W] probability of the chosen class, 0..255 for 0..1
    probabilities: Float32  # [1 + C, H, W], background first
    disagreement: float  # between the probabilities before the CRF and the mask, 0..1 (`label_disagreement`)


def walk_scores(cam: Float32, affinity: Float32, parameters: LabelParameters) -> Float32:
    """Spread class activations along affinities.

    cam: float32 [C, h', w'] in [0, 1], present classes only. affinity: float32 [P, h, w] or [1, P, h, w],
    half stencil; the walk runs on the GPU if the affinities are there.
    Returns float32 [C, h, w] in [0, 1]: weighted averages of `cam`. With `walk_to_peak` they are divided by
    one maximum over all classes: a maximum per class would change which class wins a pixel.
    """
    grid = (affinity.shape[-2], affinity.shape[-1])
    resized = resize_maps(cam, grid)
    batch = affinity.shape[:-3]
    walked = random_walk(
        resized.reshape(*batch, *resized.shape),
        affinity,
        radius=parameters.walk_radius,
        beta=parameters.walk_beta,
        steps=parameters.walk_steps,
    ).reshape(resized.shape)
    peak = float(walked.max(initial=0.0)) if parameters.walk_to_peak else 1.0
    return walked / np.float32(peak) if peak > 0 else walked


def pseudo_mask(image: UInt8, scores: Float32, class_ids: tuple[int, ...], parameters: LabelParameters) -> PseudoMask:
    """Turn class scores into a mask of the image's size (method "walk").

    image: uint8 [H, W, 3]. scores: float32 [C, h, w] in [0, 1], one row for each of `class_ids` (1..).
    Multiplies the maps by the gains of their classes, adds a background with the constant score
    `parameters.background`, divides by the sum over classes, and refines with the dense CRF. Without any
    class, the mask is background everywhere, with full confidence.
    """
    return pseudo_masks(image, scores, class_ids, parameters, (parameters.background,))[0]


def pseudo_masks(
    image: UInt8, scores: Float32, class_ids: tuple[int, ...], parameters: LabelParameters, backgrounds: Sequence[float]
) -> list[PseudoMask]:
    """Run `pseudo_mask` for several background scores instead of `parameters.background`."""
    size = (image.shape[0], image.shape[1])
    if not class_ids:
        return [background_mask(size)] * len(backgrounds)
    full = with_gains(resize_maps(scores, size), class_ids, parameters.class_gain)
    crf = DenseCRF(image, parameters.crf) if parameters.use_crf else None
    masks = []
    for background in backgrounds:
        walked = background_and_foreground(full, background)
        masks.append(choose_classes(walked, walked if crf is None else crf.infer(walked), class_ids))
    return masks


def with_gains(maps: Float32, class_ids: Sequence[int], class_gain: tuple[float, ...]) -> Float32:
    """Multiply maps float32 [C, h, w] of `class_ids` by the gains of their classes, if there are any."""
    if not class_gain:
        return maps
    return maps * np.array([class_gain[class_id - 1] for class_id in class_ids], np.float32)[:, None, None]


def background_and_foreground(scores: Float32, background: float) -> Float32:
    """Prepend a constant background map to the class maps and divide by the sum over classes.

    scores: float32 [C, H, W] >= 0. Returns float32 [1 + C, H, W], each pixel summing to one.
    """
    stacked = np.concatenate([np.full((1, *scores.shape[1:]), background, np.float32), scores])
    return np.asarray(stacked / stacked.sum(axis=0, keepdims=True), dtype=np.float32)


def restrict_probabilities(probabilities: Float32, class_ids: Sequence[int], background_ratio: float = 1.0) -> Float32:
    """Keep the background and the classes of an image, and divide by their sum (method "segmenter").

    probabilities: float32 [C, h, w] >= 0, one row for each class of the bundle. class_ids: of the foreground
    (1..). background_ratio: divides the background first (training/balance.py). Returns float32
    [1 + len(class_ids), h, w], each cell summing to one; a cell where all of these classes have probability 0
    becomes background.
    """
    kept = probabilities[[0, *class_ids]]
    kept[0] /= np.float32(background_ratio)
    total = kept.sum(axis=0)
    is_empty = total == 0
    kept /= np.where(is_empty, np.float32(1), total)
    kept[0, is_empty] = 1
    return kept


def refine(image: UInt8, probabilities: Float32, crf: CrfParameters | None) -> Float32:
    """Enlarge class probabilities to the image's size and refine them with the dense CRF, if any.

    image: uint8 [H, W, 3]. probabilities: float32 [K, h, w]. Returns float32 [K, H, W].
    """
    full = resize_maps(probabilities, (image.shape[0], image.shape[1]))
    return full if crf is None else DenseCRF(image, crf).infer(full)


def choose_classes(before: Float32, after: Float32, class_ids: Sequence[int]) -> PseudoMask:
    """Make the mask of class probabilities after the dense CRF, and compare it with those before it.

    before: float32 [1 + C, h, w], enlarged to the size of the mask. after: float32 [1 + C, H, W]. class_ids: of
    the foreground (1..), in the order of the rows.
    """
    size = (after.shape[1], after.shape[2])
    first, confidence = enlarge_probabilities(before, size)
    winners, levels = enlarge_probabilities(after, size)
    disagreement = label_disagreement(first, confidence, winners, len(after))
    return PseudoMask(np.array((0, *class_ids), np.uint8)[winners], levels, after, disagreement)


def background_mask(size: tuple[int, int]) -> PseudoMask:
    """Return the mask of an image without any class: background, with full confidence."""
    return PseudoMask(np.zeros(size, np.uint8), np.full(size, 255, np.uint8), np.ones((1, *size), np.float32), 0.0)


def absorb_parts(mask: UInt8, min_area: float, kept: Sequence[int] = ()) -> UInt8:
    """Give the connected parts of a mask below a share of its pixels the class around them.

    mask: uint8 [H, W]. min_area: share of the pixels; 0 keeps every part, and a part of exactly this share stays.
    kept: ids of classes that the image is known to show, of which the largest part stays in any case (of equals the
    first in reading order). Returns uint8 [H, W].
    """
    # Without the factor, 0.07 of 100 pixels would be 7.000000000000001 and round up to 8.
    min_pixels = math.ceil(min_area * mask.size * (1 - 1e-12))
    return absorb_small_parts(mask, min_pixels, kept) if min_pixels > 1 else mask


def resize_maps(maps: Float32, size: tuple[int, int]) -> Float32:
    """Resize float32 [C, h, w] to [C, *size] bilinearly (half-pixel centres; averaged when shrinking)."""
    if maps.shape[1:] == size:
        return np.ascontiguousarray(maps)
    resized = np.zeros((len(maps), *size), np.float32)
    for source, target in zip(maps, resized, strict=True):
        image = Image.fromarray(np.ascontiguousarray(source))
        target[...] = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized
