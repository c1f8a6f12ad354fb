"""Telemetry of a run: a log of JSON lines (`--log-json`) and metrics for Prometheus (`--metrics-port`).

Each line of the log is an object with time (UTC, ISO 8601), level and event, and the event's own keys.
Messages for people are events too, named "message".
"""

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.progress import log

STDERR = "-"
LOCALHOST = "127.0.0.1"  # other machines can read the metrics only if the user says so
PROGRESS_INTERVAL = 10.0  # seconds between "progress" events
RATE_WINDOW = 60.0  # seconds that images/s looks back
_MAX_PORT = 65535
# Their counters exist from the start, at 0: Prometheus sees no increase in a counter that appears with its first
# failure. Other stages, such as those of a GPU, are added as they occur.
FAILURE_KINDS = ("read", "decode", "predict", "postprocess", "encode", "process")
STAGES = {
    "label": ("read", "decode", "cam", "affinity", "walk", "crf", "encode", "commit"),
    "segment": ("read", "decode", "segmenter", "encode", "commit"),
}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; `record.event` and `record.fields` are set for events."""

    def format(self, record: logging.LogRecord) -> str:
        """One object, without a line break."""
        fields = getattr(record, "fields", None)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            **({"message": record.getMessage()} if fields is None else fields),
        }
        # ASCII, so that ids that are not valid UTF-8 can be written and no name contains a line break.
        return json.dumps(line, default=str)


class JsonLog(logging.Handler):
    """Appends log messages and events to a file or to stderr; a context manager.

    Each line is one write to a file opened for appending, so a process that is killed leaves whole lines. If
    a power failure has cut the last line, it is ended before the first new one. On stderr the log replaces
    the messages for people, so that every line is JSON. Raises UsageError if the file cannot be opened. A
    write that fails later ends the log with a warning, not the run.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._target = target
        self._on_stderr = target == STDERR
        self._descriptor: int | None = None
        self.replaces_console = self._on_stderr  # every line there is JSON

    def __enter__(self) -> Self:
        try:
            self._descriptor = sys.stderr.fileno() if self._on_stderr else _open_for_lines(Path(self._target))
        except (OSError, ValueError, AttributeError) as error:  # the last two where stderr is closed
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{self._target}: cannot open the log ({reason}), expected a file in an existing folder, "
                "or - for stderr"
            ) from error
        log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        log.removeHandler(self)
        with self.lock or threading.Lock():
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None and not self._on_stderr:
                os.close(descriptor)

    def event(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        """Write one event; fields: anything JSON can hold."""
        levelname = logging.getLevelName(level)
        self.handle(logging.makeLogRecord({"levelno": level, "levelname": levelname, "event": event, "fields": fields}))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; `handle` holds the lock."""
        line = (self.format(record) + "\n").encode("ascii")
        try:
            while line and self._descriptor is not None:  # a pipe may take less than all of it
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            descriptor, self._descriptor = self._descriptor, None
            if not self._on_stderr and descriptor is not None:
                os.close(descriptor)
                log.warning(f"{self._target}: the log ends here: {error.strerror}")


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


class Telemetry:
    """Counts the events of a run, logs them and serves them as metrics; a context manager.

    Nothing is opened before it is entered, which raises UsageError for a log or a port that cannot be used
    and BackendUnavailable for metrics without prometheus_client. Outside the `with` it only counts, which
    costs a lock and a few additions per image. Every method may be called from any thread.
    """

    def __init__(
        self, log_json: str | None = None, metrics_port: int | None = None, metrics_host: str = LOCALHOST
    ) -> None:
        self.metrics_port = metrics_port  # once entered, the actual one: 0 asks for a free port
        self._metrics_host = metrics_host
        self._log = None if log_json is None else JsonLog(log_json)
        self._lock = threading.Lock()
        self._images = 0
        self._done = 0
        self._shards = 0
        self._in_flight = 0
        self._failed = dict.fromkeys(FAILURE_KINDS, 0)
        self._busy: dict[str, float] = {}  # seconds by stage
        self._queues: dict[str, int] = {}  # images by stage
        self._start = self._last_progress = time.monotonic()
        self._ticks: deque[tuple[float, int]] = deque([(self._start, 0)])  # at most one a second
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log)
            if self.metrics_port is not None:
                self.metrics_port = self._serve_metrics(stack, self.metrics_port)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run_started(self, command: str, images: int, kept: int = 0, **fields: Any) -> None:
        """A run of `images` starts; earlier runs committed `kept` of them, which are not counted."""
        with self._lock:
            self._images = images - kept
            self._busy = dict.fromkeys(STAGES.get(command, ()), 0.0) | self._busy
            self._start = time.monotonic()
            self._ticks = deque([(self._start, 0)])
        self._event("run started", command=command, images=images, kept=kept, **fields)

    def images_done(self, count: int = 1) -> None:
        """Some images are done."""
        with self._lock:
            self._done += count
            progress = self._tick()
        if progress:
            self._event("progress", **progress)

    def image_failed(self, image: str, reason: str, kind: str) -> None:
        """An image failed; kind: one of a few words, such as the name of the stage."""
        with self._lock:
            self._failed[kind] = self._failed.get(kind, 0) + 1
        self._event("image failed", logging.WARNING, image=image, reason=reason, kind=kind)

    def stage_busy(self, stage: str, seconds: float) -> None:
        """A thread of a stage worked for some seconds."""
        with self._lock:
            self._busy[stage] = self._busy.get(stage, 0.0) + seconds

    def shard_committed(self, number: int, images: int) -> None:
        """A shard is on the disk."""
        with self._lock:
            self._shards += 1
        self._event("shard committed", shard=number, images=images)

    def queue_depth(self, stage: str, depth: int) -> None:
        """`depth` images wait for `stage`."""
        with self._lock:
            self._queues[stage] = depth

    def in_flight(self, images: int) -> None:
        """`images` are between source and commit."""
        with self._lock:
            self._in_flight = images

    def run_finished(self, status: str = "done", **fields: Any) -> None:
        """The run is over; status: "done", "interrupted", "failed"."""
        with self._lock:
            totals = self._totals()
        level = logging.INFO if status == "done" else logging.WARNING
        self._event("run finished", level, status=status, **totals, **fields)

    def collect(self) -> Iterator[Any]:
        """The counts as metric families of prometheus_client, which calls this for each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def family(kind: type[Any], name: str, text: str, values: dict[str, float], label: str) -> Any:
            found = kind(name, text, labels=[label])
            for key, value in values.items():
                found.add_metric([key], value)
            return found

        with self._lock:
            rate = self._rate(time.monotonic())
            failed = {kind: float(count) for kind, count in self._failed.items()}
            busy = dict(self._busy)
            queues = {stage: float(depth) for stage, depth in self._queues.items()}
            images, done, shards, in_flight = self._images, self._done, self._shards, self._in_flight
        yield GaugeMetricFamily("multisa_images", "Images to process in this run.", images)
        yield CounterMetricFamily("multisa_images_done", "Images done by this run.", done)
        yield family(CounterMetricFamily, "multisa_images_failed", "Images that failed.", failed, "kind")
        yield GaugeMetricFamily("multisa_images_per_second", "Images done, in the last minute.", rate)
        help_ = "Worker seconds at work."
        yield family(CounterMetricFamily, "multisa_stage_busy_seconds", help_, busy, "stage")
        yield family(GaugeMetricFamily, "multisa_queue_depth", "Images waiting for a stage.", queues, "stage")
        yield CounterMetricFamily("multisa_shards_committed", "Shards on the disk.", shards)
        yield GaugeMetricFamily("multisa_images_in_flight", "Images not yet committed.", in_flight)

    def _serve_metrics(self, stack: ExitStack, port: int) -> int:
        """Serve the metrics until `stack` is closed; returns the port."""
        if not 0 <= port <= _MAX_PORT:
            raise UsageError(f"got {port} as the port for metrics, expected 1..{_MAX_PORT}, or 0 for a free one")
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
        except ImportError as error:
            raise BackendUnavailable(
                "prometheus_client is not installed", remedy='pip install "multisa[metrics]"'
            ) from error
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)  # memory and processor time of this process, on Linux
        try:
            server, thread = start_http_server(port, self._metrics_host, registry)
        except OSError as error:
            raise UsageError(
                f"metrics cannot be served on {self._metrics_host}:{port}: {error.strerror or error}: "
                "another run may use the port: choose another one with --metrics-port"
            ) from error
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        return int(server.server_port)

    def _event(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        if self._log is not None:
            self._log.event(event, level, **fields)

    # The following methods are called with the lock held.

    def _tick(self) -> dict[str, Any] | None:
        """Note the time once a second; every PROGRESS_INTERVAL return the fields of a "progress" event."""
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
