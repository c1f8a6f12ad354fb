"""What a run needs of whoever processes its shards; `multisa.runtime.jobs.executors` has implementations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency


class Executor(AbstractContextManager["Executor"], Protocol):
    """Processes shards; a context manager, which must be entered before anything else is called."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What affects the bytes of the results and may differ between machines: backends and versions."""

    def backends(self) -> Mapping[str, Any]:
        """What runs each graph, for the record of a run."""

    def run(self, shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
        """Process all `shards`; `on_commit` is called for each, from any thread, one call at a time."""

    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds of work in each stage so far, summed over the threads."""

    def concurrency(self) -> Concurrency:
        """Threads of the stages and cores of the machines, of all worker processes."""


ExecutorFactory = Callable[[Job, RunMonitor], Executor]
