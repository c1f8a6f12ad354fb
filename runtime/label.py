"""Pseudo-masks as a method of a run: class activation maps and affinities to masks.

`multisa label IMAGES -o OUT --labels FILE` does this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import confidence_levels, stencil_offsets
from multisa.runtime.bulk.method import DECIMALS, Annotation, Labels, StageClock
from multisa.runtime.bundle import Bundle
from multisa.runtime.doubt import disagreement_of_no_class, disagreement_of_segmenter
from multisa.runtime.engines.choice import Choice, EngineRequest, chosen_engines
from multisa.runtime.engines.contract import AFFINITY, CAM, DeviceEngine, Engine, QueuedEngine
from multisa.runtime.errors import EngineError, ImageError
from multisa.runtime.image_labels import labels_from_scores
from multisa.runtime.manifest import Manifest
from multisa.runtime.postprocess import pseudo_mask, walk_scores
from multisa.runtime.progress import say
from multisa.runtime.sinks.contract import SoftMaps

if TYPE_CHECKING:
    from multisa.runtime.device_call import DeviceLabels
    from multisa.runtime.device_label import DeviceChain

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Walked:
    """One image after the engines and the random walk."""

    classes: Labels
    walked: Float32  # [len(classes), h, w] in [0, 1]
    scores: Mapping[str, float]  # of every foreground class
    labels_from: str  # "file", or "scores"


@dataclass(frozen=True)
class _Affinity:
    """What runs the affinity graph; the errors of the device, if its output stays there for the walk."""

    run: Callable[[UInt8], Mapping[str, Any]]
    device_errors: tuple[type[Exception], ...] = ()


class Labelling:
    """Which classes, roughly where (cam), spread along affinities (walk), sharpened (dense CRF)."""

    command, device = "label", "cpu"

    def __init__(self, manifest: Manifest, engines: Sequence[Choice], *, soft: bool) -> None:
        self.engines = engines
        self._manifest, self._soft = manifest, soft
        self._thresholds = manifest.parameters.score_thresholds
        self._cam = engines[0].engine
        self._affinity = _affinity_for_the_walk(engines[1].engine, manifest.parameters.label.walk_radius)

    def infer(self, images: UInt8, given: Sequence[Labels | None], clock: StageClock) -> Sequence[Walked]:
        """Run cam and affinity on uint8 [N, h, w, 3] and walk."""
        with clock.stage("cam"):
            outputs = self._cam.run(images)
        maps: Float32 = outputs["cam"]
        scores: Float32 = outputs["scores"]
        foreground = self._manifest.foreground
        if maps.shape[1] != len(foreground) or scores.shape[1] != len(foreground):
            raise EngineError(
                f"cam: got {maps.shape[1]} maps, expected one for each of {len(foreground)} classes"
            )
        found = []
        for image, class_maps, class_scores, names in zip(images, maps, scores, given, strict=True):
            named = dict(zip(foreground, class_scores.tolist(), strict=True))
            classes = labels_from_scores(named, self._thresholds) if names is None else names
            walked = self._walk(image, class_maps, classes, clock)
            found.append(Walked(classes, walked, named, "scores" if names is None else "file"))
        return found

    def refine(self, inferred: Walked, image: UInt8, clock: StageClock) -> Annotation:
        """Background, dense CRF and argmax of one image."""
        parameters = self._manifest.parameters.label
        ids = tuple(self._manifest.classes.index(name) for name in inferred.classes)
        with clock.stage("crf"), _kernel_errors_of_the_image():
            made = pseudo_mask(image, inferred.walked, ids, parameters)
        present = set(np.unique(made.mask).tolist())
        missing = tuple(name for i, name in zip(ids, inferred.classes, strict=True) if i not in present)
        by_scores = not inferred.classes and inferred.labels_from == "scores"
        return Annotation(
            mask=made.mask,
            confidence=confidence_levels(made.confidence),
            classes=inferred.classes,
            missing=missing,
            disagreement=disagreement_of_no_class(inferred.scores, self._thresholds)
            if by_scores
            else made.disagreement,
            details=_details(inferred.scores, inferred.labels_from),
            soft=SoftMaps((0, *ids), made.probabilities.astype(np.float16)) if self._soft else None,
        )

    def _walk(self, image: UInt8, maps: Float32, classes: Labels, clock: StageClock) -> Float32:
        parameters, stride = self._manifest.parameters.label, self._manifest.parameters.walk_stride
        if not classes:  # there is nothing to spread
            return np.zeros((0, 1, 1), np.float32)
        with clock.stage("affinity"):
            edges: Float32 = self._affinity.run(image[np.newaxis])["affinity"]  # or an array of the device
        expected = len(stencil_offsets(parameters.walk_radius))
        offsets, grid = edges.shape[1], tuple(edges.shape[2:])
        if offsets != expected:
            raise EngineError(
                f"affinity: got {offsets} offsets, expected {expected} at radius {parameters.walk_radius}"
            )
        wanted = tuple(-(-side // stride) for side in image.shape[:2])
        if grid != wanted:
            raise EngineError(
                f"affinity: got a grid of {grid}, expected {wanted} at stride {stride} of {image.shape[:2]}"
            )
        rows = [self._manifest.foreground.index(name) for name in classes]
        with clock.stage("walk"), _kernel_errors_of_the_image(self._affinity.device_errors):
            return walk_scores(maps[rows], edges, parameters)


class DeviceLabelling:
    """The same where the whole chain stays on a GPU, and masks are what comes back."""

    command, device = "label", "gpu"

    def __init__(
        self, manifest: Manifest, engines: Sequence[Choice], chain: "DeviceChain", *, soft: bool
    ) -> None:
        self.engines = engines
        self._manifest, self._chain, self._soft = manifest, chain, soft

    def infer(
        self, images: UInt8, given: Sequence[Labels | None], clock: StageClock
    ) -> "Sequence[tuple[DeviceLabels | ImageError, str]]":
        """Label uint8 [N, h, w, 3] on the GPU; where an image fails, its error is in its place."""
        origins = ["scores" if names is None else "file" for names in given]
        return list(zip(self._chain.label(images, given, clock), origins, strict=True))

    def refine(
        self, inferred: "tuple[DeviceLabels | ImageError, str]", image: UInt8, clock: StageClock
    ) -> Annotation:
        """Make the annotation of one image. Raises ImageError where the GPU has found one."""
        labelled, labels_from = inferred
        if isinstance(labelled, ImageError):
            raise labelled
        present = set(np.unique(labelled.mask).tolist())
        index = self._manifest.classes.index
        return Annotation(
            mask=labelled.mask,
            confidence=labelled.confidence,
            classes=labelled.classes,
            missing=tuple(name for name in labelled.classes if index(name) not in present),
            # What the walk alone would have said stays on the GPU, so it is the mask's own doubt here.
            disagreement=disagreement_of_segmenter(labelled.mask, labelled.confidence),
            details=_details(labelled.scores, labels_from),
            soft=None
            if labelled.soft is None
            else SoftMaps((0, *map(index, labelled.classes)), labelled.soft),
        )


@contextmanager
def open_labelling(
    bundle: Bundle, request: EngineRequest | None = None, *, soft: bool = False
) -> Iterator[Labelling | DeviceLabelling]:
    """Open the engines of cam and affinity, chosen and said; close them at the end.

    soft: whether annotations hold the class probabilities. Raises EngineUnavailable and EngineError for an
    engine that is not there or cannot run the graphs.
    """
    with chosen_engines(bundle, (CAM, AFFINITY), request) as chosen:
        cam, affinity = chosen[0].engine, chosen[1].engine
        if isinstance(cam, QueuedEngine) and isinstance(affinity, QueuedEngine):
            from multisa.runtime.device_label import open_device_chain

            chain = open_device_chain(cam, affinity, bundle.manifest, soft=soft)
            if chain is not None:
                with chain:
                    yield DeviceLabelling(bundle.manifest, chosen, chain, soft=soft)
                return
        yield Labelling(bundle.manifest, chosen, soft=soft)


def _affinity_for_the_walk(engine: Engine, radius: int) -> _Affinity:
    """Leave affinities, by far the largest output, on the device where the walk can run there, too."""
    if not isinstance(engine, DeviceEngine):
        return _Affinity(engine.run)
    from multisa.kernels.cuda import calls
    from multisa.kernels.cuda.device import MAX_RADIUS
    from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext

    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        say(f"the random walk runs on the CPU: {error}")
        return _Affinity(engine.run)
    if radius > MAX_RADIUS:
        return _Affinity(engine.run)
    return _Affinity(engine.run_on_device, device.errors if isinstance(device, PrimaryContext) else ())


@contextmanager
def _kernel_errors_of_the_image(of_the_device: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What a kernel refuses about one image, say NaN from a network, is a failure of that image."""
    try:
        yield
    except of_the_device as error:
        raise EngineError(f"random walk: cannot be run on the GPU: {error}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"post-processing: {error}") from error


def _details(scores: Mapping[str, float], labels_from: str) -> dict[str, Any]:
    rounded = {name: round(score, DECIMALS) for name, score in scores.items()}
    return {"labels_from": labels_from, "scores": rounded}
