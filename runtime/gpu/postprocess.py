"""From maps and affinities on a device to a mask there: what `postprocess.py` does, for one working size.

shape = PostprocessShape(cam=(24, 32), grid=(94, 125), image=(375, 500), labels=4)
refiner = GpuPostprocessor(device, shape, parameters)
refiner.queue(inputs, outputs, 3, stream)            # device addresses; nothing waits
"""

from dataclasses import dataclass

import numpy as np

from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.crf import CrfShape, DeviceCRF
from multisa.kernels.cuda.device import Device, Workspace
from multisa.kernels.cuda.label_maps import DeviceLabelMaps, queue_argmax, queue_take_errors
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape
from multisa.runtime.bundle import LabelParameters

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PostprocessShape:
    """The sizes of one image's way; `labels` is for how many, background included, there is memory."""

    cam: Size
    grid: Size
    image: Size
    labels: int


@dataclass(frozen=True)
class PostprocessInputs:
    """Device addresses of what belongs to one image."""

    image: int  # uint8 [H, W, 3] RGB
    cam: int  # float32 [classes of the bundle, *cam]
    affinity: int  # float32 [P, *grid]
    channels: int  # int32 [count]: the maps of the classes that are present
    ids: int  # int32 [1 + count]: the background's id, then theirs
    gains: int  # float32 [count]; 0: ones


@dataclass(frozen=True)
class PostprocessOutputs:
    """Device addresses of what is made of it."""

    mask: int  # uint8 [H, W] class ids
    confidence: int  # uint8 [H, W]: 255 = certain
    errors: int  # uint32 [2]: error words of the walk (STENCIL_ERRORS) and the CRF (CRF_ERRORS)
    probabilities: int = 0  # float16 [1 + count, H, W]; 0: not wanted


class GpuPostprocessor:
    """Walk, resizing, dense CRF and argmax for one working size; all memory is made here or with a new count.

    Images of one object share its memory: queue them on one stream.
    """

    def __init__(self, device: Device, shape: PostprocessShape, parameters: LabelParameters) -> None:
        """Allocate, upload the tables and build the spatial lattice, which waits for the device.

        Raises ValueError for sizes or parameters that a device cannot do.
        """
        self._device, self._shape, self._parameters = device, shape, parameters
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
            # Row n: the n + 1 labels that take part, and -1 for the rest, as the CRF wants them listed.
            labels = np.arange(shape.labels, dtype=np.int32)
            device.upload(
                self._memory["present"], np.where(labels <= labels[:, None], labels, -1).astype(np.int32)
            )

    def queue(self, inputs: PostprocessInputs, outputs: PostprocessOutputs, count: int, stream: int) -> None:
        """Queue the way of one image with `count` classes, 1 up to the shape's labels - 1; nothing waits.

        Only a count that comes for the first time makes memory, for which the device may wait.
        """
        parameters, memory, device = self._parameters, self._memory, self._device
        walk = self._walk_of(count)
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
            self._crf.infer(
                memory["probabilities"], found, channels=present, classes=1 + count, stream=stream
            )
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
        queue_take_errors(
            device, walk.error, self._crf.error if self._crf else 0, outputs.errors, stream=stream
        )

    def _walk_of(self, count: int) -> DeviceWalk:
        if count not in self._walks:
            shape = WalkShape(1, count, *self._shape.grid)
            self._walks[count] = DeviceWalk(self._device, shape, self._settings)
        return self._walks[count]
