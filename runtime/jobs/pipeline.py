"""Images on their way from the source to a committed shard: read, decode, predict, postprocess, encode.

Each stage has threads of its own and hands an image on as soon as it is done with it. Which images share a
batch depends on their order only, never on the timing of threads, so the results have the same bytes for any
number of threads.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from multisa.runtime.errors import BackendError, ImageError, MultisaError
from multisa.runtime.imaging.decode import DecodedImage
from multisa.runtime.jobs.shards import check_path_length
from multisa.runtime.jobs.snapshot import Sample, Shard
from multisa.runtime.jobs.stages import (
    CircuitBreaker,
    Failure,
    PipelineConfig,
    RunObserver,
    Stage,
    StopSignal,
    WeightedSemaphore,
)
from multisa.runtime.predict.prediction import Prediction, Predictor, StageTimer
from multisa.runtime.progress import log, pluralize
from multisa.runtime.sources.base import Source
from multisa.runtime.writers.base import LabelledImage, Writer

_OPEN_SHARDS = 3  # one is fed, one ends, one is written; more would only wait for the disk
_ON_CPU = ("onnxruntime-cpu", "openvino")  # backends that run on the same cores as the other stages


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a shard keeps of a finished image: small, whatever the image's size."""

    index: int
    record: bytes  # its line of labels.jsonl
    payloads: tuple[Any, ...]  # one for each writer


@dataclass(frozen=True, eq=False)
class CompletedShard:
    """A shard whose images are all encoded or failed, in their order."""

    shard: Shard
    images: Sequence[EncodedImage]
    failures: Sequence[Failure]


class ShardState:
    """A shard in flight, with a slot for each image."""

    def __init__(self, shard: Shard, on_complete: Callable[[CompletedShard], None]) -> None:
        count = len(shard.samples)
        self.shard = shard
        self.on_complete = on_complete
        self.images: list[EncodedImage | None] = [None] * count
        self.failures: list[Failure | None] = [None] * count
        self.finished: Future[None] = Future()
        self._remaining = count
        self._lock = threading.Lock()

    def count_image(self) -> bool:
        """Count an image as encoded or failed; returns whether it was the last one."""
        with self._lock:
            self._remaining -= 1
            return self._remaining == 0

    def finish(self, error: BaseException | None = None) -> None:
        """Resolve the future; the first call counts."""
        with self._lock:
            if not self.finished.done():
                if error is None:
                    self.finished.set_result(None)
                else:
                    self.finished.set_exception(error)

    def completed(self) -> CompletedShard:
        """The shard with its images and failures."""
        images = [image for image in self.images if image is not None]
        failures = [failure for failure in self.failures if failure is not None]
        return CompletedShard(self.shard, images, failures)


@dataclass(frozen=True, eq=False)
class StageFailed:
    """The error of an image, and the stage that raised it."""

    stage: str
    error: MultisaError | MemoryError


@dataclass(eq=False)
class ImageTask:
    """An image in flight."""

    state: ShardState
    position: int  # in its shard
    sample: Sample
    decoded: DecodedImage | StageFailed | None = None  # None: not decoded yet


Decoded = tuple[ImageTask, DecodedImage]


