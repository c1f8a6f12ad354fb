"""Logs as JSON lines: `--log-json PATH|-` writes one object for each event.

Every line has time (UTC, ISO 8601), level and event; the other keys are the event's own.
"""

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from multisa.runtime.errors import UsageError
from multisa.runtime.progress import log

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
        self._messages = _EventHandler(self)
        self._shown: list[logging.Handler] = []
        try:
            self._descriptor = sys.stderr.fileno() if self.on_stderr else _open_for_lines(Path(target))
        except OSError as error:
            raise UsageError(
                f"{target}: cannot be opened for the log: {error.strerror or error}: name a file in a folder "
                "that is there, or - for stderr"
            ) from error

    def __enter__(self) -> Self:
        if self.on_stderr:
            self._shown = log.handlers[:]
            log.handlers[:] = [self._messages]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.on_stderr:
            log.handlers[:] = self._shown
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
            log.info(f"{self._target}: the log ends here: {problem}")


class _EventHandler(logging.Handler):
    """Turns messages for people into events, so that every line on stderr is JSON."""

    def __init__(self, events: JsonLog) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message as one event."""
        self._events.event("message", message=record.getMessage())


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


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOCALHOST = "127.0.0.1"  # nobody else is told, unless asked

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_CLIENT_SECONDS = 5  # for a request; one that stalls is let go


@dataclass(frozen=True)
class Metric:
    """One family: a value for each value of its one label, or without a label under the key ""."""

    name: str
    help: str
    kind: Literal["counter", "gauge"]
    values: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


def render_metrics(metrics: list[Metric]) -> str:
    """The families as text; one without values has its HELP and TYPE only."""
    lines = []
    for metric in metrics:
        text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {metric.name} {text}", f"# TYPE {metric.name} {metric.kind}"]
        for key, value in metric.values.items():
            label = f'{{{metric.label}="{key.translate(_ESCAPES)}"}}' if metric.label else ""
            lines.append(f"{metric.name}{label} {float(value)!r}")
    return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Memory of this process in bytes, where the system tells it as Linux does."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class MetricsServer:
    """Answers GET /metrics with what `collect` gives, from daemon threads; a context manager.

    port 0 takes a free one. Raises UsageError for a port or host that cannot be had.
    """

    def __init__(self, collect: Callable[[], list[Metric]], port: int, host: str = LOCALHOST) -> None:
        if not 0 <= port <= 65535:
            raise UsageError(f"got {port} as the port for metrics, expected 1..65535, or 0 for a free one")
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(collect))
        except OSError as error:
            raise UsageError(
                f"metrics cannot be served on {host}:{port}: {error.strerror or error}: "
                "another run may have the port: name another with --metrics-port"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(collect: Callable[[], list[Metric]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_SECONDS

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/metrics", "/"):
                self.send_error(404, "expected /metrics")
                return
            body = render_metrics(collect()).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A scrape every few seconds is no news."""

        def version_string(self) -> str:
            return "multisa"

    return Handler


PROGRESS_INTERVAL = 10.0  # seconds between "progress" events
RATE_WINDOW = 60.0  # seconds that images/s looks back


