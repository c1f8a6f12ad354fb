"""The stages of the pipeline: how wide they are, their threads, and who is told what happens in them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.jobs.snapshot import Sample


@dataclass(frozen=True)
class Failure:
    """An image that could not be done."""

    index: int
    image: str  # id
    kind: str  # the stage: "read", "decode", "infer", "refine" or "encode"; "process" where one was lost
    reason: str


class RunObserver(Protocol):
    """Is told what happens, from any thread."""

    def image_done(self, work: Sample) -> None: ...

    def image_failed(self, failure: Failure) -> None: ...

    def stage_busy(self, stage: str, seconds: float) -> None: ...

    def queue_depth(self, stage: str, images: int) -> None: ...

    def in_flight(self, images: int) -> None: ...


@dataclass(frozen=True)
class PipelineConfig:
    """How wide each stage is; nothing here but `batch` can change a byte."""

    readers: int
    workers: int  # threads of each of decode, infer and refine
    batch: int = 1  # images of one size that an engine gets at once
    look_ahead: int = 64  # images that may wait for others of their size
    decode_apart: bool = True  # in threads of its own; else in those that read, which a disk does not stop
    raw_bytes: int = 256 << 20  # of files that were read and are not decoded yet

    def threads_of(self, stage: str) -> int:
        """How many threads a stage has, or the one that a name of the clock is a part of."""
        decoders = self.workers if self.decode_apart else self.readers
        return {"read": self.readers, "decode": decoders, "commit": 1}.get(stage, self.workers)

    @property
    def max_in_flight(self) -> int:
        """Images under way at once."""
        waiting = self.look_ahead if self.batch > 1 else 0
        return waiting + self.readers + 6 * self.workers * self.batch


@dataclass(frozen=True)
class Concurrency:
    """How wide the stages of all who do shards are together, and the cores of their machines."""

    members: tuple[PipelineConfig, ...]
    cores: int

    def threads_of(self, stage: str) -> int:
        """As of Sizes, added up."""
        return sum(sizes.threads_of(stage) for sizes in self.members)

    @property
    def workers(self) -> int:
        """As of Sizes, added up."""
        return sum(sizes.workers for sizes in self.members)


class Stage:
    """The threads of one stage, and how many images wait for them."""

    def __init__(
        self,
        name: str,
        threads: int,
        *,
        stopped: threading.Event,
        failed: Callable[[BaseException], None],
        watcher: RunObserver,
    ) -> None:
        """Drop what is queued once `stopped` is set; tell `failed` what the work has raised."""
        self._name, self._stopped, self._failed, self._watcher = name, stopped, failed, watcher
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"multisa-{name}")
        self._waiting = 0
        self._lock = threading.Lock()

    def start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Queue some work."""
        self._count(1)
        self._pool.submit(self._unless_stopped, work, *arguments).add_done_callback(self._note)

    def close(self) -> None:
        """Wait for what is being done; what waits is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _unless_stopped(self, work: Callable[..., None], *arguments: Any) -> None:
        self._count(-1)
        if not self._stopped.is_set():
            work(*arguments)

    def _count(self, change: int) -> None:
        with self._lock:
            self._waiting += change
            waiting = self._waiting
        self._watcher.queue_depth(self._name, waiting)

    def _note(self, future: "Future[None]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._failed(error)


# Images in a row that an engine refuses, each of them twice, until it is taken for broken.
MAX_REFUSED = 8
_PATIENCE = 0.2  # seconds between looks at whether the run was stopped


class ByteSemaphore:
    """Bounds the bytes of files that were read and are not decoded yet; for several threads.

    Whoever decodes needs nothing of it, so what is held is always given back.
    """

    def __init__(self, most: int, stopped: threading.Event) -> None:
        self._most, self._stopped = most, stopped
        self._held = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait for room, or for the end of the run; what is larger than all there is goes alone."""
        with self._changed:
            while self._held and self._held + size > self._most and not self._stopped.is_set():
                self._changed.wait(_PATIENCE)
            self._held += size

    def change(self, difference: int) -> None:
        """Give back (below 0), or note that a file was larger than its source has said."""
        with self._changed:
            self._held += difference
            self._changed.notify_all()


class CircuitBreaker:
    """Tells images that an engine cannot take from an engine that cannot be used any more."""

    def __init__(self) -> None:
        self._refused = 0
        self._lock = threading.Lock()

    def works(self) -> None:
        """Note that an image has passed."""
        with self._lock:
            self._refused = 0

    def refuses(self, image: str, error: BackendError) -> None:
        """Note that an image was refused twice. Raises BackendUnavailable where that is not due to images.

        A device that is lost refuses all that is left, which must not become a failure of each image.
        """
        with self._lock:
            self._refused += 1
            broken = self._refused >= MAX_REFUSED
        if broken:
            raise BackendUnavailable(
                f"{error} ({image}, and the {MAX_REFUSED - 1} images tried before it)",
                remedy="see to the device and its memory, or take another --backend: the same command goes on",
            ) from error
