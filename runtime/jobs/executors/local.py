"""The executor of a run in this process alone."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Self

from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency, RunObserver
from multisa.runtime.jobs.worker import Worker, open_worker
from multisa.runtime.system import usable_cpus


class LocalExecutor:
    """Processes shards with the threads of this process; an Executor."""

    def __init__(self, job: Job, observer: RunObserver) -> None:
        self._job = job
        self._observer = observer
        self._stack = ExitStack()
        self._worker: Worker | None = None

    def __enter__(self) -> Self:
        self._worker = self._stack.enter_context(open_worker(self._job, self._observer))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def worker(self) -> Worker:
        """The worker of this process. Raises RuntimeError unless the executor was entered."""
        if self._worker is None:
            raise RuntimeError("use the executor in a with statement")
        return self._worker

    def fingerprint(self) -> Mapping[str, Any]:
        """See Executor."""
        return self.worker.fingerprint()

    def backends(self) -> Mapping[str, Any]:
        """See Executor."""
        return {choice.graph: choice.to_json() for choice in self.worker.backends}

    def run(self, shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
        """Feed one shard after the other, while those before it are finished and written."""
        in_flight: deque[Future[None]] = deque()
        for shard in shards:
            in_flight.append(self.worker.start(shard, on_commit))
            while in_flight and in_flight[0].done():
                in_flight.popleft().result()
        while in_flight:
            in_flight.popleft().result()

    def stage_seconds(self) -> Mapping[str, float]:
        """See Executor."""
        return self.worker.timer.seconds()

    def concurrency(self) -> Concurrency:
        """See Executor."""
        return Concurrency((self._job.pipeline,), usable_cpus())
