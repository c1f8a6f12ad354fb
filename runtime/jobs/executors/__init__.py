"""Executors: what processes the shards of a job, in this process, in several, or on a Ray cluster."""

from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.worker import Executor


def make_executor(job: Job, monitor: RunMonitor, *, num_processes: int = 1, ray_address: str | None = None) -> Executor:
    """Make the executor for `num_processes`, or for the Ray cluster at `ray_address`."""
    # Imported here: most runs need neither, and importing them delays the first mask.
    if ray_address is not None:
        from multisa.runtime.jobs.executors.ray import RayExecutor

        return RayExecutor(job, monitor, ray_address)
    if num_processes > 1:
        from multisa.runtime.jobs.executors.processes import ProcessExecutor

        return ProcessExecutor(job, monitor, num_processes)
    return LocalExecutor(job, monitor)
