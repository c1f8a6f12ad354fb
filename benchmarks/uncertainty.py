"""Does the uncertainty score find wrong masks? Ranks the val images by it, and by confidence alone.

    python benchmarks/uncertainty.py --data VOC_LAYOUT

For `segment` and for `label` (with image-level labels, and from scores): the rank correlation of uncertainty
with each image's share of wrong pixels and with its mean IoU, and the error of the most uncertain tenth. The
formula was chosen on these images. Writes benchmarks/results/uncertainty.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER
from multisa.runtime.backends.registry import open_backend
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.evaluation import confusion_matrix, mean_iou, pixel_accuracy
from multisa.runtime.imaging.decode import read_image, read_mask, resize_image, resize_mask, working_size
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores
from multisa.runtime.predict.uncertainty import doubt, no_class_disagreement, segmenter_disagreement
from multisa.runtime.progress import Progress

UInt8 = npt.NDArray[np.uint8]
METHODS = ("segment", "label, image-level labels given", "label, from scores")
MOST_UNCERTAIN = 0.1  # share of the images that is evaluated separately


@dataclass(frozen=True, eq=False)
class Answer:
    """Mask of one image at the working size, and what is known without the ground truth."""

    mask: UInt8
    confidence: float
    disagreement: float
    given: tuple[str, ...] = ()


def answers(bundle: Bundle, rgb: UInt8, given: tuple[str, ...], backends: Any) -> tuple[Answer, ...]:
    """One answer for each of METHODS; rgb: uint8 [h, w, 3] at the working size."""
    manifest = bundle.manifest
    cam, affinity, segmenter = backends
    parameters = manifest.parameters
    segmented = segmenter.run(rgb[None])
    mask = segmented["labels"][0]
    confidence = segmented["confidence"][0]
    made = [Answer(mask, float(confidence.mean()) / 255, segmenter_disagreement(mask, confidence))]
    outputs = cam.run(rgb[None])
    edges = affinity.run(rgb[None])["affinity"]
    scores = dict(zip(manifest.foreground, outputs["scores"][0].tolist(), strict=True))
    present = tuple(name for name, score in scores.items() if score >= parameters.score_thresholds[name])
    for classes, labels in ((given, given), (present, ())):
        ids = tuple(manifest.classes.index(name) for name in classes)
        walked = np.zeros((0, 1, 1), np.float32)
        if ids:
            walked = walk_scores(outputs["cam"][0][[i - 1 for i in ids]], edges, parameters.label)
        labelled = pseudo_mask(rgb, walked, ids, parameters.label)
        disagreement = labelled.disagreement
        if not ids:
            disagreement = no_class_disagreement(scores, parameters.score_thresholds)
        mean_confidence = float(labelled.confidence.mean(dtype=np.float64))
        made.append(Answer(labelled.mask, mean_confidence, disagreement, labels))
    return tuple(made)


def ranking(by: npt.NDArray[np.float64], confusions: npt.NDArray[np.int64]) -> dict[str, float]:
    """How well a ranking, highest first, finds errors.

    by: float64 [n]; confusions: int64 [n, classes, classes], one matrix per image.
    """
    accuracy = np.array([pixel_accuracy(matrix) for matrix in confusions])
    iou = np.array([mean_iou(matrix) for matrix in confusions])
    order = np.argsort(-by, kind="stable")
    first = order[: round(MOST_UNCERTAIN * len(by))]
    rest = order[len(first) :]
    wrong = 1 - pixel_accuracy(confusions[first].sum(axis=0))
    figures = {
        "spearman_with_wrong_pixels": spearmanr(by, 1 - accuracy).statistic,
        "spearman_with_1_minus_iou": spearmanr(by, 1 - iou).statistic,
        "wrong_pixels_of_first_tenth": wrong,
        "times_the_average": wrong / (1 - pixel_accuracy(confusions.sum(axis=0))),
        "mean_iou_of_first_tenth": iou[first].mean(),
        "mean_iou_of_the_rest": iou[rest].mean(),
    }
    return {name: round(float(value), 3) for name, value in figures.items()}


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    options = parser.parse_args()

    bundle = load_bundle(options.bundle)
    manifest = bundle.manifest
    names = (options.data / "ImageSets/Segmentation/val.txt").read_text(encoding="utf-8").split()
    labels = json.loads((options.data / "labels.json").read_text(encoding="utf-8"))
    backends = [
        open_backend(bundle, graph, backend="onnxruntime-cpu") for graph in (CAM, AFFINITY, SEGMENTER)
    ]
    uncertainties = np.zeros((len(METHODS), len(names)))
    confidences = np.zeros_like(uncertainties)
    n = len(manifest.classes)
    confusions = np.zeros((len(METHODS), len(names), n, n), np.int64)
    with Progress(len(names), "uncertainty") as progress:
        for i, name in enumerate(names):
            image = read_image(options.data / "JPEGImages" / f"{name}.jpg").rgb
            truth = read_mask(options.data / "SegmentationClass" / f"{name}.png")
            height, width = truth.shape
            rgb = resize_image(image, working_size(height, width, manifest.parameters.long_side))
            for method, answer in enumerate(answers(bundle, rgb, tuple(labels[name]), backends)):
                found = [manifest.classes[k] for k in np.unique(answer.mask)]
                confidences[method, i] = answer.confidence
                uncertainties[method, i] = doubt(answer.confidence, answer.disagreement, answer.given, found)
                mask = resize_mask(answer.mask, (height, width))
                confusions[method, i] = confusion_matrix(mask, truth, n)
            progress.advance()
    results = {
        method: {
            "by_uncertainty": ranking(uncertainties[i], confusions[i]),
            "by_1_minus_confidence": ranking(1 - confidences[i], confusions[i]),
        }
        for i, method in enumerate(METHODS)
    }
    facts = {"images": len(names), "bundle": manifest.name, **environment("onnxruntime", "scipy")}
    save_results("uncertainty", {**facts, "methods": results}, options.results)


if __name__ == "__main__":
    main()