@dataclass(eq=False)
class Batcher:
    """Groups decoded images of one size, in the order of the images, whatever order they are decoded in."""

    config: PipelineConfig
    predict: Callable[[list[Decoded]], None]
    fail: Callable[[ImageTask, StageFailed], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: deque[ImageTask | None] = field(default_factory=deque)  # in order; None: the end of a shard
    _groups: dict[tuple[int, ...], list[Decoded]] = field(default_factory=dict)  # by shape

    def expect(self, task: ImageTask | None) -> None:
        """Register the next image; None: the end of a shard, which no batch crosses."""
        with self._lock:
            self._waiting.append(task)
            self._advance()

    def add(self, task: ImageTask, decoded: DecodedImage | StageFailed) -> None:
        """Add an image that was registered."""
        with self._lock:
            task.decoded = decoded
            self._advance()

    def _advance(self) -> None:
        """Take the images whose predecessors are all decoded. Called with the lock held."""
        while self._waiting:
            task = self._waiting[0]
            if task is not None and task.decoded is None:
                return
            self._waiting.popleft()
            if task is None:
                groups, self._groups = self._groups, {}
                for group in groups.values():
                    self.predict(group)
            elif isinstance(task.decoded, StageFailed):
                self.fail(task, task.decoded)
            elif task.decoded is not None:
                self._group((task, task.decoded))
                task.decoded = None  # the group holds it now

    def _group(self, decoded: Decoded) -> None:
        shape = decoded[1].rgb.shape
        group = self._groups.setdefault(shape, [])
        group.append(decoded)
        if len(group) >= self.config.batch:
            self.predict(self._groups.pop(shape))
        elif sum(map(len, self._groups.values())) >= self.config.look_ahead:
            # The group whose first image came first has waited longest.
            self.predict(self._groups.pop(next(iter(self._groups))))


@dataclass(frozen=True)
class Encoder:
    """Encodes predictions for the writers of a run; `encode` may be called from several threads at once."""

    output: Path
    writers: Sequence[Writer]

    def encode(self, sample: Sample, prediction: Prediction) -> EncodedImage:
        """Encode one prediction for every writer.

        Raises ImageError if a path of the results is too long or a format cannot hold the image.
        """
        paths = [path for writer in self.writers for path in writer.results(sample.name)]
        for path in paths:
            check_path_length(self.output, path)
        record = {"index": sample.index, "image": sample.item.id, **prediction.record()}
        if paths:
            record["mask"] = paths[0]
        labelled = LabelledImage(
            index=sample.index,
            id=sample.item.id,
            name=sample.name,
            mask=prediction.mask,
            png=prediction.png,
            confidence=prediction.confidence,
            record=record,
            probabilities=prediction.probabilities,
        )
        payloads = tuple(writer.encode(labelled) for writer in self.writers)
        return EncodedImage(sample.index, json_line(record), payloads)


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8, keys sorted; the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


class Pipeline(AbstractContextManager["Pipeline"]):
    """Processes shards; a context manager. Whatever a stage raises unexpectedly ends all shards in flight."""

    # more than six parameters: each part is passed in, so that a test can replace any of them
    def __init__(
        self,
        predictor: Predictor,
        source: Source,
        encoder: Encoder,
        *,
        config: PipelineConfig,
        timer: StageTimer,
        observer: RunObserver,
        max_pixels: int,
    ) -> None:
        self._predictor = predictor
        self._source = source
        self._encoder = encoder
        self._config = config
        self._timer = timer
        self._observer = observer
        self._max_pixels = max_pixels
        self._stop = StopSignal()
        self._images = WeightedSemaphore(config.max_in_flight, self._stop)
        self._shards = WeightedSemaphore(_OPEN_SHARDS, self._stop)
        self._raw_bytes = WeightedSemaphore(config.max_raw_bytes, self._stop)
        self._breaker = CircuitBreaker()
        self._submitting = threading.Lock()  # the images of one shard follow each other
        self._lock = threading.Lock()  # of the next two
        self._in_flight = 0
        self._unfinished: set[ShardState] = set()
        self._stop.add_listener(self._fail_unfinished)
        # Where a backend shares the cores with the other stages, nothing is gained by handing an image over.
        self._separate_postprocess = any(choice.backend.name not in _ON_CPU for choice in predictor.backends)
        self._stages = [
            Stage(name, config.threads_of(name), self._stop, observer)
            for name in ("read", "decode", "predict", "postprocess", "commit")
        ]
        self._readers, self._decoders, self._predictors, self._postprocessors, self._committer = self._stages
        self._batcher = Batcher(config, partial(self._predictors.submit, self._predict), self._fail)

    def __exit__(self, *error: object) -> None:
        self._stop.set()  # drops what is queued; calls that are running end
        for stage in self._stages:  # in this order, as a stage submits to those that follow it
            stage.close()
        for state in self._unfinished:
            state.finished.cancel()

    def submit(self, shard: Shard, on_complete: Callable[[CompletedShard], None]) -> Future[None]:
        """Feed the images of a shard, as many at a time as may be in flight.

        `on_complete` is called in the commit thread; the future is done when it has returned, and raises what
        kept the shard from being done. `submit` raises that too, if it happens before all images are fed.
        """
        self._shards.acquire()
        state = ShardState(shard, on_complete)
        with self._lock:
            self._unfinished.add(state)
        self._stop.check()
        with self._submitting:
            for position, sample in enumerate(shard.samples):
                self._images.acquire()
                self._stop.check()
                self._count_in_flight(1)
                task = ImageTask(state, position, sample)
                if self._config.batch > 1:
                    self._batcher.expect(task)
                self._readers.submit(self._read, task)
            if self._config.batch > 1:
                self._batcher.expect(None)
            if not shard.samples:
                self._committer.submit(self._commit, state)
        return state.finished

    def _fail_unfinished(self) -> None:
        with self._lock:
            unfinished = list(self._unfinished)
        for state in unfinished:
            if (error := self._stop.error()) is not None:
                state.finish(error)

    def _read(self, task: ImageTask) -> None:
        item = task.sample.item
        data = b""
        expected = max(item.size, 0)  # -1 where the source does not know
        self._raw_bytes.acquire(expected)
        try:
            with self._timer.stage("read"):
                data = self._source.read(item)
        except ImageError as error:
            # A disk that was unplugged must not become a failure of each of a million images.
            if not self._source.exists(item):
                raise MultisaError(
                    f"{self._source.description}: can no longer be reached ({item.id}: {error}): make it "
                    "available, then run the same command again to resume"
                ) from error
            self._add_decoded(task, StageFailed("read", error))
            return
        except MemoryError as error:
            self._add_decoded(task, StageFailed("read", error))
            return
        finally:
            self._raw_bytes.release(expected - len(data))
        if self._config.separate_decoders:
            self._decoders.submit(self._decode, task, data)
        else:
            self._decode(task, data)

    def _decode(self, task: ImageTask, data: bytes) -> None:
        decoded: DecodedImage | StageFailed
        try:
            with self._timer.stage("decode"):
                decoded = self._predictor.decode(data, max_pixels=self._max_pixels)
        except (ImageError, MemoryError) as error:
            decoded = StageFailed("decode", error)
        finally:
            self._raw_bytes.release(len(data))
        self._add_decoded(task, decoded)

    def _add_decoded(self, task: ImageTask, decoded: DecodedImage | StageFailed) -> None:
        if self._config.batch > 1:
            self._batcher.add(task, decoded)
        elif isinstance(decoded, StageFailed):
            self._fail(task, decoded)
        else:
            self._predictors.submit(self._predict, [(task, decoded)])

    def _predict(self, batch: list[Decoded]) -> None:
        try:
            raw = self._predict_batch(batch)
        except (MultisaError, MemoryError) as error:
            if len(batch) > 1:  # one bad image must not fail its neighbours
                log.warning(f"a batch of {pluralize(len(batch), 'image')} failed, trying one by one: {error}")
                for decoded in batch:
                    self._predict([decoded])
                return
            task, _ = batch[0]
            if isinstance(error, BackendError):
                self._breaker.failed(task.sample.item.id, error)
            self._fail(task, StageFailed("predict", error))
            return
        for (task, image), result in zip(batch, raw, strict=True):
            if self._separate_postprocess:
                self._postprocessors.submit(self._postprocess, task, image, result)
            else:
                self._postprocess(task, image, result)

    def _predict_batch(self, batch: list[Decoded]) -> Sequence[Any]:
        rgb = [image.rgb for _, image in batch]
        images = np.stack(rgb) if len(rgb) > 1 else rgb[0][np.newaxis]
        labels = [task.sample.labels for task, _ in batch]
        try:
            raw = self._predictor.predict_batch(images, labels, self._timer)
        except BackendError as error:
            if len(batch) > 1:  # each image is tried by itself
                raise
            # Memory may have been short for a moment.
            log.warning(f"{batch[0][0].sample.item.id}: trying a second time: {error}")
            raw = self._predictor.predict_batch(images, labels, self._timer)
        self._breaker.succeeded()
        return raw

    def _postprocess(self, task: ImageTask, image: DecodedImage, raw: Any) -> None:
        stage = "postprocess"
        try:
            prediction = self._predictor.postprocess(raw, image, self._timer)
            stage = "encode"
            with self._timer.stage("encode"):
                encoded = self._encoder.encode(task.sample, prediction)
        except (MultisaError, MemoryError) as error:
            self._fail(task, StageFailed(stage, error))
            return
        task.state.images[task.position] = encoded
        self._observer.image_done(task.sample)
        self._end(task)

    def _fail(self, task: ImageTask, failed: StageFailed) -> None:
        reason = str(failed.error)
        if isinstance(failed.error, MemoryError):
            reason = f"not enough memory for it: {reason}" if reason else "not enough memory for it"
        failure = Failure(task.sample.index, task.sample.item.id, failed.stage, reason)
        task.state.failures[task.position] = failure
        self._observer.image_failed(failure)
        self._end(task)

    def _end(self, task: ImageTask) -> None:
        self._images.release()
        self._count_in_flight(-1)
        if task.state.count_image():
            self._committer.submit(self._commit, task.state)

    def _count_in_flight(self, change: int) -> None:
        with self._lock:
            self._in_flight += change
            count = self._in_flight
        self._observer.in_flight(count)

    def _commit(self, state: ShardState) -> None:
        with self._timer.stage("commit"):
            state.on_complete(state.completed())
        self._shards.release()
        with self._lock:
            self._unfinished.discard(state)
        state.finish()
