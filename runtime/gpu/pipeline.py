"""Labelling on a GPU from the upload of the image to the download of its mask: nothing else comes back.

    chain = open_gpu_pipeline(cam_engine, affinity_engine, manifest)     # None: say why, label on the CPU
    labelled = chain.label(batch, [("cat",), None])                      # uint8 [2, h, w, 3]

Networks, walk, dense CRF and argmax are queued on one stream. Uploads and downloads have streams of their
own, through pinned memory, so that they go on beside the networks of another batch: call `label` from two
threads. Only a size or a number of classes that comes for the first time makes memory and waits for it.
"""

import contextlib
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from multisa.kernels.cuda import calls
from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.crf import padded_labels
from multisa.kernels.cuda.device import MAX_RADIUS
from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError
from multisa.kernels.cuda.pycuda_device import PycudaDevice
from multisa.runtime.backends.base import AsyncBackend, Backend, Closeable, UInt8, check_image
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.gpu.postprocess import (
    GpuPostprocessor,
    PostprocessInputs,
    PostprocessOutputs,
    PostprocessShape,
)
from multisa.runtime.gpu.request import GpuLabels, GpuRequest, StagingBuffer
from multisa.runtime.image_labels import Labels
from multisa.runtime.progress import log

SLOTS = 2  # one batch computes while another comes or goes
SIZES_KEPT = 4  # working sizes whose memory is kept, hundreds of megabytes each for an image with a CRF


class Clock(Protocol):
    """What times the stages of a call."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside to stage `name`."""


