"""What the pipeline tells while it runs: counted in one place, logged and served if asked.

with Telemetry(log_json="-", metrics_port=9100) as telemetry:
    telemetry.run_started("segment", images=1000)
    telemetry.image_done({"decode": 0.01, "segmenter": 0.04})
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from multisa.runtime.telemetry.log import JsonLog
from multisa.runtime.telemetry.metrics import LOCALHOST, Metric, MetricsServer, resident_bytes

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
