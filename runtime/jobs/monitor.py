"""How many images may fail."""

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from multisa.runtime.errors import Interrupted, TooManyFailures, UsageError
from multisa.runtime.jobs.snapshot import Sample
from multisa.runtime.jobs.stages import Failure
from multisa.runtime.jobs.telemetry import Telemetry
from multisa.runtime.progress import EXAMPLES_SHOWN, Progress, log, pluralize


def check_failures(failures: int, images: int, allowed: str | None, out: Path) -> None:
    """Raise TooManyFailures when more of the images failed than `allowed`: a number, or a share such as "2%".

    None allows none. Raises UsageError when `allowed` is neither.
    """
    if failures > failure_limit(allowed or "0", images):
        limit = f", allowed were {allowed}" if allowed else ""
        raise TooManyFailures(
            f"{failures} of {pluralize(images, 'image')} failed{limit}: the reasons are in "
            f"{out / 'failed.jsonl'}; --retry-failed tries them again"
        )


def failure_limit(allowed: str, images: int) -> float:
    """How many of `images` may fail: "3" is 3, "2%" is 2 in a hundred. Raises UsageError for other text."""
    number, percent = allowed.removesuffix("%"), allowed.endswith("%")
    if not number.isascii() or not number.replace(".", "", 1 if percent else 0).isdigit():
        raise UsageError(
            f"got {allowed!r} as the number of failures allowed, expected N or P%, as in 3 or 2%"
        )
    return float(number) / 100 * images if percent else float(number)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAID = "stopping: the shards in hand are finished first; once more to stop at once, nothing is lost"


class StopRequest:
    """Whether, and why, no further shard shall be begun."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.too_many_failures = False

    def __bool__(self) -> bool:
        return self.signal is not None or self.too_many_failures


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request, a second one into KeyboardInterrupt; a third ends the process.

    Only a program's main thread can handle signals; elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = 0
    # A handler interrupts whoever may hold the lock of the log: what it has to say is said by a thread.
    to_say: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    speaker = threading.Thread(target=_say_all, args=(to_say,), name="signals", daemon=True)

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard > 2:  # something hangs that was to be waited for; as after any kill, nothing is lost
            os._exit(128 + number)
        if heard == 2:
            raise KeyboardInterrupt
        request.signal = number
        to_say.put(_SAID)

    speaker.start()
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        to_say.put(None)
        speaker.join()


def _say_all(messages: "queue.SimpleQueue[str | None]") -> None:
    while (message := messages.get()) is not None:
        log.info(message)


_STATUS: dict[type[BaseException], str] = {Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


class RunMonitor:
    """Counts, shows (from `begin` on) and logs; a context manager, which closes the telemetry."""

    def __init__(self, command: str, telemetry: Telemetry | None = None) -> None:
        self._command = command
        self._telemetry = telemetry or Telemetry()
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self.done = 0  # of this sitting
        self.failure_kinds: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, traceback)
            self._telemetry.run_finished("done" if error is None else _STATUS.get(type(error), "failed"))
        self._telemetry.__exit__(kind, error, traceback)

    def begin(self, images: int, done_before: int) -> None:
        """Show the progress of `images`, of which some were done before."""
        self._progress = Progress(images, self._command, initial=done_before)
        self._telemetry.run_started(self._command, images, done_before)

    @property
    def failed(self) -> int:
        """Images that have failed in this sitting."""
        return sum(self.failure_kinds.values())

    def image_done(self, work: Sample) -> None:
        """Count one."""
        self._telemetry.image_done({})
        with self._lock:
            self.done += 1
            self._advance()

    def images_done(self, count: int) -> None:
        """Count those of a shard that another process has done."""
        for _ in range(count):
            self._telemetry.image_done({})
        with self._lock:
            self.done += count
            self._advance(count)

    def image_failed(self, failure: Failure) -> None:
        """Count one, and say so while they are few."""
        self._telemetry.image_failed(failure.image, failure.reason, failure.kind)
        with self._lock:
            self.failure_kinds[failure.kind] += 1
            if self.failed <= EXAMPLES_SHOWN:
                log.info(f"{failure.image}: {failure.reason}")
            self._advance()

    def stage_busy(self, stage: str, seconds: float) -> None:
        """Add to the work of a stage."""
        self._telemetry.stage_busy(stage, seconds)

    def shard_committed(self, number: int, images: int) -> None:
        """Note one."""
        self._telemetry.shard_committed(number, images)

    def queue_depth(self, stage: str, images: int) -> None:
        """Note how many wait for a stage."""
        self._telemetry.queue_depth(stage, images)

    def in_flight(self, images: int) -> None:
        """Note how many are between source and commit."""
        self._telemetry.in_flight(images)

    def _advance(self, count: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(count, note=f"{self.failed} failed" if self.failed else "")
