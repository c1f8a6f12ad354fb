"""One batch on its way through the GPU: staging memory, classes, lists for the kernels, and results.

With two staging buffers, one batch is uploaded or downloaded while the networks run on the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.crf import CRF_ERRORS, CrfShape, DeviceCRF
from multisa.kernels.cuda.device import ALIGNMENT, STENCIL_ERRORS, Device, Workspace, describe_errors
from multisa.kernels.cuda.label_maps import DeviceLabelMaps, queue_argmax, queue_take_errors
from multisa.kernels.cuda.pycuda_context import PinnedBuffer, PrimaryContext, PycudaBuffer
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape
from multisa.runtime.backends.base import UInt8
from multisa.runtime.bundle import LabelParameters
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.image_labels import Labels, labels_from_scores

ERROR_BYTES = 8  # two uint32 before each image's mask: error words of the walk and of the CRF
FLOAT32_BYTES = 4
FLOAT16_BYTES = 2

Float16 = npt.NDArray[np.float16]


class HostDeviceBuffer:
    """Device memory and pinned host memory of equal size. It grows on demand, never while work uses it."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Start empty."""
        self._gpu = gpu
        self._device: PycudaBuffer | None = None
        self._host: PinnedBuffer | None = None

    def reserve(self, size: int) -> None:
        """Ensure `size` bytes; growing discards the contents."""
        if self._device is None or self._device.size < size:
            self._device = None  # released before more is allocated
            self._host = None
            self._device = self._gpu.allocate(size)
            self._host = self._gpu.allocate_pinned(size)

    @property
    def pointer(self) -> int:
        """Device address of the first byte."""
        assert self._device is not None
        return self._device.pointer

    def host(self, offset: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """View the host memory at `offset` bytes as an array."""
        assert self._host is not None
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        viewed: npt.NDArray[Any] = self._host.array[offset : offset + size].view(dtype)
        return viewed.reshape(shape)

    def upload(self, size: int, stream: int) -> None:
        """Queue copying the first `size` bytes to the device."""
        assert self._host is not None
        self._gpu.driver.upload(self.pointer, self._host.pointer, size, stream)

    def download(self, offset: int, size: int, stream: int, source: int = 0) -> None:
        """Queue copying `size` bytes to the host at `offset`; source: another device address to copy from."""
        assert self._host is not None
        target = self._host.pointer + offset
        self._gpu.driver.download(target, source or self.pointer + offset, size, stream)


@dataclass(frozen=True)
class OutputLayout:
    """Byte offsets in one image's output: errors, mask, confidence, then aligned the class probabilities."""

    pixels: int
    channels: int  # of the class probabilities, at most

    @property
    def mask(self) -> int:
        """After the error words."""
        return ERROR_BYTES

    @property
    def confidence(self) -> int:
        """After the mask."""
        return ERROR_BYTES + self.pixels

    @property
    def bytes(self) -> int:
        """Size of errors, mask and confidence, which are downloaded in one piece."""
        return ERROR_BYTES + 2 * self.pixels

    @property
    def probabilities(self) -> int:
        """After the rest, aligned."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stride(self) -> int:
        """Distance from one image of a batch to the next."""
        size = self.probabilities + self.probability_bytes(self.channels)
        return -(-size // ALIGNMENT) * ALIGNMENT

    def probability_bytes(self, channels: int) -> int:
        """Size of so many channels of float16 probabilities."""
        return FLOAT16_BYTES * channels * self.pixels


class StagingBuffer:
    """Memory and events of one batch in flight."""

    def __init__(self, gpu: PrimaryContext) -> None:
        """Create the events; memory is allocated for the first batch."""
        self.image = HostDeviceBuffer(gpu)
        self.lists = HostDeviceBuffer(gpu)
        self.scores = HostDeviceBuffer(gpu)
        self.output = HostDeviceBuffer(gpu)
        with gpu.active():
            self.scored = gpu.driver.create_event()  # the scores have been downloaded
            self.done = gpu.driver.create_event()  # the results have been downloaded


@dataclass(frozen=True)
class GpuLabels:
    """The result for one image."""

    mask: UInt8  # [h, w] class ids, 0 = background
    confidence: UInt8  # [h, w], 255 = certain
    classes: Labels
    scores: dict[str, float]  # of every foreground class of the bundle
    probabilities: Float16  # [1 + len(classes), h, w], the background first


@dataclass(frozen=True)
class ListAddresses:
    """Device addresses of one image's lists, as `PostprocessInputs` takes them."""

    channels: int  # int32 [count]
    ids: int  # int32 [1 + count]
    gains: int  # float32 [count]; 0: all gains are 1


@dataclass
class GpuRequest:
    """A batch, its classes, and the staging buffer it uses."""

    manifest: Manifest
    shape: tuple[int, ...]  # [N, h, w, 3]
    given: Sequence[Labels | None]
    staging: StagingBuffer
    classes: list[Labels] = field(default_factory=list)  # of each image, set by `choose_classes`
    errors: dict[int, ImageError] = field(default_factory=dict)  # by image, of those that could not be queued

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1], self.shape[2]

    @property
    def layout(self) -> OutputLayout:
        """Layout of one image's output; call it when the classes are chosen."""
        return OutputLayout(self.shape[1] * self.shape[2], 1 + max(map(len, self.classes)))

    @property
    def needs_affinity(self) -> bool:
        """Whether any image has, or may have, a foreground class."""
        return any(labels is None or labels for labels in self.given)

    def check_outputs(self, outputs: Mapping[str, Any]) -> None:
        """Raise BackendError unless the networks' outputs match the bundle and the image size."""
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

    def choose_classes(self, wait_for: Callable[[int], None]) -> None:
        """Set the classes of every image; wait for the scores if any image has no given classes."""
        if any(labels is None for labels in self.given):
            wait_for(self.staging.scored)
        thresholds = self.manifest.parameters.score_thresholds
        self.classes = [
            labels_from_scores(self.scores(index), thresholds) if labels is None else labels
            for index, labels in enumerate(self.given)
        ]

    def scores(self, index: int) -> dict[str, float]:
        """Scores of an image by class, after their download."""
        names = self.manifest.foreground
        scores = self.staging.scores.host(0, (self.shape[0], len(names)), np.float32)
        return dict(zip(names, scores[index].tolist(), strict=True))

    def fill_lists(self) -> int:
        """Write channels, ids and gains of every image to pinned memory; return the size in bytes."""
        count, size = self._list_words()
        self.staging.lists.reserve(size)
        factors = self.manifest.parameters.label.class_gain
        rows = self.staging.lists.host(0, (self.shape[0], size // 4 // self.shape[0]), np.int32)
        for row, classes in zip(rows, self.classes, strict=True):
            ids = np.array([self.manifest.classes.index(name) for name in classes], np.int32)
            row[: len(ids)] = ids - 1
            row[count], row[count + 1 : count + 1 + len(ids)] = 0, ids
            if factors:
                gains = np.array(factors, np.float32)[ids - 1]
                row[2 * count + 1 : 2 * count + 1 + len(ids)] = gains.view(np.int32)
        return size

    def lists(self, index: int) -> ListAddresses:
        """Device addresses of one image's lists."""
        count, size = self._list_words()
        start = self.staging.lists.pointer + index * (size // self.shape[0])
        gains = start + 4 * (2 * count + 1) if self.manifest.parameters.label.class_gain else 0
        return ListAddresses(start, start + 4 * count, gains)

    def result(self, index: int) -> GpuLabels | ImageError:
        """Copy one image's result out of pinned memory."""
        classes, scores, layout = self.classes[index], self.scores(index), self.layout
        if not classes:  # background only
            certain = np.full(self.size, 255, np.uint8)
            probabilities = np.ones((1, *self.size), np.float16)
            return GpuLabels(np.zeros(self.size, np.uint8), certain, classes, scores, probabilities)
        if index in self.errors:
            return self.errors[index]
        output, start = self.staging.output, index * layout.stride
        walk, crf = output.host(start, (2,), np.uint32).tolist()
        if walk or crf:
            texts = (describe_errors(walk, STENCIL_ERRORS), describe_errors(crf, CRF_ERRORS))
            return ImageError(f"post-processing: {'; '.join(text for text in texts if text)}")
        mask = output.host(start + layout.mask, self.size, np.uint8).copy()
        confidence = output.host(start + layout.confidence, self.size, np.uint8).copy()
        probabilities = output.host(start + layout.probabilities, (1 + len(classes), *self.size), np.float16).copy()
        return GpuLabels(mask, confidence, classes, scores, probabilities)

    def _list_words(self) -> tuple[int, int]:
        """Largest number of classes of an image, and the size of all lists in bytes."""
        count = len(self.manifest.foreground)
        return count, 4 * self.shape[0] * (1 + 3 * count)


Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PostprocessShape:
    """Sizes for one image: of the maps, of the affinities, of the image, and the largest number of labels."""

    cam: Size
    grid: Size
    image: Size
    labels: int  # at most, the background included


@dataclass(frozen=True)
class PostprocessInputs:
    """Device addresses of one image's inputs."""

    image: int  # uint8 [H, W, 3] RGB
    cam: int  # float32 [classes of the bundle, *cam]
    affinity: int  # float32 [P, *grid]
    channels: int  # int32 [count]: indices of the present classes' maps
    ids: int  # int32 [1 + count]: the background's id, then theirs
    gains: int  # float32 [count]; 0: all gains are 1


@dataclass(frozen=True)
class PostprocessOutputs:
    """Device addresses of one image's outputs."""

    mask: int  # uint8 [H, W] class ids
    confidence: int  # uint8 [H, W]: 255 = certain
    errors: int  # uint32 [2]: error words of the walk (STENCIL_ERRORS) and the CRF (CRF_ERRORS)
    probabilities: int  # float16 [1 + count, H, W]


class GpuPostprocessor:
    """Random walk, resizing, dense CRF and argmax for one image size.

    Images share its memory: queue them all on one stream.
    """

    def __init__(self, device: Device, shape: PostprocessShape, parameters: LabelParameters) -> None:
        """Allocate memory, upload tables and build the spatial lattice; this waits for the device.

        Raises ValueError for sizes or parameters that the kernels do not support.
        """
        self._device = device
        self._shape = shape
        self._parameters = parameters
        self._to_grid = DeviceLabelMaps(device, shape.cam, shape.grid)
        self._to_image = DeviceLabelMaps(device, shape.grid, shape.image)
        self._settings = WalkSettings(parameters.walk_radius, parameters.walk_beta, parameters.walk_steps)
        self._walks: dict[int, DeviceWalk] = {}
        maps = 4 * (shape.labels - 1) * shape.grid[0] * shape.grid[1]
        self._pixels = shape.image[0] * shape.image[1]
        probabilities = 4 * shape.labels * self._pixels
        sizes = {"resized": maps, "walked": maps, "probabilities": probabilities}
        self._crf: DeviceCRF | None = None
        if parameters.use_crf:
            self._crf = DeviceCRF(device, CrfShape(1, *shape.image, shape.labels), parameters.crf)
            sizes |= {"refined": probabilities, "present": 4 * shape.labels * shape.labels}
        self._memory = Workspace(device, sizes)
        if parameters.use_crf:
            # Row n lists the labels of an image with n classes for the CRF: 0..n, then -1.
            labels = np.arange(shape.labels, dtype=np.int32)
            device.upload(self._memory["present"], np.where(labels <= labels[:, None], labels, -1).astype(np.int32))

    def queue(self, inputs: PostprocessInputs, outputs: PostprocessOutputs, count: int, stream: int) -> None:
        """Queue one image with `count` classes, 1 up to the shape's labels - 1; does not wait.

        Only a new `count` allocates memory, for which the device may wait.
        """
        parameters, memory, device = self._parameters, self._memory, self._device
        walk = self._walk_for(count)
        self._to_grid.resize(inputs.cam, count, memory["resized"], channels=inputs.channels, stream=stream)
        walk.walk(memory["resized"], inputs.affinity, memory["walked"], stream)
        self._to_image.probabilities(
            memory["walked"],
            count,
            memory["probabilities"],
            background=parameters.background,
            gains=inputs.gains,
            to_peak=parameters.walk_to_peak,
            stream=stream,
        )
        found = memory["probabilities"]
        if self._crf:
            found = memory["refined"]
            present = memory["present"] + 4 * self._shape.labels * count
            self._crf.set_images(inputs.image, stream=stream)
            self._crf.infer(memory["probabilities"], found, channels=present, classes=1 + count, stream=stream)
        queue_argmax(
            device,
            found,
            inputs.ids,
            1 + count,
            self._pixels,
            outputs.mask,
            outputs.confidence,
            probabilities_out=outputs.probabilities,
            stream=stream,
        )
        queue_take_errors(device, walk.error, self._crf.error if self._crf else 0, outputs.errors, stream=stream)

    def _walk_for(self, count: int) -> DeviceWalk:
        if count not in self._walks:
            shape = WalkShape(1, count, *self._shape.grid)
            self._walks[count] = DeviceWalk(self._device, shape, self._settings)
        return self._walks[count]
