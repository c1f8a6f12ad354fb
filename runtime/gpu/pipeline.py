"""Label images on a GPU, from the upload of an image to the download of its mask.

    pipeline = open_gpu_pipeline(cam_backend, affinity_backend, manifest)  # None: logs why; label on the CPU
    results = pipeline.label(batch, [("cat",), None])                      # two GpuLabels, uint8 [h, w] masks

Networks, random walk, dense CRF and argmax are queued on one stream. Uploads and downloads have streams of
their own and use pinned memory, so they overlap with the networks of another batch: call `label` from two
threads. Only a new image size or a new number of classes allocates memory, and waits for it.
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
from multisa.runtime.gpu.stages import (
    FLOAT32_BYTES,
    GpuLabels,
    GpuPostprocessor,
    GpuRequest,
    PostprocessInputs,
    PostprocessOutputs,
    PostprocessShape,
    StagingBuffer,
)
from multisa.runtime.image_labels import Labels
from multisa.runtime.progress import log

BATCHES_IN_FLIGHT = 2  # one is computed while another is uploaded or downloaded
MAX_SIZES = 4  # image sizes whose memory is kept; with a CRF, hundreds of megabytes per size


class Clock(Protocol):
    """Times the stages of a call."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside to stage `name`."""


class _NoClock:
    def stage(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def open_gpu_pipeline(cam: Backend, affinity: Backend, manifest: Manifest) -> "GpuPipeline | None":
    """Open the pipeline if backends and kernels support it; otherwise log why and return None."""
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
    if not isinstance(device, PycudaDevice):
        return None
    return GpuPipeline(cam, affinity, manifest, device)


class GpuPipeline(Closeable):
    """The networks cam and affinity, and everything between them and the masks. `label` is thread-safe.

    It does not own the backends: close it before them.
    """

    def __init__(self, cam: AsyncBackend, affinity: AsyncBackend, manifest: Manifest, device: PycudaDevice) -> None:
        """Create streams and events; memory is allocated for the first image of each size. Raises BackendError."""
        self._cam = cam
        self._affinity = affinity
        self._manifest = manifest
        self._device = device
        self._driver = device.driver
        # By batch shape and by image shape, least recently used first.
        self._outputs: OrderedDict[tuple[int, ...], dict[str, DeviceArray]] = OrderedDict()
        self._postprocessors: OrderedDict[PostprocessShape, GpuPostprocessor] = OrderedDict()
        self._queueing = threading.Lock()  # held to queue work, not to wait for it
        self._idle: queue.Queue[StagingBuffer] = queue.Queue()
        with self._device_errors(), device.active():
            self._upload = self._driver.create_stream()
            self._compute = self._driver.create_stream()
            self._download = self._driver.create_stream()
            staging = [StagingBuffer(device) for _ in range(BATCHES_IN_FLIGHT)]
        for buffer in staging:
            self._idle.put(buffer)
        self._streams = (self._upload, self._compute, self._download)
        events = [event for buffer in staging for event in (buffer.scored, buffer.done)]
        self._finalizer = weakref.finalize(self, _close, device, self._streams, events)

    def label(
        self, batch: UInt8, given: Sequence[Labels | None], timer: Clock | None = None
    ) -> list[GpuLabels | ImageError]:
        """Label uint8 RGB [N, h, w, 3] at the working size, and wait for the results.

        given: the classes of each image, or None to derive them from its scores. A problem of one image, such
        as NaN from a network, is an ImageError in its place. Raises BackendError if a network, the driver or
        the GPU fails; the next call may succeed.
        """
        check_image(batch, "cam")
        if len(given) != len(batch):
            raise BackendError(f"given: got labels for {len(given)} images, expected {len(batch)}")
        timer = timer or _NoClock()
        staging = self._idle.get()
        try:
            with self._device_errors(), self._device.active(), self._synchronised_on_failure():
                if not self._finalizer.alive:
                    raise BackendError("cam: the GPU pipeline is closed, expected an open one")
                with timer.stage("upload"):
                    self._queue_upload(staging, batch)
                request = GpuRequest(self._manifest, batch.shape, given, staging)
                with timer.stage("device"):
                    with self._queueing:
                        self._queue(request)
                    self._driver.synchronise_event(staging.done)
                return [request.result(index) for index in range(len(batch))]
        finally:
            self._idle.put(staging)

    def close(self) -> None:
        """Wait for running calls and release streams and memory; `label` raises afterwards."""
        staging = [self._idle.get() for _ in range(BATCHES_IN_FLIGHT)]  # then no call is running
        with self._queueing:
            self._finalizer()
            self._outputs.clear()
            self._postprocessors.clear()
        for buffer in staging:
            self._idle.put(buffer)

    def _queue_upload(self, staging: StagingBuffer, batch: UInt8) -> None:
        """Copy the batch, contiguous or not, to pinned memory, and queue one upload for both networks."""
        staging.image.reserve(batch.nbytes)
        np.copyto(staging.image.host(0, batch.shape, np.uint8), batch)
        staging.image.upload(batch.nbytes, self._upload)

    def _queue(self, request: GpuRequest) -> None:
        """Queue everything; waits for the scores alone, and only if classes are derived from them."""
        driver, staging, compute = self._driver, request.staging, self._compute
        driver.queue_after(compute, self._upload)
        kept = self._reusable_outputs(request.shape)
        outputs = self._cam.queue(staging.image.pointer, request.shape, compute, kept)
        request.check_outputs(outputs)
        self._queue_score_download(staging, outputs["scores"])
        if request.needs_affinity:
            # Queued before waiting for the scores, so that the GPU stays busy.
            outputs |= self._affinity.queue(staging.image.pointer, request.shape, compute, kept)
            request.check_outputs(outputs)
        kept.update(outputs)
        request.choose_classes(driver.synchronise_event)
        size = request.fill_lists()
        staging.lists.upload(size, compute)
        staging.output.reserve(request.shape[0] * request.layout.stride)
        for index, classes in enumerate(request.classes):
            if classes:
                self._queue_postprocessing(request, index, outputs)
        self._queue_download(request)

    def _queue_score_download(self, staging: StagingBuffer, scores: DeviceArray) -> None:
        """Queue the download of the scores on the networks' stream: the next batch overwrites them."""
        size = FLOAT32_BYTES * int(np.prod(scores.shape))
        staging.scores.reserve(size)
        staging.scores.download(0, size, self._compute, source=scores.pointer)
        self._driver.record_event(staging.scored, self._compute)

    def _queue_postprocessing(self, request: GpuRequest, index: int, outputs: Mapping[str, DeviceArray]) -> None:
        """Queue walk, CRF and argmax of one image; an unsupported size becomes the image's error."""
        cam, affinity, lists = outputs["cam"], outputs["affinity"], request.lists(index)
        count, layout = len(request.classes[index]), request.layout
        inputs = PostprocessInputs(
            image=request.staging.image.pointer + 3 * layout.pixels * index,
            cam=cam.pointer + FLOAT32_BYTES * int(np.prod(cam.shape[1:])) * index,
            affinity=affinity.pointer + FLOAT32_BYTES * int(np.prod(affinity.shape[1:])) * index,
            channels=lists.channels,
            ids=lists.ids,
            gains=lists.gains,
        )
        start = request.staging.output.pointer + index * layout.stride
        targets = PostprocessOutputs(
            mask=start + layout.mask,
            confidence=start + layout.confidence,
            errors=start,
            probabilities=start + layout.probabilities,
        )
        (_, _, *cam_size), (_, _, *grid) = cam.shape, affinity.shape
        shape = PostprocessShape((cam_size[0], cam_size[1]), (grid[0], grid[1]), request.size, padded_labels(1 + count))
        try:
            self._postprocessor_for(shape).queue(inputs, targets, count, self._compute)
        except ValueError as error:  # a size or a value that the kernels do not support
            request.errors[index] = ImageError(f"post-processing: {error}")

    def _queue_download(self, request: GpuRequest) -> None:
        """Queue the download of each image's errors, mask and confidence in one piece, and of its probabilities."""
        layout, output = request.layout, request.staging.output
        self._driver.queue_after(self._download, self._compute)
        for index, classes in enumerate(request.classes):
            if not classes or index in request.errors:
                continue
            start = index * layout.stride
            output.download(start, layout.bytes, self._download)
            size = layout.probability_bytes(1 + len(classes))
            output.download(start + layout.probabilities, size, self._download)
        self._driver.record_event(request.staging.done, self._download)

    def _reusable_outputs(self, shape: tuple[int, ...]) -> dict[str, DeviceArray]:
        """The networks' outputs of an earlier batch of this shape, to be overwritten."""
        self._evict(self._outputs, shape)
        return self._outputs.setdefault(shape, {})

    def _postprocessor_for(self, shape: PostprocessShape) -> GpuPostprocessor:
        self._evict(self._postprocessors, shape)
        if shape not in self._postprocessors:
            parameters = self._manifest.parameters.label
            self._postprocessors[shape] = GpuPostprocessor(self._device, shape, parameters)
        return self._postprocessors[shape]

    def _evict(self, kept: OrderedDict[Any, Any], key: Any) -> None:
        """Mark `key` as used; if it is new, release the least recently used entries to make room for it."""
        if key in kept:
            kept.move_to_end(key)
            return
        while len(kept) >= MAX_SIZES:
            self._driver.synchronise(self._compute)  # queued work may use the memory
            kept.popitem(last=False)

    @contextlib.contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except self._device.errors as error:
            raise BackendError(f"labelling cannot be run on {self._device.name}: {error}") from error

    @contextlib.contextmanager
    def _synchronised_on_failure(self) -> Iterator[None]:
        """After a failure, wait for work queued before it: it uses memory that other calls will reuse."""
        try:
            yield
        except BaseException:
            with self._queueing:
                for stream in self._streams:
                    with contextlib.suppress(*self._device.errors):
                        self._driver.synchronise(stream)
                self._postprocessors.clear()  # their error words may belong to this call
            raise


def _close(device: PycudaDevice, streams: Sequence[int], events: Sequence[int]) -> None:
    """Wait for the streams, then release them and the events."""
    with device.active():
        for stream in streams:
            device.driver.synchronise(stream)
            device.driver.destroy_stream(stream)
        for event in events:
            device.driver.destroy_event(event)
