"""Executors: what processes the shards of a job, in this process, in several, or on a Ray cluster."""

from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.executors.processes import ProcessExecutor
from multisa.runtime.jobs.executors.ray import RayExecutor
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.worker import Executor


def make_executor(job: Job, monitor: RunMonitor, *, num_processes: int = 1, ray_address: str | None = None) -> Executor:
    """Make the executor for `num_processes`, or for the Ray cluster at `ray_address`."""
    if ray_address is not None:
        return RayExecutor(job, monitor, ray_address)
    return ProcessExecutor(job, monitor, num_processes) if num_processes > 1 else LocalExecutor(job, monitor)
