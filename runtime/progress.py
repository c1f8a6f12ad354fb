"""Progress on stderr: a bar with rate and time left on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm

NAMED = 3  # how many examples a message gives
LINE_INTERVAL = 10.0  # seconds between lines when stderr is not a terminal

# Who is told instead of stderr, the last first: a log of JSON lines on stderr has no other lines between.
_listeners: list[Callable[[str], None]] = []


def say(message: str) -> None:
    """Print one line on stderr without tearing a bar that is being shown."""
    if _listeners:
        _listeners[-1](message)
    else:
        tqdm.write(message, file=sys.stderr)


@contextmanager
def redirect_said(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, what is said goes to `listener` in place of stderr, and progress is not shown."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 image", "2 images"; `noun` is one that takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def name_some(names: Sequence[str], count: int | None = None) -> str:
    """The first few names, and how many more there are of `count` (or of `names`, when they are all)."""
    count = len(names) if count is None else count
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return ", ".join(names[:NAMED]) + more


class Progress:
    """Counts finished items; a context manager. `initial` of the total were done before and have no rate.

    >>> with Progress(total=3, description="label", unit="image") as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    """

    def __init__(self, total: int, description: str, unit: str = "image", initial: int = 0) -> None:
        self._total = total
        self._description = description
        self._unit = unit
        self._initial = self._done = initial
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._bar = (
            tqdm(
                total=total, initial=initial, desc=description, unit=unit, file=sys.stderr, dynamic_ncols=True
            )
            if sys.stderr.isatty() and not _listeners
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` items as done; `note` (a loss, a stage) is shown behind the rate."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif not _listeners and time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = (self._done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        line = (
            f"{self._description}: {self._done}/{self._total} {self._unit}s, {rate:.2f}/s, {left:.0f} s left"
        )
        return f"{line}, {self._note}" if self._note else line
