"""Segment a corpus with the trained segmenter: `multisa segment IMAGES -o OUT`."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from multisa.runtime.bulk import DECIMALS, Annotation, Method, RunOptions, RunSummary, StageClock, run_corpus
from multisa.runtime.bundle import Bundle
from multisa.runtime.corpus import CorpusImage, check_output, find_images
from multisa.runtime.engines.choice import EngineRequest, chosen_engines
from multisa.runtime.engines.contract import SEGMENTER, Engine
from multisa.runtime.errors import EngineError

UInt8 = npt.NDArray[np.uint8]


def segment_images(
    source: Path,
    out: Path,
    *,
    bundle: Bundle,
    options: RunOptions | None = None,
    request: EngineRequest | None = None,
) -> RunSummary:
    """Write the segmenter's mask of every image of `source` (a folder or one file) to `out`.

    The engine is the one of `request`, or chosen and said. Raises UsageError for unusable arguments,
    BundleError and EngineError for a bundle that cannot be run, EngineUnavailable for an engine not there.
    """
    corpus = find_images(source)
    check_output(source, out, corpus)
    with chosen_engines(bundle, (SEGMENTER,), request) as chosen:
        segmenter = chosen[0].engine

        def annotate(_: CorpusImage, rgb: UInt8, clock: StageClock) -> Annotation:
            return _annotate(rgb, bundle.manifest.classes, segmenter, clock)

        return run_corpus(Method("segment", annotate, chosen), corpus, out, bundle, options or RunOptions())


def _annotate(rgb: UInt8, classes: tuple[str, ...], segmenter: Engine, clock: StageClock) -> Annotation:
    with clock.stage("segmenter"):
        outputs = segmenter.run(rgb[np.newaxis])
    mask: UInt8 = outputs["labels"][0]
    if mask.shape != rgb.shape[:2]:
        raise EngineError(f"segmenter: got labels {mask.shape}, expected the image's size {rgb.shape[:2]}")
    confidence: UInt8 = outputs["confidence"][0]
    if confidence.shape != mask.shape:
        raise EngineError(
            f"segmenter: got confidence {confidence.shape}, expected {mask.shape} as the labels"
        )
    present = np.unique(mask).tolist()
    if present[-1] >= len(classes):
        raise EngineError(f"segmenter: got class {present[-1]}, expected 0..{len(classes) - 1}")
    means = {i: float(confidence[mask == i].mean(dtype=np.float64)) / 255 for i in present}
    return Annotation(
        mask=mask,
        confidence=float(confidence.mean(dtype=np.float64)) / 255,
        classes=tuple(classes[i] for i in present if i > 0),
        # Of each class in the mask, the background too: mean confidence over its pixels.
        details={"scores": {classes[i]: round(mean, DECIMALS) for i, mean in means.items()}},
    )
