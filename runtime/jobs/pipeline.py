"""Shards and images on their way through the pipeline."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import BackendError, ImageError, MultisaError
from multisa.runtime.imaging.decode import DecodedImage
from multisa.runtime.jobs.encoder import EncodedImage, Encoder
from multisa.runtime.jobs.snapshot import Sample, Shard
from multisa.runtime.jobs.stages import (
    ByteSemaphore,
    CircuitBreaker,
    Failure,
    PipelineConfig,
    RunObserver,
    Stage,
)
from multisa.runtime.predict.prediction import Predictor, StageTimer
from multisa.runtime.sources.base import Source


@dataclass(frozen=True, eq=False)
class CompletedShard:
    """A shard whose images are all encoded, or failed, in their order."""

    shard: Shard
    images: Sequence[EncodedImage]
    failures: Sequence[Failure]


@dataclass(eq=False)
class ShardState:
    """A shard under way; its lists have a place for each image."""

    shard: Shard
    commit: Callable[[CompletedShard], None]
    left: int
    images: list[EncodedImage | None]
    failures: list[Failure | None]
    finished: Future[None] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """An image under way."""

    open: ShardState
    position: int
    work: Sample
    decoded: "Future[DecodedImage | StageFailed]" = field(default_factory=Future)  # where it is waited for


@dataclass(frozen=True, eq=False)
class DecodedTask:
    fed: ImageTask
    image: DecodedImage


@dataclass(frozen=True, eq=False)
class StageFailed:
    """An image's error on its way from a stage to the one that counts."""

    kind: str
    error: MultisaError | MemoryError


UInt8 = npt.NDArray[np.uint8]

_OPEN_SHARDS = 3  # one is fed, one ends, one is written; more would only wait for the disk
_ON_CPU = ("onnxruntime-cpu", "openvino")  # the engines whose work and ours are done by the same cores
_PATIENCE = 0.2  # seconds between looks at whether a stage has raised


