"""Turn class activation maps and affinities into a pseudo-mask: random walk, background, dense CRF, argmax.

Training and the deployed runtime both call these functions, so the step has one definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from multisa.kernels import DenseCRF, random_walk
from multisa.runtime.bundle.manifest import LabelParameters
from multisa.runtime.predict.uncertainty import label_disagreement

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PseudoMask:
    """A mask at the image's size, with its confidence."""

    mask: UInt8  # [H, W] class ids, 0 = background
    confidence: Float32  # [H, W] probability of the chosen class, 0..1
    probabilities: Float32  # [1 + C, H, W], background first
    disagreement: float  # between the walk and the CRF, 0..1 (`label_disagreement`)


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
    """Turn class scores into a mask of the image's size.

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
        ones = np.ones((1, *size), np.float32)
        return [PseudoMask(np.zeros(size, np.uint8), ones[0], ones, 0.0) for _ in backgrounds]
    full = resize_maps(scores, size)
    if parameters.class_gain:
        gains = np.array([parameters.class_gain[class_id - 1] for class_id in class_ids], np.float32)
        full = full * gains[:, None, None]
    crf = DenseCRF(image, parameters.crf) if parameters.use_crf else None
    ids = np.array((0, *class_ids), dtype=np.uint8)
    masks = []
    for background in backgrounds:
        walked = background_and_foreground(full, background)
        probabilities = walked if crf is None else crf.infer(walked)
        winners = probabilities.argmax(axis=0)
        disagreement = label_disagreement(walked, winners)
        masks.append(PseudoMask(ids[winners], probabilities.max(axis=0), probabilities, disagreement))
    return masks


def background_and_foreground(scores: Float32, background: float) -> Float32:
    """Prepend a constant background map to the class maps and divide by the sum over classes.

    scores: float32 [C, H, W] >= 0. Returns float32 [1 + C, H, W], each pixel summing to one.
    """
    stacked = np.concatenate([np.full((1, *scores.shape[1:]), background, np.float32), scores])
    return np.asarray(stacked / stacked.sum(axis=0, keepdims=True), dtype=np.float32)


def resize_maps(maps: Float32, size: tuple[int, int]) -> Float32:
    """Resize float32 [C, h, w] to [C, *size] bilinearly (half-pixel centres; averaged when shrinking)."""
    if maps.shape[1:] == size:
        return np.ascontiguousarray(maps)
    resized = np.zeros((len(maps), *size), np.float32)
    for source, target in zip(maps, resized, strict=True):
        image = Image.fromarray(np.ascontiguousarray(source))
        target[...] = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized
