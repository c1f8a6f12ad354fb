"""What a run shows while it goes on: progress, the first failures, counts; may be told from any thread."""

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from multisa.runtime.bulk.failures import NAMED
from multisa.runtime.bulk.inventory import Work
from multisa.runtime.bulk.pipeline import Failure
from multisa.runtime.progress import Progress, say


class Watch:
    """Counts and shows; a context manager. Nothing is shown before `begin`."""

    def __init__(self, command: str) -> None:
        self._command = command
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

    def begin(self, images: int, done_before: int) -> None:
        """Show the progress of `images`, of which some were done before."""
        self._progress = Progress(images, self._command, initial=done_before)

    @property
    def failed(self) -> int:
        """Images that have failed in this sitting."""
        return sum(self.failure_kinds.values())

    def image_done(self, work: Work) -> None:
        """Count one."""
        with self._lock:
            self.done += 1
            self._advance()

    def images_done(self, count: int) -> None:
        """Count those of a shard that another process has done."""
        with self._lock:
            self.done += count
            self._advance(count)

    def image_failed(self, failure: Failure) -> None:
        """Count one, and say so while they are few."""
        with self._lock:
            self.failure_kinds[failure.kind] += 1
            if self.failed <= NAMED:
                say(f"{failure.image}: {failure.reason}")
            self._advance()

    def _advance(self, count: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(count, note=f"{self.failed} failed" if self.failed else "")
