"""Which executor processes the shards of a run."""

from collections.abc import Callable

from multisa.runtime.jobs.executor import Executor, LocalExecutor
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job

ExecutorFactory = Callable[[Job, RunMonitor], Executor]


def make_executor(*, num_processes: int = 1, ray: str | None = None) -> ExecutorFactory:
    """An executor for this process, for several processes, or for the Ray cluster at an address."""
    if ray is not None:
        from multisa.runtime.jobs.executors.ray import RayExecutor

        return lambda job, monitor: RayExecutor(job, monitor, ray)
    if num_processes > 1:
        from multisa.runtime.jobs.executors.processes import ProcessExecutor

        return lambda job, monitor: ProcessExecutor(job, monitor, num_processes)
    return LocalExecutor
