"""What watches over a run: the number of failures, signals, progress."""

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from multisa.runtime.errors import Interrupted, TooManyFailures, UsageError
from multisa.runtime.jobs.snapshot import Sample
from multisa.runtime.jobs.stages import Failure
from multisa.runtime.jobs.telemetry import Telemetry
from multisa.runtime.progress import EXAMPLES_SHOWN, Progress, log, pluralize


def check_failures(failures: int, images: int, allowed: str | None, output: Path) -> None:
    """Raise TooManyFailures if more images failed than `allowed`: a number, or a share such as "2%".

    None allows none. Raises UsageError if `allowed` is neither.
    """
    if failures > failure_limit(allowed or "0", images):
        limit = f", allowed were {allowed}" if allowed else ""
        raise TooManyFailures(
            f"{failures} of {pluralize(images, 'image')} failed{limit}: the reasons are in "
            f"{output / 'failed.jsonl'}; --retry-failed tries them again"
        )


def failure_limit(allowed: str, images: int) -> float:
    """How many of `images` may fail: "3" is 3, "2%" is 2 in a hundred. Raises UsageError for other text."""
    number = allowed.removesuffix("%")
    percent = allowed.endswith("%")
    if not number.isascii() or not number.replace(".", "", 1 if percent else 0).isdigit():
        raise UsageError(f"got {allowed!r} as the number of allowed failures, expected N or P%, as in 3 or 2%")
    return float(number) / 100 * images if percent else float(number)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = "stopping after the shards in flight; interrupt again to stop at once, no committed work is lost"


@dataclass
class StopRequest:
    """Whether, and why, to start no further shard."""

    signal: int | None = None
    too_many_failures: bool = False

    def __bool__(self) -> bool:
        return self.signal is not None or self.too_many_failures


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request, a second one into KeyboardInterrupt; a third ends the process.

    Only the main thread of a program can handle signals; in any other thread nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    received = 0
    # A handler may interrupt a thread that holds the lock of the log, so another thread logs its message.
    messages: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    logger = threading.Thread(target=_log_all, args=(messages,), name="signals", daemon=True)

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 2:  # something hangs; as after any kill, no committed work is lost
            os._exit(128 + number)
        if received == 2:
            raise KeyboardInterrupt
        request.signal = number
        messages.put(_STOPPING)

    logger.start()
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        messages.put(None)
        logger.join()


def _log_all(messages: "queue.SimpleQueue[str | None]") -> None:
    for message in iter(messages.get, None):
        log.info(message)


_STATUS: dict[type[BaseException], str] = {Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


class RunMonitor:
    """Counts images, shows progress (from `start` on) and feeds telemetry, which it opens and closes.

    A context manager and a RunObserver.
    """

    def __init__(self, command: str, telemetry: Telemetry | None = None) -> None:
        self._command = command
        self._telemetry = telemetry = telemetry or Telemetry()
        self.stage_busy = telemetry.stage_busy
        self.queue_depth = telemetry.queue_depth
        self.in_flight = telemetry.in_flight
        self.shard_committed = telemetry.shard_committed
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self.done = 0  # images, in this session
        self.failure_kinds: Counter[str] = Counter()  # in this session

    def __enter__(self) -> Self:
        self._stack.enter_context(self._telemetry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if self._progress is not None:
                self._progress.__exit__(kind, error, traceback)
                self._telemetry.run_finished("done" if error is None else _STATUS.get(type(error), "failed"))

    def start(self, images: int, done_before: int) -> None:
        """Show the progress of `images`, of which `done_before` were done by earlier sessions."""
        self._progress = Progress(images, self._command, initial=done_before).__enter__()
        self._telemetry.run_started(self._command, images, done_before)

    @property
    def failed(self) -> int:
        """Images that failed in this session."""
        return sum(self.failure_kinds.values())

    def image_done(self, sample: Sample) -> None:
        """Count an image."""
        self.images_done(1)

    def images_done(self, count: int) -> None:
        """Count the images of a shard that another process has done."""
        self._telemetry.images_done(count)
        with self._lock:
            self.done += count
            self._advance(count)

    def image_failed(self, failure: Failure) -> None:
        """Count a failure; the first few are logged."""
        self._telemetry.image_failed(failure.image, failure.reason, failure.kind)
        with self._lock:
            self.failure_kinds[failure.kind] += 1
            if self.failed <= EXAMPLES_SHOWN:
                log.info(f"{failure.image}: {failure.reason}")
            self._advance(1)

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress.advance(count, note=f"{self.failed} failed" if self.failed else "")
