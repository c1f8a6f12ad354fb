"""What the command line asks of a run, as a job, its options and who does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.errors import UsageError
from multisa.runtime.jobs.executor import Executor
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job, RunOptions, make_job
from multisa.runtime.jobs.telemetry import LOCALHOST, Telemetry

_OPTIONS = (
    "workers",
    "readers",
    "batch",
    "shard_size",
    "max_pixels",
    "max_failures",
    "report_images",
    "retry_failed",
    "overwrite",
    "skip_source_check",
    "verify",
)

_TOLD = ("log_json", "metrics_port", "metrics_host")


@dataclass(frozen=True)
class RunRequest:
    """A run that is asked for."""

    job: Job
    options: RunOptions
    num_processes: int = 1
    ray: str | None = None
    log_json: str | None = None  # a file, or - for stderr
    metrics_port: int | None = None
    metrics_host: str = LOCALHOST

    @classmethod
    def from_arguments(cls, command: str, bundle: Path, arguments: Mapping[str, Any]) -> Self:
        """From the names and values of the command line's options; None where one was not given."""
        given = {name: arguments[name] for name in _OPTIONS if arguments[name] is not None}
        if writers := tuple(name for some in arguments["writers"] for name in some.split(",") if name):
            given["writers"] = writers
        options = RunOptions(**given)
        backend = BackendRequest(arguments["backend"], arguments["precision"], arguments["engine_cache"])
        if arguments["ray"] and arguments["num_processes"]:
            raise UsageError("got both --ray and --num-processes, expected one of them")
        job = make_job(
            command,
            arguments["images"],
            arguments["output"],
            bundle,
            backend,
            options,
            storage_options=arguments["storage_options"],
            image_prefix=arguments["image_prefix"] or "",
        )
        told = {name: arguments[name] for name in _TOLD if arguments[name] is not None}
        return cls(job, options, arguments["num_processes"] or 1, arguments["ray"], **told)

    def telemetry(self) -> Telemetry:
        """What is told of the run. Raises UsageError for a log or a port that cannot be had."""
        return Telemetry(self.log_json, self.metrics_port, self.metrics_host)

    def make_executor(self, job: Job, monitor: RunMonitor) -> Executor:
        """This process, several, or a cluster."""
        from multisa.runtime.jobs.executors import make_executor

        return make_executor(job, monitor, num_processes=self.num_processes, ray_address=self.ray)
