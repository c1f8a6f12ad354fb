"""What a run shows while it goes on: progress, the first failures, counts; may be told from any thread."""

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from multisa.runtime.bulk.failures import NAMED
from multisa.runtime.bulk.inventory import Work
from multisa.runtime.bulk.stages import Failure
from multisa.runtime.errors import Interrupted
from multisa.runtime.progress import Progress, say
from multisa.runtime.telemetry.telemetry import Telemetry

_STATUS: dict[type[BaseException], str] = {Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


class Watch:
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

    def image_done(self, work: Work) -> None:
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
            if self.failed <= NAMED:
                say(f"{failure.image}: {failure.reason}")
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
