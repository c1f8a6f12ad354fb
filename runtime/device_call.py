"""One batch on its way through a device: what was asked, what was found on the way, what comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.cuda.crf import CRF_ERRORS
from multisa.kernels.cuda.device import STENCIL_ERRORS, describe_errors
from multisa.runtime.device_slots import OutputLayout, Slot
from multisa.runtime.engines.contract import UInt8
from multisa.runtime.errors import EngineError, ImageError
from multisa.runtime.image_labels import Labels, labels_from_scores
from multisa.runtime.manifest import Manifest

Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class DeviceLabels:
    """What comes back of one image."""

    mask: UInt8  # [h, w] class ids, 0 = background
    confidence: UInt8  # [h, w], 255 = certain
    classes: Labels
    scores: dict[str, float]  # of every class of the bundle but the background
    soft: Float16 | None  # [1 + len(classes), h, w] probabilities, the background first; where asked for


@dataclass(frozen=True)
class ListAddresses:
    """Device addresses of one image's lists; `gains` is 0 for ones."""

    channels: int  # int32 [count]
    ids: int  # int32 [1 + count]
    gains: int  # float32 [count]


@dataclass
class DeviceCall:
    """A batch in a slot."""

    manifest: Manifest
    shape: tuple[int, ...]  # [N, h, w, 3]
    given: Sequence[Labels | None]
    slot: Slot
    keeps_soft: bool
    classes: list[Labels] = field(default_factory=list)  # of each image, once `choose` was called
    errors: dict[int, ImageError] = field(default_factory=dict)  # of images that could not be queued

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1], self.shape[2]

    @property
    def layout(self) -> OutputLayout:
        """Where one image's output lies."""
        return OutputLayout(self.shape[1] * self.shape[2], len(self.manifest.classes) * self.keeps_soft)

    @property
    def needs_affinity(self) -> bool:
        """Whether any image has, or may have, a class to spread."""
        return any(labels is None or labels for labels in self.given)

    def check_outputs(self, outputs: Mapping[str, Any]) -> None:
        """Raise EngineError where what the networks give does not fit the bundle and the image."""
        foreground, label = len(self.manifest.foreground), self.manifest.parameters.label
        for name in ("cam", "scores"):
            if outputs[name].shape[:2] != (self.shape[0], foreground):
                raise EngineError(
                    f"cam: {name}: got {list(outputs[name].shape)}, expected {foreground} classes of "
                    f"{self.shape[0]} images"
                )
        if "affinity" not in outputs:
            return
        stride = self.manifest.parameters.walk_stride
        grid = tuple(-(-side // stride) for side in self.size)
        expected = (self.shape[0], len(stencil_offsets(label.walk_radius)), *grid)
        if outputs["affinity"].shape != expected:
            raise EngineError(
                f"affinity: got {list(outputs['affinity'].shape)}, expected {list(expected)} at radius "
                f"{label.walk_radius} and stride {stride} of {self.size}"
            )

    def choose(self, wait_for: Callable[[int], None]) -> None:
        """Decide the classes of every image; waits for the scores if any image is without given ones."""
        if any(labels is None for labels in self.given):
            wait_for(self.slot.scored)
        thresholds = self.manifest.parameters.score_thresholds
        self.classes = [
            labels_from_scores(self.scores(index), thresholds) if labels is None else labels
            for index, labels in enumerate(self.given)
        ]

    def scores(self, index: int) -> dict[str, float]:
        """The scores of an image, which must have come back."""
        names = self.manifest.foreground
        scores = self.slot.scores.host(0, (self.shape[0], len(names)), np.float32)
        return dict(zip(names, scores[index].tolist(), strict=True))

    def fill_lists(self) -> int:
        """Write channels, ids and gains of every image to pinned memory; returns the bytes."""
        count, size = self._list_words()
        self.slot.lists.reserve(size)
        factors = self.manifest.parameters.label.class_gain
        rows = self.slot.lists.host(0, (self.shape[0], size // 4 // self.shape[0]), np.int32)
        for row, classes in zip(rows, self.classes, strict=True):
            ids = np.array([self.manifest.classes.index(name) for name in classes], np.int32)
            row[: len(ids)] = ids - 1
            row[count], row[count + 1 : count + 1 + len(ids)] = 0, ids
            if factors:
                gains = np.array(factors, np.float32)[ids - 1]
                row[2 * count + 1 : 2 * count + 1 + len(ids)] = gains.view(np.int32)
        return size

    def lists(self, index: int) -> ListAddresses:
        """Where the lists of one image lie on the device."""
        count, size = self._list_words()
        start = self.slot.lists.pointer + index * (size // self.shape[0])
        gains = start + 4 * (2 * count + 1) if self.manifest.parameters.label.class_gain else 0
        return ListAddresses(start, start + 4 * count, gains)

    def result(self, index: int) -> DeviceLabels | ImageError:
        """Copy one image's result out of the pinned memory."""
        classes, scores, layout = self.classes[index], self.scores(index), self.layout
        if not classes:  # without a class there is nothing to spread
            soft = np.ones((1, *self.size), np.float16) if self.keeps_soft else None
            certain = np.full(self.size, 255, np.uint8)
            return DeviceLabels(np.zeros(self.size, np.uint8), certain, classes, scores, soft)
        if index in self.errors:
            return self.errors[index]
        output, start = self.slot.output, index * layout.stride
        walk, crf = output.host(start, (2,), np.uint32).tolist()
        if walk or crf:
            said = "; ".join(
                text
                for text in (describe_errors(walk, STENCIL_ERRORS), describe_errors(crf, CRF_ERRORS))
                if text
            )
            return ImageError(f"post-processing: {said}")
        mask = output.host(start + layout.mask, self.size, np.uint8).copy()
        confidence = output.host(start + layout.confidence, self.size, np.uint8).copy()
        soft = None
        if self.keeps_soft:
            soft = output.host(start + layout.soft, (1 + len(classes), *self.size), np.float16).copy()
        return DeviceLabels(mask, confidence, classes, scores, soft)

    def _list_words(self) -> tuple[int, int]:
        """The most classes of an image, and the bytes of all lists."""
        count = len(self.manifest.foreground)
        return count, 4 * self.shape[0] * (1 + 3 * count)
