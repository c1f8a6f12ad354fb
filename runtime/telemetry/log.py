"""Logs as JSON lines: `--log-json PATH|-` writes one object for each event.

Every line has time (UTC, ISO 8601), level and event; the other keys are the event's own.
"""

import json
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from multisa.runtime.errors import UsageError
from multisa.runtime.progress import redirect_said, say

STDERR = "-"

Level = Literal["info", "warning", "error"]


class JsonLog:
    """Appends events to a file, or to stderr; a context manager. May be called from several threads.

    A line is one write to a file opened for appending, so a process that is killed leaves whole lines; the
    rest of a line that was cut by a loss of power is ended before the first new one. On stderr, what is said
    to people inside the `with` becomes events, too: every line there is JSON. Raises UsageError where the
    file cannot be opened; a write that fails later ends the log with a warning, and not the run.
    """

    def __init__(self, target: str) -> None:
        self.on_stderr = target == STDERR
        self._target = target
        self._lock = threading.Lock()
        self._broken = False
        self._redirection = redirect_said(lambda message: self.event("said", message=message))
        try:
            self._descriptor = sys.stderr.fileno() if self.on_stderr else _open_for_lines(Path(target))
        except OSError as error:
            raise UsageError(
                f"{target}: cannot be opened for the log: {error.strerror or error}: name a file in a folder "
                "that is there, or - for stderr"
            ) from error

    def __enter__(self) -> Self:
        if self.on_stderr:
            self._redirection.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.on_stderr:
            self._redirection.__exit__(kind, error, traceback)
            return
        with self._lock:
            self._broken = True
            os.close(self._descriptor)

    def event(self, event: str, level: Level = "info", **fields: Any) -> None:
        """Write one event; fields: whatever JSON has."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": time, "level": level, "event": event, **fields}
        # ASCII, so that an id that is no valid UTF-8 can be written, and no name can hold a line break.
        line = (json.dumps(record, default=str) + "\n").encode("ascii")
        with self._lock:
            if self._broken:
                return
            try:
                while line:  # a pipe may take less than all of it
                    line = line[os.write(self._descriptor, line) :]
                return
            except OSError as error:
                self._broken = True
                problem = error.strerror
        if not self.on_stderr:
            say(f"{self._target}: the log ends here: {problem}")


def _open_for_lines(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)  # OUT/run.jsonl, before there is an OUT
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
