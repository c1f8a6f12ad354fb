"""Messages and progress on stderr.

The library logs to the logger "multisa" and prints nothing itself. The command line shows messages and
progress with `console`: a bar with rate and remaining time on a terminal, a line every ten seconds elsewhere.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:  # --help must not load tqdm
    from tqdm import tqdm

log = logging.getLogger("multisa")
log.setLevel(logging.INFO)  # handlers decide what is shown: a JSON log has all of it, a quiet console only warnings

EXAMPLES_SHOWN = 3  # names that a message lists before "and N more"
LINE_INTERVAL = 10.0  # seconds between lines when stderr is not a terminal


class ConsoleHandler(logging.Handler):
    """Writes messages to the current sys.stderr without breaking a progress bar.

    A closed stderr loses the messages but does not stop the run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if sys.stderr is None:  # tqdm would write to stdout
            return
        if self is not _active_console():
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def console(*, quiet: bool = False) -> Iterator[None]:
    """Show messages and progress on stderr; with `quiet`, only warnings and errors."""
    handler = ConsoleHandler(logging.WARNING if quiet else logging.INFO)
    log.addHandler(handler)
    propagated, log.propagate = log.propagate, False  # a library that configures the root logger would repeat each line
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


def shows_progress() -> bool:
    """Return whether `console` is active and not quiet."""
    handler = _active_console()
    return handler is not None and handler.level <= logging.INFO


def _active_console() -> ConsoleHandler | None:
    """The console opened last, unless a handler speaks for it, such as JSON lines on stderr."""
    if any(getattr(handler, "replaces_console", False) for handler in log.handlers):
        return None
    return next((h for h in reversed(log.handlers) if isinstance(h, ConsoleHandler)), None)


def pluralize(number: int, noun: str) -> str:
    """Format a number with its noun: "1 image", "2 images". `noun` must have a plural in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_examples(names: Sequence[str], count: int | None = None) -> str:
    """Join the first EXAMPLES_SHOWN of `count` names (by default all of them), and append "and N more"."""
    count = len(names) if count is None else count
    more = f" and {count - EXAMPLES_SHOWN} more" if count > EXAMPLES_SHOWN else ""
    return ", ".join(names[:EXAMPLES_SHOWN]) + more


class Progress:
    """Counts finished items; a context manager. The rate excludes the `initial` items of earlier runs.

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
        self._is_active = shows_progress()
        self._bar = self._open_bar() if self._is_active and _is_terminal() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` finished items; `note` (a loss, a stage) appears after the rate."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._is_active and time.monotonic() - self._last_line >= LINE_INTERVAL:
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
        done = f"{self._description}: {self._done}/{self._total} {self._unit}s"
        note = f", {self._note}" if self._note else ""
        return f"{done}, {rate:.2f}/s, {left:.0f} s left{note}"


def _is_terminal() -> bool:
    """Return whether stderr is a terminal; False if it is closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
