"""The masks that the graphs' outputs make, which are compared beside the outputs."""

import numpy as np

from multisa.export.parity import Outputs
from multisa.kernels import enlarge_probabilities
from multisa.kernels.enlarge import are_probabilities
from multisa.runtime.bundle import BundleParameters, LabelParameters, SegmenterLabelParameters
from multisa.runtime.imaging.decode import UInt8
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import pseudo_mask, refine, restrict_probabilities, walk_scores


def add_masks(image: UInt8, classes: tuple[int, ...], outputs: Outputs, parameters: BundleParameters) -> None:
    """Add every mask that the outputs of the graphs for one image make, with its confidence, 0..255.

    image: uint8 [H, W, 3]. classes: ids of the image-level labels; without any, no pseudo-mask is made from the
    segmenter. A mask from outputs that are not finite has no class that could agree.
    """
    add_labels(image, outputs)
    if classes and "probabilities" in outputs:
        add_segmenter_pseudo_mask(image, classes, outputs, parameters.segmenter_label)
    if {"cam", "affinity"} <= outputs.keys():
        add_pseudo_mask(image, classes, outputs, parameters.label)


def add_labels(image: UInt8, outputs: Outputs) -> None:
    """Add `labels` and `confidence` at the size of the image, if the segmenter's `probabilities` are there."""
    if "probabilities" not in outputs:
        return
    probabilities = np.asarray(outputs["probabilities"], np.float32)[0]
    labels, confidence = _no_mask(image)
    if are_probabilities(probabilities):
        labels, confidence = enlarge_probabilities(probabilities, (image.shape[0], image.shape[1]))
    outputs |= {"labels": labels, "confidence": confidence}


def add_segmenter_pseudo_mask(
    image: UInt8, classes: tuple[int, ...], outputs: Outputs, parameters: SegmenterLabelParameters
) -> None:
    """Add `segmenter_pseudo_mask` and its confidence: the probabilities restricted to `classes`, after the dense CRF.

    Made of the image alone, also where `parameters.mirror` averages it with its mirror image.
    """
    probabilities = np.asarray(outputs["probabilities"], np.float32)[0]
    mask, confidence = _no_mask(image)
    if are_probabilities(probabilities):
        restricted = restrict_probabilities(probabilities, classes, parameters.background_ratio)
        refined = refine(image, restricted, parameters.crf if parameters.use_crf else None)
        mask, confidence = enlarge_probabilities(refined, (image.shape[0], image.shape[1]), (0, *classes))
    outputs |= {"segmenter_pseudo_mask": mask, "segmenter_pseudo_mask_confidence": confidence}


def add_pseudo_mask(image: UInt8, classes: tuple[int, ...], outputs: Outputs, parameters: LabelParameters) -> None:
    """Add the pseudo-mask of cam and affinity and its confidence; reduce cam to `classes`.

    The maps of absent classes are left out: each is divided by a maximum close to 0, so rounding alone
    decides their values, and nothing reads them.
    """
    present = np.array(classes, np.intp) - 1
    cam = np.asarray(outputs["cam"], np.float32)[0, present]
    affinity = np.asarray(outputs["affinity"], np.float32)[0]
    if np.isfinite(cam).all() and np.isfinite(affinity).all():
        walked = walk_scores(cam, affinity, parameters) if classes else cam
        made = pseudo_mask(image, walked, classes, parameters)
        outputs["pseudo_mask"], outputs["pseudo_mask_confidence"] = made.mask, made.levels
    else:
        # The walk refuses such maps. They are counted as not finite, and no label agrees.
        outputs["pseudo_mask"], outputs["pseudo_mask_confidence"] = _no_mask(image)
    # A NaN in a map that is left out still counts.
    finite = bool(np.isfinite(np.asarray(outputs["cam"], np.float32)).all())
    outputs["cam"] = cam[None] if finite else np.full_like(cam[None], np.nan)


def _no_mask(image: UInt8) -> tuple[UInt8, UInt8]:
    """A mask without any class, and no confidence."""
    return np.full(image.shape[:2], IGNORE_INDEX, np.uint8), np.zeros(image.shape[:2], np.uint8)
