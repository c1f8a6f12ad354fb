"""What the command line asks of a run, as a job, its options and who does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from multisa.runtime.backends.registry import EngineRequest
from multisa.runtime.errors import UsageError
from multisa.runtime.jobs.executor import Crew, LocalCrew
from multisa.runtime.jobs.monitor import Watch
from multisa.runtime.jobs.spec import Job, RunOptions, make_job
from multisa.runtime.jobs.telemetry import LOCALHOST, Telemetry

_OPTIONS = (
    *("workers", "readers", "batch", "shard_size", "max_pixels", "max_failures", "pictured"),
    *("retry_failed", "overwrite", "frozen", "verify"),
)

_TOLD = ("log_json", "metrics_port", "metrics_host")


@dataclass(frozen=True)
class RunRequest:
    """A run that is asked for."""

    job: Job
    options: RunOptions
    processes: int = 1
    ray: str | None = None
    log_json: str | None = None  # a file, or - for stderr
    metrics_port: int | None = None
    metrics_host: str = LOCALHOST

    @classmethod
    def from_arguments(cls, command: str, bundle: Path, arguments: Mapping[str, Any]) -> Self:
        """From the names and values of the command line's options; None where one was not given."""
        given = {name: arguments[name] for name in _OPTIONS if arguments[name] is not None}
        if sinks := tuple(name for some in arguments["sinks"] for name in some.split(",") if name):
            given["sinks"] = sinks
        options = RunOptions(**given)
        engine = EngineRequest(arguments["engine"], arguments["precision"], arguments["plans"])
        if arguments["ray"] and arguments["processes"]:
            raise UsageError("got both --ray and --processes, expected one of them")
        job = make_job(
            command,
            arguments["images"],
            arguments["out"],
            bundle,
            engine,
            options,
            storage_options=arguments["storage_options"],
            image_prefix=arguments["image_prefix"] or "",
        )
        told = {name: arguments[name] for name in _TOLD if arguments[name] is not None}
        return cls(job, options, arguments["processes"] or 1, arguments["ray"], **told)

    def telemetry(self) -> Telemetry:
        """What is told of the run. Raises UsageError for a log or a port that cannot be had."""
        return Telemetry(self.log_json, self.metrics_port, self.metrics_host)

    def open_crew(self, job: Job, watch: Watch) -> Crew:
        """This process, several, or a cluster."""
        if self.ray is not None:
            from multisa.runtime.jobs.executors.ray import RayCrew

            return RayCrew(job, watch, self.ray)
        if self.processes > 1:
            from multisa.runtime.jobs.executors.processes import ProcessCrew

            return ProcessCrew(job, watch, self.processes)
        return LocalCrew(job, watch)