class Pipeline:
    """Does shards; a context manager. `submit` and `wait` raise whatever a stage has raised unexpectedly."""

    def __init__(
        self,
        predictor: Predictor,
        source: Source,
        encoder: Encoder,
        *,
        sizes: PipelineConfig,
        timer: StageTimer,
        watcher: RunObserver,
        max_pixels: int,
    ) -> None:
        self._predictor = predictor
        self._source = source
        self._encoder = encoder
        self._sizes, self._timer, self._watcher = sizes, timer, watcher
        self._max_pixels = max_pixels
        self._permits = threading.Semaphore(sizes.max_in_flight)
        self._open_shards = threading.Semaphore(_OPEN_SHARDS)
        self._feeding, self._counting = threading.Lock(), threading.Lock()
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._raw, self._health = ByteSemaphore(sizes.raw_bytes, self._stopped), CircuitBreaker()
        self._in_order: queue.SimpleQueue[tuple[ShardState, ImageTask | None] | None]
        self._in_order = queue.SimpleQueue()
        self._in_flight = 0
        # Where the engines are the processor's own, no other stage can do something meanwhile: an image stays
        # in its thread, which spares it the way through another queue.
        self._refine_apart = any(choice.backend.name not in _ON_CPU for choice in predictor.backends)
        names = ("read", "decode", "infer", "refine", "commit")
        self._stages = [
            Stage(name, sizes.threads_of(name), stopped=self._stopped, failed=self._stop, watcher=watcher)
            for name in names
        ]
        self._readers, self._decoders, self._backends, self._refiners, self._committer = self._stages
        self._gatherer = threading.Thread(target=self._gather_or_note, name="gather", daemon=True)
        self._gatherer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()  # what is queued is dropped; what is being done ends
        self._in_order.put(None)
        self._gatherer.join()
        for stage in self._stages:  # in this order none can start work in one that is closed
            stage.close()

    def submit(self, shard: Shard, commit: Callable[[CompletedShard], None]) -> Future[None]:
        """Feed the images of a shard as permits come back; `commit` is called in a thread of its own.

        The future is done when `commit` has returned.
        """
        self._take(self._open_shards)
        count = len(shard.works)
        open_ = ShardState(shard, commit, count, [None] * count, [None] * count)
        with self._feeding:
            for position, work in enumerate(shard.works):
                self._take(self._permits)
                self._count_under_way(1)
                fed = ImageTask(open_, position, work)
                if self._sizes.batch > 1:
                    self._in_order.put((open_, fed))
                self._readers.start(self._read, fed)
            if self._sizes.batch > 1:
                self._in_order.put((open_, None))
            if not count:
                self._close_shard(open_)
        return open_.finished

    def wait(self, future: Future[None]) -> None:
        """Wait for a shard. Raises what a stage has raised."""
        while True:
            try:
                return future.result(timeout=_PATIENCE)
            except TimeoutError:
                self._raise_error()

    def _take(self, max_in_flight: threading.Semaphore) -> None:
        while not max_in_flight.acquire(timeout=_PATIENCE):
            self._raise_error()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stopped.set()

    def _read(self, fed: ImageTask) -> None:
        data, expected = b"", max(fed.work.item.size, 0)
        self._raw.take(expected)
        try:
            with self._timer.stage("read"):
                data = self._source.read(fed.work.item)
        except ImageError as error:
            # A disk that is gone must not become a failure of each of a million images.
            if not self._source.exists(fed.work.item):
                raise MultisaError(
                    f"{self._source.description}: was there, and cannot be reached any more "
                    f"({fed.work.item.id}: {error}): bring it back, and the same command goes on"
                ) from error
            self._decoded(fed, StageFailed("read", error))
            return
        except MemoryError as error:
            self._decoded(fed, StageFailed("read", error))
            return
        finally:
            self._raw.change(len(data) - expected)
        if self._sizes.decode_apart:
            self._decoders.start(self._decode, fed, data)
        else:
            self._decode(fed, data)

    def _decode(self, fed: ImageTask, data: bytes) -> None:
        try:
            with self._timer.stage("decode"):
                image = self._predictor.decode(data, max_pixels=self._max_pixels)
        except (ImageError, MemoryError) as error:
            self._decoded(fed, StageFailed("decode", error))
            return
        finally:
            self._raw.change(-len(data))
        self._decoded(fed, image)

    def _decoded(self, fed: ImageTask, image: DecodedImage | StageFailed) -> None:
        """Hand an image on: to those that wait for others of its size, or to the engine alone."""
        if self._sizes.batch > 1:
            fed.decoded.set_result(image)
        elif isinstance(image, StageFailed):
            self._fail(fed, image.kind, image.error)
        else:
            self._backends.start(self._infer, [DecodedTask(fed, image)])

    def _gather_or_note(self) -> None:
        try:
            self._gather()
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits for the shard
            self._stop(error)

    def _gather(self) -> None:
        """Put decoded images, in their order, into batches of one size."""
        groups: dict[tuple[int, ...], list[DecodedTask]] = {}
        while (entry := self._in_order.get()) is not None:
            fed = entry[1]
            if fed is None:  # the end of a shard
                for group in groups.values():
                    self._backends.start(self._infer, group)
                groups = {}
                continue
            image = self._result(fed.decoded)
            if isinstance(image, StageFailed):
                self._fail(fed, image.kind, image.error)
            elif image is not None:
                self._group(groups, DecodedTask(fed, image))

    def _group(self, groups: dict[tuple[int, ...], list[DecodedTask]], ready: DecodedTask) -> None:
        group = groups.setdefault(ready.image.rgb.shape, [])
        group.append(ready)
        full = len(group) >= self._sizes.batch
        if full or sum(map(len, groups.values())) >= self._sizes.look_ahead:
            # Of the groups that wait, the one whose first image came first.
            shape = ready.image.rgb.shape if full else next(iter(groups))
            self._backends.start(self._infer, groups.pop(shape))

    def _result(self, decoded: "Future[DecodedImage | StageFailed]") -> DecodedImage | StageFailed | None:
        while not self._stopped.is_set():
            try:
                return decoded.result(timeout=_PATIENCE)
            except TimeoutError:
                continue
        return None

    def _infer(self, batch: list[DecodedTask]) -> None:
        try:
            results = self._infer_all(batch)
        except (MultisaError, MemoryError) as error:
            if len(batch) == 1:
                if isinstance(error, BackendError):
                    self._health.refuses(batch[0].fed.work.item.id, error)
                self._fail(batch[0].fed, "infer", error)
            for ready in batch if len(batch) > 1 else ():  # one bad image must not fail its neighbours
                self._infer([ready])
            return
        for ready, result in zip(batch, results, strict=True):
            if self._refine_apart:
                self._refiners.start(self._postprocess, ready, result)
            else:
                self._postprocess(ready, result)

    def _infer_all(self, batch: list[DecodedTask]) -> Sequence[Any]:
        images = np.stack([r.image.rgb for r in batch]) if len(batch) > 1 else batch[0].image.rgb[np.newaxis]
        given = [ready.fed.work.labels for ready in batch]
        try:
            results = self._predictor.predict_batch(images, given, self._timer)
        except BackendError:
            if len(batch) > 1:  # each is tried alone
                raise
            results = self._predictor.predict_batch(
                images, given, self._timer
            )  # memory may be short for a moment
        self._health.works()
        return results

    def _postprocess(self, ready: DecodedTask, inferred: Any) -> None:
        fed, stage = ready.fed, "refine"
        try:
            prediction = self._predictor.postprocess(inferred, ready.image, self._timer)
            stage = "encode"
            with self._timer.stage("encode"):
                encoded = self._encoder.encode(fed.work, prediction)
        except (MultisaError, MemoryError) as error:
            self._fail(fed, stage, error)
            return
        fed.open.images[fed.position] = encoded
        self._watcher.image_done(fed.work)
        self._count_down(fed.open)

    def _fail(self, fed: ImageTask, kind: str, error: MultisaError | MemoryError) -> None:
        short = isinstance(error, MemoryError)
        reason = f"not enough memory for it{f': {error}' if str(error) else ''}" if short else str(error)
        failure = Failure(fed.work.index, fed.work.item.id, kind, reason)
        fed.open.failures[fed.position] = failure
        self._watcher.image_failed(failure)
        self._count_down(fed.open)

    def _count_down(self, open_: ShardState) -> None:
        self._permits.release()
        self._count_under_way(-1)
        with open_.lock:
            open_.left -= 1
            last = open_.left == 0
        if last:
            self._close_shard(open_)

    def _count_under_way(self, change: int) -> None:
        with self._counting:
            self._in_flight += change
            count = self._in_flight
        self._watcher.in_flight(count)

    def _close_shard(self, open_: ShardState) -> None:
        self._committer.start(self._commit, open_)

    def _commit(self, open_: ShardState) -> None:
        images = [image for image in open_.images if image is not None]
        failures = [failure for failure in open_.failures if failure is not None]
        with self._timer.stage("commit"):
            open_.commit(CompletedShard(open_.shard, images, failures))
        self._open_shards.release()
        open_.finished.set_result(None)
