"""Messages and progress on stderr.

The library logs to the logger "multisa" and prints nothing by itself; the command line shows messages and
progress with `console`. Progress is a bar with rate and time left on a terminal, and a line every ten seconds
in a log file.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:  # help of the command line does without
    from tqdm import tqdm

log = logging.getLogger("multisa")

EXAMPLES_SHOWN = 3  # names that a message lists before "and N more"
LINE_INTERVAL = 10.0  # seconds between lines when stderr is not a terminal


class ConsoleHandler(logging.Handler):
    """Writes messages to the current sys.stderr without tearing a progress bar.

    A stderr that was closed loses the messages, never the run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        from tqdm import tqdm

        if sys.stderr is None:  # tqdm would write to stdout
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def console(*, quiet: bool = False) -> Iterator[None]:
    """Show messages and progress on stderr; with `quiet` only warnings and errors."""
    handlers = log.handlers[:]
    level = log.level
    log.handlers = [*(h for h in handlers if not isinstance(h, ConsoleHandler)), ConsoleHandler()]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.handlers = handlers
        log.setLevel(level)


def shows_progress() -> bool:
    """Whether `console` is active, and not quiet."""
    return log.isEnabledFor(logging.INFO) and any(isinstance(h, ConsoleHandler) for h in log.handlers)


def pluralize(number: int, noun: str) -> str:
    """A number and what it counts: "1 image", "2 images"; `noun` is one that takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_examples(names: Sequence[str], count: int | None = None) -> str:
    """The first EXAMPLES_SHOWN names, and how many more there are of `count` (`len(names)` by default)."""
    count = len(names) if count is None else count
    more = f" and {count - EXAMPLES_SHOWN} more" if count > EXAMPLES_SHOWN else ""
    return ", ".join(names[:EXAMPLES_SHOWN]) + more


class Progress:
    """Counts finished items; a context manager. The rate leaves out `initial` items, finished before.

    >>> with Progress(total=3, description="label", unit="image") as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    """

    def __init__(self, total: int, description: str, unit: str = "image", initial: int = 0) -> None:
        self._total = total
        self._description = description
        self._unit = unit
        self._initial = initial
        self._done = initial
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._is_shown = shows_progress()
        self._bar = self._open_bar() if self._is_shown and _is_terminal() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` items as finished; `note` (a loss, a stage) is shown behind the rate."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._is_shown and time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.monotonic()
            log.info(self._line())

    def _open_bar(self) -> "tqdm[NoReturn]":
        from tqdm import tqdm

        return tqdm(
            total=self._total,
            initial=self._initial,
            desc=self._description,
            unit=self._unit,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def _line(self) -> str:
        rate = (self._done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        line = (
            f"{self._description}: {self._done}/{self._total} {self._unit}s, {rate:.2f}/s, {left:.0f} s left"
        )
        return f"{line}, {self._note}" if self._note else line


def _is_terminal() -> bool:
    """Whether stderr is a terminal; False where it was closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
