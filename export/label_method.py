"""Which method makes the better pseudo-masks of the images trained on, judged without ground truth.

The classifier of the CAM network judges: it should still recognise a class where only its region of the mask is
left, no longer recognise it where that region is gone, and the region should be small. That a region is
to be small and still sufficient is how Dabkowski & Gal (2017) judge saliency maps; what is taken away is blurred
(Fong & Vedaldi 2017), because a flat colour is an object of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from multisa.export.compare import run_all
from multisa.export.output_masks import add_masks
from multisa.runtime.backends.base import Backend
from multisa.runtime.bundle import BundleParameters, LabelMethod
from multisa.runtime.predict.postprocess import Float32, UInt8
from multisa.runtime.progress import Progress
from multisa.training.data import Item, read_working_image
from multisa.training.inference import as_batch
from multisa.training.multi_sa import MultiSACAM

BLUR_RADIUS = 12.0  # pixels, standard deviation
# The output that holds the pseudo-mask of each method.
MASKS: dict[LabelMethod, str] = {"segmenter": "segmenter_pseudo_mask", "walk": "pseudo_mask"}

Classify = Callable[[UInt8], Float32]


@dataclass(frozen=True)
class MethodEvidence:
    """The mean score of both methods' masks (`region_scores`), over the same classes of the same images."""

    scores: dict[LabelMethod, float]
    standard_error: float  # of the difference of the two
    regions: int  # classes of images that were scored
    images: int

    @property
    def chosen(self) -> LabelMethod:
        """ "segmenter", which takes a fraction of the time, unless the walk is ahead by two standard errors."""
        behind = self.scores["walk"] - self.scores["segmenter"]
        return "walk" if behind > 2 * self.standard_error else "segmenter"

    def as_json(self) -> dict[str, Any]:
        """Figures for the bundle's manifest."""
        return {
            "chosen": self.chosen,
            "scores": {method: round(score, 4) for method, score in self.scores.items()},
            "standard_error_of_difference": round(self.standard_error, 4),
            "images": self.images,
            "regions": self.regions,
        }


def compare_label_methods(
    network: MultiSACAM, backends: list[Backend], items: tuple[Item, ...], parameters: BundleParameters
) -> MethodEvidence:
    """Score the masks that the exported graphs make of `items`, which have at least two image-level labels.

    network: the CAM network as trained, whose classifier judges at one scale. backends: the three graphs.
    """
    network.eval()

    @torch.inference_mode()
    def classify(image: UInt8) -> Float32:
        return np.asarray(network(network.backbone.normalise(as_batch(image))).mean((2, 3))[0].sigmoid())

    scores: dict[LabelMethod, list[float]] = {method: [] for method in MASKS}
    with Progress(len(items), "label method") as bar:
        for item in items:
            image = read_working_image(item.image, parameters.long_side)
            outputs = run_all(backends, image)
            add_masks(image, item.classes, outputs, parameters)
            for method, name in MASKS.items():
                mask = np.asarray(outputs[name], np.uint8)
                scores[method] += region_scores(image, mask, item.classes, classify)
            bar.advance()
    difference = np.subtract(scores["segmenter"], scores["walk"])
    error = float(difference.std(ddof=1) / len(difference) ** 0.5)
    means = {method: float(np.mean(values)) for method, values in scores.items()}
    return MethodEvidence(means, error, len(difference), len(items))


def region_scores(image: UInt8, mask: UInt8, class_ids: Iterable[int], classify: Classify) -> list[float]:
    """How well the mask explains each class: p(only its region left) x (1 - p(its region gone)) - its share of pixels.

    image: uint8 [H, W, 3]; mask: class ids, uint8 [H, W]; classify: image -> probability of each foreground class.
    A score is at most 1. It is 0 for a class without any region if the blurred image shows no class.
    """
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR_RADIUS)))
    scores = []
    for class_id in class_ids:
        region = (mask == class_id)[..., np.newaxis]
        left = float(classify(np.where(region, image, blurred))[class_id - 1])
        gone = float(classify(np.where(region, blurred, image))[class_id - 1])
        scores.append(left * (1 - gone) - float(region.mean()))
    return scores
