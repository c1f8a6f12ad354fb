"""Parts of the pipeline: its configuration, thread pools, limits on what is in flight, a circuit breaker."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.jobs.snapshot import Sample

# Consecutive images, each tried twice, that a backend may fail on before it counts as broken.
MAX_CONSECUTIVE_FAILURES = 8


@dataclass(frozen=True)
class Failure:
    """An image that could not be processed."""

    index: int  # position in the run
    image: str  # id
    kind: str  # the stage ("read", "decode", "predict", "postprocess", "encode"), or "process" if one died
    reason: str


class RunObserver(Protocol):
    """Is notified of what happens in a run, from any thread; subclasses ignore what they do not define."""

    def image_done(self, sample: Sample) -> None:
        return

    def image_failed(self, failure: Failure) -> None:
        return

    def stage_busy(self, stage: str, seconds: float) -> None:
        return

    def queue_depth(self, stage: str, images: int) -> None:
        return

    def in_flight(self, images: int) -> None:
        return


@dataclass(frozen=True)
class PipelineConfig:
    """Threads and limits of the stages. Only `batch` and `look_ahead` can change a byte of the results."""

    readers: int
    workers: int  # threads of each of decode, predict and postprocess
    batch: int = 1  # images of one size that a backend gets at once
    look_ahead: int = 64  # images that may wait for others of their size
    separate_decoders: bool = True  # False: the readers decode too, since a disk hardly keeps them waiting
    max_raw_bytes: int = 256 << 20  # of files that are read and not yet decoded

    def threads_of(self, stage: str) -> int:
        """Number of threads of a stage, or of the stage that a name of the timer belongs to."""
        decoders = self.workers if self.separate_decoders else self.readers
        return {"read": self.readers, "decode": decoders, "commit": 1}.get(stage, self.workers)

    @property
    def max_in_flight(self) -> int:
        """Images between source and commit, at most."""
        waiting = self.look_ahead if self.batch > 1 else 0
        return waiting + self.readers + 6 * self.workers * self.batch


@dataclass(frozen=True)
class Concurrency:
    """Threads of all workers together, and the cores of their machines."""

    pipelines: tuple[PipelineConfig, ...]  # one for each worker process
    cores: int

    def threads_of(self, stage: str) -> int:
        """Threads of a stage, summed over the worker processes."""
        return sum(pipeline.threads_of(stage) for pipeline in self.pipelines)

    @property
    def workers(self) -> int:
        """Worker threads, summed over the worker processes."""
        return sum(pipeline.workers for pipeline in self.pipelines)


class StopSignal:
    """Tells every thread of a pipeline to stop, and wakes those that wait.

    The first error is kept; each thread that reports it raises a copy of its own, since one exception object
    must not be raised in several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._is_set = False
        self._listeners: list[Callable[[], None]] = []

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` once, as soon as the signal is set."""
        self._listeners.append(listener)

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._is_set

    def set(self, error: BaseException | None = None) -> None:
        """Stop; error: what a stage raised, None for a regular end."""
        with self._lock:
            self._error = self._error or error
            first, self._is_set = not self._is_set, True
        for listener in self._listeners if first else ():
            listener()

    def error(self) -> BaseException | None:
        """A new copy of the error, with the original as its cause; None if there is none."""
        if self._error is None:
            return None
        try:
            error = copy(self._error)
        except Exception:  # noqa: BLE001  # of a class whose arguments are not those of its instances
            error = RuntimeError(f"{type(self._error).__name__}: {self._error}")
        error.__cause__ = self._error
        return error

    def check(self) -> None:
        """Raise the error, or RuntimeError if the pipeline was closed."""
        if (error := self.error()) is not None:
            raise error
        if self._is_set:
            raise RuntimeError("the pipeline is closed")


class WeightedSemaphore:
    """Bounds the sum of the weights in use. An item heavier than the limit is admitted when it is alone."""

    def __init__(self, limit: int, stop: StopSignal) -> None:
        self._limit = limit
        self._stop = stop
        self._used = 0
        self._changed = threading.Condition()
        stop.add_listener(lambda: self.release(0))  # wakes those that wait

    def acquire(self, weight: int = 1) -> None:
        """Wait until `weight` fits, or until the pipeline stops."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + weight <= self._limit or self._stop.is_set())
            self._used += weight

    def release(self, weight: int = 1) -> None:
        """Give back; a negative weight takes more without waiting."""
        with self._changed:
            self._used -= weight
            self._changed.notify_all()


class Stage:
    """The thread pool of one stage, and the number of images that wait for it."""

    def __init__(self, name: str, threads: int, stop: StopSignal, observer: RunObserver) -> None:
        self._name = name
        self._stop = stop
        self._observer = observer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"multisa-{name}")
        self._waiting = 0
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Queue a call. What it raises stops the pipeline; once that is stopped, queued calls are dropped."""
        self._count(1)
        self._pool.submit(self._run, function, *arguments)

    def close(self) -> None:
        """Wait for the calls that are running and drop those that are queued."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._count(-1)
            if not self._stop.is_set():
                function(*arguments)
        except BaseException as error:  # noqa: BLE001  # raised again in the thread that waits for the shard
            self._stop.set(error)

    def _count(self, change: int) -> None:
        with self._lock:
            self._waiting += change
            waiting = self._waiting
        self._observer.queue_depth(self._name, waiting)


class CircuitBreaker:
    """Distinguishes images that a backend cannot process from a backend that no longer works."""

    def __init__(self) -> None:
        self._failures = 0  # consecutive
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """Count an image that was processed."""
        with self._lock:
            self._failures = 0

    def failed(self, image: str, error: BackendError) -> None:
        """Count an image that failed twice. Raises BackendUnavailable if too many failed in a row.

        A lost device fails on every remaining image, and that must not become one failure per image.
        """
        with self._lock:
            self._failures += 1
            broken = self._failures >= MAX_CONSECUTIVE_FAILURES
        if broken:
            raise BackendUnavailable(
                f"{error} ({image}, and the {MAX_CONSECUTIVE_FAILURES - 1} images tried before it)",
                remedy="check the device and its memory, or choose another --backend, then run the same "
                "command again to resume",
            ) from error
