"""Label a corpus: class activation maps and affinities to pseudo-masks.

`multisa label IMAGES -o OUT --labels FILE` does this.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import stencil_offsets
from multisa.runtime.bulk import (
    DECIMALS,
    Annotation,
    Method,
    RunOptions,
    RunSummary,
    StageClock,
    name_some,
    run_corpus,
)
from multisa.runtime.bundle import Bundle
from multisa.runtime.corpus import Corpus, CorpusImage, check_output, find_images
from multisa.runtime.engines.choice import EngineRequest, chosen_engines
from multisa.runtime.engines.contract import AFFINITY, CAM, DeviceEngine, Engine
from multisa.runtime.errors import EngineError, ImageError
from multisa.runtime.image_labels import ImageLabels, Labels
from multisa.runtime.manifest import Manifest
from multisa.runtime.postprocess import PseudoMask, pseudo_mask, walk_scores
from multisa.runtime.progress import counted, say

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def label_images(
    source: Path,
    out: Path,
    *,
    bundle: Bundle,
    labels: ImageLabels | None = None,
    options: RunOptions | None = None,
    request: EngineRequest | None = None,
) -> RunSummary:
    """Write a pseudo-mask for every image of `source` (a folder or one file) to `out`.

    The classes of an image come from `labels`; without a row there, from the classifier's scores and the
    bundle's thresholds. The engine is the one of `request`, or chosen and said. Raises UsageError for
    unusable arguments, BundleError and EngineError for a bundle that cannot be run, EngineUnavailable for an
    engine that is not there.
    """
    corpus = find_images(source)
    check_output(source, out, corpus)
    matched = _matched_labels(corpus, labels) if labels else {}
    with chosen_engines(bundle, (CAM, AFFINITY), request) as chosen:
        cam = chosen[0].engine
        affinity = _affinity_for_the_walk(chosen[1].engine, bundle.manifest.parameters.label.walk_radius)

        def annotate(image: CorpusImage, rgb: UInt8, clock: StageClock) -> Annotation:
            return _annotate(rgb, matched.get(image.relative), bundle.manifest, cam, affinity, clock)

        return run_corpus(Method("label", annotate, chosen), corpus, out, bundle, options or RunOptions())


@dataclass(frozen=True)
class _Affinity:
    """What runs the affinity graph; the errors of the device, if its output stays there for the walk."""

    run: Callable[[UInt8], Mapping[str, Any]]
    device_errors: tuple[type[Exception], ...] = ()


def _affinity_for_the_walk(engine: Engine, radius: int) -> _Affinity:
    """Leave affinities, by far the largest output, on the device where the walk can run there, too."""
    if not isinstance(engine, DeviceEngine):
        return _Affinity(engine.run)
    from multisa.kernels.cuda import calls
    from multisa.kernels.cuda.limits import MAX_RADIUS
    from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext

    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        say(f"the random walk runs on the CPU: {error}")
        return _Affinity(engine.run)
    if radius > MAX_RADIUS:
        return _Affinity(engine.run)
    return _Affinity(engine.run_on_device, device.errors if isinstance(device, PrimaryContext) else ())


def _annotate(
    rgb: UInt8,
    given: Labels | None,
    manifest: Manifest,
    cam: Engine,
    affinity: _Affinity,
    clock: StageClock,
) -> Annotation:
    with clock.stage("cam"):
        outputs = cam.run(rgb[np.newaxis])
    maps: Float32 = outputs["cam"][0]
    scores: Float32 = outputs["scores"][0]
    foreground = manifest.foreground
    if len(maps) != len(foreground) or len(scores) != len(foreground):
        raise EngineError(f"cam: got {len(maps)} maps, expected one for each of {len(foreground)} classes")
    named = dict(zip(foreground, scores.tolist(), strict=True))
    classes = _present(named, manifest.parameters.score_thresholds) if given is None else given
    labelled = _pseudo_mask(rgb, maps, classes, manifest, affinity, clock)
    return Annotation(
        mask=labelled.mask,
        confidence=float(labelled.confidence.mean(dtype=np.float64)),
        classes=classes,
        details={
            "labels_from": "scores" if given is None else "file",
            "scores": {name: round(score, DECIMALS) for name, score in named.items()},
        },
    )


def _pseudo_mask(
    rgb: UInt8, maps: Float32, classes: Labels, manifest: Manifest, affinity: _Affinity, clock: StageClock
) -> PseudoMask:
    parameters, stride = manifest.parameters.label, manifest.parameters.walk_stride
    ids = tuple(manifest.classes.index(name) for name in classes)
    walked: Float32 = np.zeros((0, 1, 1), np.float32)
    if ids:  # without a class there is nothing to spread
        with clock.stage("affinity"):
            edges: Float32 = affinity.run(rgb[np.newaxis])["affinity"]  # or an array of the device
        expected = len(stencil_offsets(parameters.walk_radius))
        offsets, grid = edges.shape[1], tuple(edges.shape[2:])
        if offsets != expected:
            raise EngineError(
                f"affinity: got {offsets} offsets, expected {expected} at radius {parameters.walk_radius}"
            )
        wanted = tuple(-(-side // stride) for side in rgb.shape[:2])
        if grid != wanted:
            raise EngineError(
                f"affinity: got a grid of {grid}, expected {wanted} at stride {stride} of {rgb.shape[:2]}"
            )
        with clock.stage("walk"), _kernel_errors_of_the_image(affinity.device_errors):
            walked = walk_scores(maps[[i - 1 for i in ids]], edges, parameters)
    with clock.stage("crf"), _kernel_errors_of_the_image():
        return pseudo_mask(rgb, walked, ids, parameters)


@contextmanager
def _kernel_errors_of_the_image(of_the_device: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What a kernel refuses about one image, say NaN from a network, is a failure of that image."""
    try:
        yield
    except of_the_device as error:
        raise EngineError(f"random walk: cannot be run on the GPU: {error}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"post-processing: {error}") from error


def _present(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> Labels:
    return tuple(name for name, score in scores.items() if score >= thresholds[name])


def _matched_labels(corpus: Corpus, labels: ImageLabels) -> dict[str, Labels]:
    relatives = [image.relative for image in corpus.images]
    matched = labels.match(relatives)
    missing = [relative for relative in relatives if relative not in matched]
    unused = labels.unused(relatives)
    if missing:
        say(
            f"without a row in {labels.path} and labelled from scores: {len(missing)} of "
            f"{counted(len(relatives), 'image')}: {name_some(missing)}"
        )
    if unused:
        rows = counted(len(unused), "row")
        say(f"about none of the images: {rows} of {labels.path}: {name_some(unused)}")
    return matched
