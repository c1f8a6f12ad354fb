"""Metrics in Prometheus' text format 0.0.4, served on a port: `--metrics-port N` (`--metrics-host`).

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from multisa.runtime.errors import UsageError

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
