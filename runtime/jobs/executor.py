"""Who does the shards of a run: this process, or others that it hands them to."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency, Failure, RunObserver
from multisa.runtime.jobs.worker import Worker
from multisa.runtime.system import usable_cpus


@dataclass(frozen=True)
class ShardReport:
    """A shard that was done elsewhere, and what was seen of it there."""

    result: ShardResult
    failures: tuple[Failure, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)  # of work by stage


class Executor(Protocol):
    """Does shards; a context manager."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the bytes and may differ between machines: engines and versions of packages."""

    def backends(self) -> Mapping[str, Any]:
        """What runs each graph, for the record of a run."""

    def do(self, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        """Do all of `shards`; `committed` is called for each, never twice at once, from any thread."""

    def seconds(self) -> Mapping[str, float]:
        """Seconds of work by stage, so far."""

    def width(self) -> Concurrency:
        """Threads of the stages, and cores, of all who are there."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LocalExecutor:
    """This process alone."""

    def __init__(self, job: Job, watcher: RunObserver) -> None:
        self._worker = Worker(job, watcher)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.__exit__(kind, error, traceback)

    def identity(self) -> Mapping[str, Any]:
        """See Crew."""
        return self._worker.identity()

    def backends(self) -> Mapping[str, Any]:
        """See Crew."""
        return {choice.graph: choice.to_json() for choice in self._worker.backends}

    def do(self, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        """Feed one shard after the other; they are finished, and written, meanwhile."""
        in_flight: deque[Future[None]] = deque()
        for shard in shards:
            in_flight.append(self._worker.start(shard, committed))
            while in_flight and in_flight[0].done():
                in_flight.popleft().result()
        while in_flight:
            self._worker.wait(in_flight.popleft())

    def seconds(self) -> Mapping[str, float]:
        """See Crew."""
        return self._worker.timer.seconds()

    def width(self) -> Concurrency:
        """See Crew."""
        return Concurrency((self._worker.job.sizes,), usable_cpus())