class _NoClock:
    def stage(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def open_gpu_pipeline(
    cam: Backend, affinity: Backend, manifest: Manifest, *, probabilities: bool = False
) -> "GpuPipeline | None":
    """Make the chain where engines and kernels can work there; where they cannot, say why and return None."""
    if not (isinstance(cam, AsyncBackend) and isinstance(affinity, AsyncBackend)):
        return None
    if manifest.parameters.label.walk_radius > MAX_RADIUS:
        log.info(f"walk, CRF and masks are made on the CPU: walk_radius is above {MAX_RADIUS}")
        return None
    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        log.info(f"walk, CRF and masks are made on the CPU: {error}")
        return None
    return (
        GpuPipeline(cam, affinity, manifest, device, probabilities=probabilities)
        if isinstance(device, PycudaDevice)
        else None
    )


class GpuPipeline(Closeable):
    """cam and affinity engines with everything between them and the masks; `label` may be called by threads.

    It uses the engines and does not close them: close it before them.
    """

    def __init__(
        self,
        cam: AsyncBackend,
        affinity: AsyncBackend,
        manifest: Manifest,
        device: PycudaDevice,
        *,
        probabilities: bool = False,
        slots: int = SLOTS,
    ) -> None:
        """Make streams and slots; memory comes with the first image of a size. Raises BackendError."""
        self._cam, self._affinity, self._manifest, self._probabilities = (
            cam,
            affinity,
            manifest,
            probabilities,
        )
        self._device, self._driver = device, device.driver
        self._outputs: OrderedDict[tuple[int, ...], dict[str, DeviceArray]] = OrderedDict()
        self._refiners: OrderedDict[PostprocessShape, GpuPostprocessor] = OrderedDict()
        self._slots = slots
        self._turn = threading.Lock()  # to queue, not to wait for what comes of it
        self._free: queue.Queue[StagingBuffer] = queue.Queue()
        with self._device_errors(), device.active():
            self._streams = tuple(self._driver.create_stream() for _ in range(3))
            self._upload, self._compute, self._download = self._streams
            made = [StagingBuffer(device) for _ in range(slots)]
        for slot in made:
            self._free.put(slot)
        events = [event for slot in made for event in (slot.scored, slot.done)]
        self._finalizer = weakref.finalize(self, _close, device, self._streams, events)

    def label(
        self, batch: UInt8, given: Sequence[Labels | None], timer: Clock | None = None
    ) -> list[GpuLabels | ImageError]:
        """Label uint8 RGB [N, h, w, 3] at the working size; waits for the result.

        given: for each image its classes, or None for those of its scores. What is wrong with one image, say
        NaN from a network, is an ImageError in its place. Raises BackendError when a network, the driver or
        the device fails; the next call may succeed.
        """
        check_image(batch, "cam")
        if len(given) != len(batch):
            raise BackendError(f"given: got labels for {len(given)} images, expected {len(batch)}")
        timer = timer or _NoClock()
        slot = self._free.get()
        try:
            with self._device_errors(), self._device.active(), self._settled_on_failure():
                if not self._finalizer.alive:
                    raise BackendError("cam: the device chain is closed, expected an open one")
                with timer.stage("upload"):
                    self._stage(slot, batch)
                call = GpuRequest(self._manifest, batch.shape, given, slot, self._probabilities)
                with timer.stage("device"):
                    with self._turn:
                        self._queue(call)
                    self._driver.synchronise_event(slot.done)
                return [call.result(index) for index in range(len(batch))]
        finally:
            self._free.put(slot)

    def close(self) -> None:
        """Wait for what is under way and give streams and memory back; `label` is an error afterwards."""
        slots = [self._free.get() for _ in range(self._slots)]  # so nobody is inside
        with self._turn:
            self._finalizer()
            self._outputs.clear()
            self._refiners.clear()
        for slot in slots:
            self._free.put(slot)

    def _stage(self, slot: StagingBuffer, batch: UInt8) -> None:
        """Copy the batch, contiguous or not, to pinned memory; queue its upload, one for both networks."""
        slot.image.reserve(batch.nbytes)
        np.copyto(slot.image.host(0, batch.shape, np.uint8), batch)
        slot.image.upload(batch.nbytes, self._upload)

    def _queue(self, call: GpuRequest) -> None:
        """Queue everything; waits for the scores alone, and only where classes come from them."""
        driver, slot, compute = self._driver, call.slot, self._compute
        driver.queue_after(compute, self._upload)
        kept = self._kept_outputs(call.shape)
        outputs = self._cam.queue(slot.image.pointer, call.shape, compute, kept)
        call.check_outputs(outputs)
        self._fetch_scores(slot, outputs["scores"])
        if call.needs_affinity:
            # Queued before the scores are waited for, so that the device has work meanwhile.
            outputs |= self._affinity.queue(slot.image.pointer, call.shape, compute, kept)
            call.check_outputs(outputs)
        kept.update(outputs)
        call.choose(driver.synchronise_event)
        size = call.fill_lists()
        slot.lists.upload(size, compute)
        slot.output.reserve(call.shape[0] * call.layout.stride)
        for index, classes in enumerate(call.classes):
            if classes:
                self._queue_image(call, index, outputs)
        self._queue_download(call)

    def _fetch_scores(self, slot: StagingBuffer, scores: DeviceArray) -> None:
        """Queue copying the scores back on the stream of the networks: the next batch overwrites them."""
        size = 4 * int(np.prod(scores.shape))
        slot.scores.reserve(size)
        slot.scores.download(0, size, self._compute, source=scores.pointer)
        self._driver.record_event(slot.scored, self._compute)

    def _queue_image(self, call: GpuRequest, index: int, outputs: Mapping[str, DeviceArray]) -> None:
        """Queue the way of one image behind the networks; what it cannot be done for is its error."""
        cam, affinity, lists = outputs["cam"], outputs["affinity"], call.lists(index)
        count, layout = len(call.classes[index]), call.layout
        inputs = PostprocessInputs(
            image=call.slot.image.pointer + 3 * layout.pixels * index,
            cam=cam.pointer + 4 * int(np.prod(cam.shape[1:])) * index,
            affinity=affinity.pointer + 4 * int(np.prod(affinity.shape[1:])) * index,
            channels=lists.channels,
            ids=lists.ids,
            gains=lists.gains,
        )
        start = call.slot.output.pointer + index * layout.stride
        probabilities = start + layout.probabilities if call.keeps_probabilities else 0
        places = PostprocessOutputs(start + layout.mask, start + layout.confidence, start, probabilities)
        (_, _, *cam_size), (_, _, *grid) = cam.shape, affinity.shape
        sizes = (cam_size[0], cam_size[1]), (grid[0], grid[1]), call.size
        try:
            refiner = self._refiner_of(PostprocessShape(*sizes, padded_labels(1 + count)))
            refiner.queue(inputs, places, count, self._compute)
        except ValueError as error:  # a size or a number that kernels do not take
            call.errors[index] = ImageError(f"post-processing: {error}")

    def _queue_download(self, call: GpuRequest) -> None:
        """Queue copying back masks, confidences and error words, in one piece for each image."""
        layout = call.layout
        self._driver.queue_after(self._download, self._compute)
        for index, classes in enumerate(call.classes):
            if not classes or index in call.errors:
                continue
            start = index * layout.stride
            call.slot.output.download(start, layout.bytes, self._download)
            if call.keeps_probabilities:
                probabilities = 2 * (1 + len(classes)) * layout.pixels
                call.slot.output.download(start + layout.probabilities, probabilities, self._download)
        self._driver.record_event(call.slot.done, self._download)

    def _kept_outputs(self, shape: tuple[int, ...]) -> dict[str, DeviceArray]:
        """The networks' outputs of an earlier batch of this shape, to be written over."""
        self._make_room(self._outputs, shape)
        return self._outputs.setdefault(shape, {})

    def _refiner_of(self, shape: PostprocessShape) -> GpuPostprocessor:
        self._make_room(self._refiners, shape)
        if shape not in self._refiners:
            parameters = self._manifest.parameters.label
            self._refiners[shape] = GpuPostprocessor(self._device, shape, parameters)
        return self._refiners[shape]

    def _make_room(self, kept: OrderedDict[Any, Any], key: Any) -> None:
        """Let go of what was not used for longest before something new is made."""
        if key in kept:
            kept.move_to_end(key)
            return
        while len(kept) >= SIZES_KEPT:
            self._driver.synchronise(self._compute)  # which may be working in it
            kept.popitem(last=False)

    @contextlib.contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except self._device.errors as error:
            raise BackendError(f"labelling cannot be run on {self._device.name}: {error}") from error

    @contextlib.contextmanager
    def _settled_on_failure(self) -> Iterator[None]:
        """Wait for what was queued before the failure: it works in memory that others will use."""
        try:
            yield
        except BaseException:
            with self._turn:
                for stream in self._streams:
                    with contextlib.suppress(*self._device.errors):
                        self._driver.synchronise(stream)
                self._refiners.clear()  # their error words may tell of this call
            raise


def _close(device: PycudaDevice, streams: Sequence[int], events: Sequence[int]) -> None:
    """Wait for the streams and give them and the events back."""
    with device.active():
        for stream in streams:
            device.driver.synchronise(stream)
            device.driver.destroy_stream(stream)
        for event in events:
            device.driver.destroy_event(event)
