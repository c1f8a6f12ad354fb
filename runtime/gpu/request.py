"""Where one batch enters and leaves a device: pinned memory on the host, its twin there, and its events.

With two slots one batch is on its way in or out while the networks run on the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.cuda.crf import CRF_ERRORS
from multisa.kernels.cuda.device import ALIGNMENT, STENCIL_ERRORS, describe_errors
from multisa.kernels.cuda.pycuda_context import PinnedBuffer, PrimaryContext, PycudaBuffer
from multisa.runtime.backends.base import UInt8
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.image_labels import Labels, labels_from_scores

ERROR_BYTES = 8  # two words before each image's mask: what the walk and the CRF found wrong


class HostDeviceBuffer:
    """Memory on both sides that grows to what is asked for; growing must not meet work under way."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Start with none."""
        self._gpu = gpu
        self._device: PycudaBuffer | None = None
        self._host: PinnedBuffer | None = None

    def reserve(self, size: int) -> None:
        """See to `size` bytes; what they hold is then not defined."""
        if self._device is None or self._device.size < size:
            self._device = self._host = None  # given back before more is taken
            self._device, self._host = self._gpu.allocate(size), self._gpu.allocate_pinned(size)

    @property
    def pointer(self) -> int:
        """Device address of the first byte."""
        assert self._device is not None
        return self._device.pointer

    def host(self, offset: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """View the host's side."""
        assert self._host is not None
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        viewed: npt.NDArray[Any] = self._host.array[offset : offset + size].view(dtype)
        return viewed.reshape(shape)

    def upload(self, size: int, stream: int) -> None:
        """Queue copying the first bytes to the device."""
        assert self._host is not None
        self._gpu.driver.upload(self.pointer, self._host.pointer, size, stream)

    def download(self, offset: int, size: int, stream: int, source: int = 0) -> None:
        """Queue copying these bytes to the host; `source`: from another device address."""
        assert self._host is not None
        target = self._host.pointer + offset
        self._gpu.driver.download(target, source or self.pointer + offset, size, stream)


@dataclass(frozen=True)
class OutputLayout:
    """Offsets in bytes of one image's output, [errors, mask, confidence] and then, apart, the soft maps."""

    pixels: int
    soft_labels: int  # 0: no soft maps

    @property
    def mask(self) -> int:
        """Behind the error words."""
        return ERROR_BYTES

    @property
    def confidence(self) -> int:
        """Behind the mask."""
        return ERROR_BYTES + self.pixels

    @property
    def bytes(self) -> int:
        """Of what is always copied back: one piece."""
        return ERROR_BYTES + 2 * self.pixels

    @property
    def probabilities(self) -> int:
        """Aligned, behind the rest."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stride(self) -> int:
        """From one image of a batch to the next."""
        size = self.probabilities + 2 * self.soft_labels * self.pixels
        return -(-size // ALIGNMENT) * ALIGNMENT


class StagingBuffer:
    """Memory and events of one batch under way."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Make the events; memory comes with the first batch."""
        self.image, self.lists, self.scores, self.output = (HostDeviceBuffer(gpu) for _ in range(4))
        with gpu.active():
            self.scored, self.done = gpu.driver.create_event(), gpu.driver.create_event()


Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class GpuLabels:
    """What comes back of one image."""

    mask: UInt8  # [h, w] class ids, 0 = background
    confidence: UInt8  # [h, w], 255 = certain
    classes: Labels
    scores: dict[str, float]  # of every class of the bundle but the background
    probabilities: (
        Float16 | None
    )  # [1 + len(classes), h, w] probabilities, the background first; where asked for


@dataclass(frozen=True)
class ListAddresses:
    """Device addresses of one image's lists; `gains` is 0 for ones."""

    channels: int  # int32 [count]
    ids: int  # int32 [1 + count]
    gains: int  # float32 [count]


@dataclass
class GpuRequest:
    """A batch in a slot."""

    manifest: Manifest
    shape: tuple[int, ...]  # [N, h, w, 3]
    given: Sequence[Labels | None]
    slot: StagingBuffer
    keeps_probabilities: bool
    classes: list[Labels] = field(default_factory=list)  # of each image, once `choose` was called
    errors: dict[int, ImageError] = field(default_factory=dict)  # of images that could not be queued

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1], self.shape[2]

    @property
    def layout(self) -> OutputLayout:
        """Where one image's output lies."""
        return OutputLayout(
            self.shape[1] * self.shape[2], len(self.manifest.classes) * self.keeps_probabilities
        )

    @property
    def needs_affinity(self) -> bool:
        """Whether any image has, or may have, a class to spread."""
        return any(labels is None or labels for labels in self.given)

    def check_outputs(self, outputs: Mapping[str, Any]) -> None:
        """Raise BackendError where what the networks give does not fit the bundle and the image."""
        foreground, label = len(self.manifest.foreground), self.manifest.parameters.label
        for name in ("cam", "scores"):
            if outputs[name].shape[:2] != (self.shape[0], foreground):
                raise BackendError(
                    f"cam: {name}: got {list(outputs[name].shape)}, expected {foreground} classes of "
                    f"{self.shape[0]} images"
                )
        if "affinity" not in outputs:
            return
        stride = self.manifest.parameters.walk_stride
        grid = tuple(-(-side // stride) for side in self.size)
        expected = (self.shape[0], len(stencil_offsets(label.walk_radius)), *grid)
        if outputs["affinity"].shape != expected:
            raise BackendError(
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

    def result(self, index: int) -> GpuLabels | ImageError:
        """Copy one image's result out of the pinned memory."""
        classes, scores, layout = self.classes[index], self.scores(index), self.layout
        if not classes:  # without a class there is nothing to spread
            probabilities = np.ones((1, *self.size), np.float16) if self.keeps_probabilities else None
            certain = np.full(self.size, 255, np.uint8)
            return GpuLabels(np.zeros(self.size, np.uint8), certain, classes, scores, probabilities)
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
        probabilities = None
        if self.keeps_probabilities:
            probabilities = output.host(
                start + layout.probabilities, (1 + len(classes), *self.size), np.float16
            ).copy()
        return GpuLabels(mask, confidence, classes, scores, probabilities)

    def _list_words(self) -> tuple[int, int]:
        """The most classes of an image, and the bytes of all lists."""
        count = len(self.manifest.foreground)
        return count, 4 * self.shape[0] * (1 + 3 * count)