class Telemetry:
    """Counts a run's events; with nothing asked for it costs a lock and a few additions for each image.

    Every method may be called from any thread. Raises UsageError for a log or a port that cannot be had.
    """

    def __init__(
        self, log_json: str | None = None, metrics_port: int | None = None, metrics_host: str = LOCALHOST
    ) -> None:
        self._lock = threading.Lock()
        self._images = self._done = self._shards = self._in_flight = 0
        self._failed: dict[str, int] = {}
        self._busy: dict[str, float] = {}
        self._queues: dict[str, int] = {}
        self._start = self._last_progress = time.monotonic()
        self._ticks: deque[tuple[float, int]] = deque([(self._start, 0)])  # at most one a second
        self._stack = ExitStack()
        self._log = None if log_json is None else self._stack.enter_context(JsonLog(log_json))
        self.metrics_port: int | None = None
        try:
            if metrics_port is not None:
                server = MetricsServer(self.metrics, metrics_port, metrics_host)
                self.metrics_port = self._stack.enter_context(server).port
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run_started(self, command: str, images: int, kept: int = 0, **fields: Any) -> None:
        """A run of `images` begins; `kept` of them were committed by earlier runs and are not counted."""
        with self._lock:
            self._images = images - kept
            self._start = time.monotonic()
            self._ticks = deque([(self._start, 0)])
        self._tell("run started", command=command, images=images, kept=kept, **fields)

    def image_done(self, seconds_by_stage: Mapping[str, float]) -> None:
        """An image is done; the seconds each stage spent on it."""
        with self._lock:
            self._done += 1
            self._add_busy(seconds_by_stage)
            progress = self._tick()
        if progress:
            self._tell("progress", **progress)

    def image_failed(self, image: str, reason: str, kind: str) -> None:
        """An image failed; kind: one of few words, as the name of the exception's class."""
        with self._lock:
            self._failed[kind] = self._failed.get(kind, 0) + 1
        self._tell("image failed", "warning", image=image, reason=reason, kind=kind)

    def stage_busy(self, stage: str, seconds: float) -> None:
        """A stage worked for some seconds that are not of one image: a commit, a batch."""
        with self._lock:
            self._add_busy({stage: seconds})

    def shard_committed(self, number: int, images: int) -> None:
        """A shard is on the disk."""
        with self._lock:
            self._shards += 1
        self._tell("shard committed", shard=number, images=images)

    def queue_depth(self, stage: str, depth: int) -> None:
        """So many images wait for `stage`."""
        with self._lock:
            self._queues[stage] = depth

    def in_flight(self, images: int) -> None:
        """So many images are between source and commit."""
        with self._lock:
            self._in_flight = images

    def run_finished(self, status: str = "done", **fields: Any) -> None:
        """The run is over; status: "done", "interrupted", "failed"."""
        with self._lock:
            totals = self._totals()
        self._tell(
            "run finished", "info" if status == "done" else "warning", status=status, **totals, **fields
        )

    def metrics(self) -> list[Metric]:
        """Everything counted, as families of Prometheus."""
        with self._lock:
            rate, failed = self._rate(time.monotonic()), dict(self._failed)
            busy, queues = dict(self._busy), dict(self._queues)
            images, done, shards, in_flight = self._images, self._done, self._shards, self._in_flight
        memory = resident_bytes()
        held: dict[str, float] = {} if memory is None else {"": memory}
        return [
            Metric("multisa_images", "Images this run has to do.", "gauge", {"": images}),
            Metric("multisa_images_done_total", "Images done by this run.", "counter", {"": done}),
            Metric("multisa_images_failed_total", "Images that failed.", "counter", failed, "kind"),
            Metric("multisa_images_per_second", "Images done, of the last minute.", "gauge", {"": rate}),
            Metric("multisa_stage_busy_seconds_total", "Worker seconds at work.", "counter", busy, "stage"),
            Metric("multisa_queue_depth", "Images that wait for a stage.", "gauge", queues, "stage"),
            Metric("multisa_shards_committed_total", "Shards on the disk.", "counter", {"": shards}),
            Metric("multisa_images_in_flight", "Images not yet committed.", "gauge", {"": in_flight}),
            Metric("process_resident_memory_bytes", "Memory of the process.", "gauge", held),
        ]

    def _tell(self, event: str, level: Any = "info", **fields: Any) -> None:
        if self._log is not None:
            self._log.event(event, level, **fields)

    # The rest is called with the lock held.

    def _add_busy(self, seconds_by_stage: Mapping[str, float]) -> None:
        for stage, seconds in seconds_by_stage.items():
            self._busy[stage] = self._busy.get(stage, 0.0) + seconds

    def _tick(self) -> dict[str, Any] | None:
        """Note the time once a second; every PROGRESS_INTERVAL the fields of a "progress" event."""
        now = time.monotonic()
        if now - self._ticks[-1][0] >= 1:
            self._ticks.append((now, self._done))
            while len(self._ticks) > 2 and now - self._ticks[1][0] > RATE_WINDOW:
                self._ticks.popleft()
        if self._log is None or now - self._last_progress < PROGRESS_INTERVAL:
            return None
        self._last_progress = now
        return self._totals() | {"images_per_second": round(self._rate(now), 3)}

    def _rate(self, now: float) -> float:
        start, done = self._ticks[0]
        return (self._done - done) / max(now - start, 1e-9) if self._done > done else 0.0

    def _totals(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._start, 3)
        return {"done": self._done, "failed": sum(self._failed.values()), "seconds": seconds}
