"""Coordinator side of a run on several processes: hands shards out and replaces workers that die."""

import secrets
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from multisa.runtime.errors import BackendUnavailable, MultisaError, UsageError
from multisa.runtime.jobs.executors.worker import (
    SHARDS_IN_FLIGHT,
    LogMessage,
    RemoteError,
    ShardReport,
    ShardTask,
    WorkerInfo,
)
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.shards import TEMPORARY, clear_temporary
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency, Failure
from multisa.runtime.predict.prediction import StageTimer
from multisa.runtime.progress import log, pluralize

MAX_DEATHS_PER_SHARD = 3  # then its images are processed one at a time
MAX_DEATHS_PER_IMAGE = 2  # processed by itself; then it is a failure
MAX_POISON_IMAGES_PER_SHARD = 3  # with more, the images are not the reason
MAX_DEATHS_PER_WORKER = 3  # in a row, without a shard done: more than chance
_REASON = "kills the process that decodes or segments it: a crashing decoder, or too little memory"


class PoisonImages:
    """Finds the images that kill worker processes, in the shards during which workers died repeatedly."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._deaths: Counter[int] = Counter()  # by shard
        self._deaths_at: Counter[int] = Counter()  # by index of an image
        self._failures: dict[int, list[Failure]] = {}  # by suspected shard
        self._waiting: deque[Shard] = deque()
        self.in_flight: dict[int, str] = {}  # progress file of each suspected shard that is in flight

    def __bool__(self) -> bool:
        """Whether a suspected shard waits."""
        return bool(self._waiting)

    def __contains__(self, shard: int) -> bool:
        return shard in self._failures

    def next_task(self) -> ShardTask:
        """The next suspected shard, for a worker that has no other shard in flight."""
        shard = self._waiting.popleft()
        self.in_flight[shard.number] = progress_file = f"{TEMPORARY}/at-{secrets.token_hex(8)}"
        return ShardTask(shard, progress_file=progress_file, failures=tuple(self._failures[shard.number]))

    def shard_done(self, shard: int) -> None:
        """Note that a shard is committed."""
        self.in_flight.pop(shard, None)

    def worker_died(self, shard: Shard, reason: str) -> bool:
        """Note that a worker died with a shard in flight; returns whether the shard explains it for now."""
        progress_file = self.in_flight.pop(shard.number, None)
        if progress_file is None:
            self._deaths[shard.number] += 1
            if self._deaths[shard.number] >= MAX_DEATHS_PER_SHARD:
                self._failures[shard.number] = []
                self._waiting.append(shard)
            return self._deaths[shard.number] > 1
        self._waiting.append(shard)
        return self._blame(shard, self._read(progress_file), reason)

    def append(self, shard: Shard) -> None:
        """Take back a suspected shard whose worker was dropped for another reason."""
        self.in_flight.pop(shard.number, None)
        self._waiting.append(shard)

    def _blame(self, shard: Shard, index: int, reason: str) -> bool:
        found = [sample for sample in shard.samples if sample.index == index]
        self._deaths_at[index] += 1
        few = len(self._failures[shard.number]) < MAX_POISON_IMAGES_PER_SHARD
        if not found or not few or self._deaths_at[index] < MAX_DEATHS_PER_IMAGE:
            return False
        image = found[0].item.id
        log.info(f"{image}: kills the process that works on it ({reason}), it is left out")
        self._failures[shard.number].append(Failure(index, image, "process", _REASON))
        return True

    def _read(self, progress_file: str) -> int:
        """Index of the image that was being processed; -1 for none."""
        path = self._output / progress_file
        try:
            return int(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return -1
        finally:
            path.unlink(missing_ok=True)


@dataclass(eq=False)
class WorkerHandle:
    """One worker process, as the coordinator sees it."""

    name: str  # for people: "process 2"
    is_ready: bool = False
    shards: dict[int, Shard] = field(default_factory=dict)  # in flight, by number


@dataclass(frozen=True)
class WorkerDied:
    """A worker process is gone; what is known of the reason."""

    reason: str


Message = WorkerInfo | ShardReport | RemoteError | WorkerDied
AnyHandle = TypeVar("AnyHandle", bound=WorkerHandle)


class RemoteExecutor(ABC, Generic[AnyHandle]):
    """An Executor of worker processes; subclasses start, reach and stop them."""

    _advice = "run the same command again to resume"  # where workers die again and again

    def __init__(self, job: Job, monitor: RunMonitor) -> None:
        self._job = job
        self._monitor = monitor
        self._timer = StageTimer(monitor.stage_busy)
        self._first: tuple[str, WorkerInfo] | None = None  # name and info that all others must match
        self._infos: dict[str, WorkerInfo] = {}  # by the name of the worker
        self._logged: set[LogMessage] = set()
        self._again: deque[Shard] = deque()
        self._poison = PoisonImages(job.output)
        self._is_running = False
        self._deaths: Counter[str] = Counter()  # in a row, by the name of the worker
        self._any_died = False

    @abstractmethod
    def _open(self) -> None:
        """Start all workers and wait until they are ready."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException as error:  # stop the workers that were started
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    @abstractmethod
    def _workers(self) -> Collection[AnyHandle]:
        """All workers, ready or not."""

    @abstractmethod
    def _send(self, worker: AnyHandle, task: ShardTask) -> None:
        """Hand out a shard. Does not raise if the worker has died: `_receive` notices that."""

    @abstractmethod
    def _receive(self) -> Iterable[tuple[AnyHandle, Message]]:
        """Wait for messages of workers; one that has died is no longer among `_workers`."""

    @abstractmethod
    def _drop(self, worker: AnyHandle) -> None:
        """Remove a worker, or what was started in its place, for good."""

    def _is_local_problem(self, error: RemoteError) -> bool:
        """Whether other workers may be able to do what one could not do."""
        return isinstance(error.error, BackendUnavailable)

    def _leave_out(self, worker: AnyHandle, error: Exception) -> None:
        """Continue without a worker. Raises `error` if it is the last one, or if the run has not begun."""
        others = (other for other in self._workers() if other is not worker)
        if not self._is_running or not any(other.is_ready for other in others):
            raise error
        log.info(f"{worker.name} is left out: {error}")
        self._drop(worker)

    def fingerprint(self) -> Mapping[str, Any]:
        """See Executor."""
        return self._first_info().fingerprint

    def backends(self) -> Mapping[str, Any]:
        """See Executor."""
        return self._first_info().backends

    def concurrency(self) -> Concurrency:
        """See Executor; the cores of a machine count once, however many workers it has."""
        infos = self._infos.values()
        cores = {info.host: info.cores for info in infos}
        return Concurrency(tuple(info.pipeline for info in infos), sum(cores.values()))

    def stage_seconds(self) -> Mapping[str, float]:
        """See Executor."""
        return self._timer.seconds()

    def run(self, shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
        """Hand out all shards; those whose worker died come last, as they may kill the next one, too.

        `on_commit` is called in this thread. Raises what a worker raised, and MultisaError if workers die
        again and again.
        """
        self._is_running = True
        while True:
            all_out = self._hand_out(shards)
            if all_out and not any(worker.shards for worker in self._workers()):
                break
            self._handle_messages(on_commit)
        if self._any_died:
            clear_temporary(self._job.output)  # files of the workers that died

    def _hand_out(self, shards: Iterator[Shard]) -> bool:
        """Give shards to all workers that have room; returns whether no shard is left for one of them."""
        while free := [worker for worker in self._workers() if self._has_room(worker)]:
            shard = next(shards, None) or (self._again.popleft() if self._again else None)
            worker = min(free, key=lambda worker: len(worker.shards))
            if shard is not None:
                task = ShardTask(shard)
            elif not self._poison:
                return True
            elif worker.shards:  # a suspected shard would take the others down with it
                return False
            else:
                task = self._poison.next_task()
            worker.shards[task.shard.number] = task.shard
            self._send(worker, task)
        return False  # there may be no worker at all, and then what is left is not known

    def _has_room(self, worker: AnyHandle) -> bool:
        is_isolated = any(number in self._poison.in_flight for number in worker.shards)
        return worker.is_ready and len(worker.shards) < SHARDS_IN_FLIGHT and not is_isolated

    def _handle_messages(self, on_commit: Callable[[ShardResult], None] | None = None) -> None:
        for worker, message in self._receive():
            if isinstance(message, RemoteError):
                if worker.is_ready and not self._is_local_problem(message):
                    raise message.exception()
                for shard in worker.shards.values():
                    (self._poison if shard.number in self._poison else self._again).append(shard)
                self._leave_out(worker, message.exception())
            elif isinstance(message, WorkerInfo):
                self._welcome(worker, message)
            elif isinstance(message, WorkerDied):
                self._handle_death(worker, message.reason)
            elif on_commit is not None:
                del worker.shards[message.result.shard]
                self._poison.shard_done(message.result.shard)
                self._deaths[worker.name] = 0
                self._count(message)
                on_commit(message.result)

    def _count(self, report: ShardReport) -> None:
        for stage, seconds in report.seconds.items():
            self._timer.add(stage, seconds)
        for message in report.messages:
            log.log(*message)
        for failure in report.failures:
            self._monitor.image_failed(failure)
        self._monitor.images_done(report.result.images)

    def _welcome(self, worker: AnyHandle, info: WorkerInfo) -> None:
        """Accept a worker, unless it would write other bytes than the others."""
        name, first = self._first = self._first or (worker.name, info)
        theirs = {**info.fingerprint, "SHA-256 of the bundle": info.bundle}
        ours = {**first.fingerprint, "SHA-256 of the bundle": first.bundle}
        if different := [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]:
            listed = "; ".join(f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in different)
            text = (
                f"{name} and {worker.name} would not write the same bytes ({listed}): install the same "
                "versions, and choose one backend for all (--backend, --precision)"
            )
            self._leave_out(worker, UsageError(text))
            return
        for message in info.messages:
            if message not in self._logged:
                log.log(*message)
        self._logged.update(info.messages)
        self._infos[worker.name] = info
        worker.is_ready = True

    def _handle_death(self, worker: AnyHandle, reason: str) -> None:
        self._any_died = True
        self._deaths[worker.name] += 1
        for shard in worker.shards.values():
            if self._poison.worker_died(shard, reason):
                self._deaths[worker.name] = 0  # the shard is the reason, not the worker
            if shard.number not in self._poison:
                self._again.append(shard)
        numbers = ", ".join(map(str, worker.shards))
        text = f"{worker.name} died{f' at shard {numbers}' if numbers else ''} ({reason})"
        if self._deaths[worker.name] >= MAX_DEATHS_PER_WORKER:
            times = f"{MAX_DEATHS_PER_WORKER} times in a row without a shard done"
            self._leave_out(worker, MultisaError(f"{text}, {times}: {self._advice}"))
            return
        log.info(f"{text}: {pluralize(len(worker.shards), 'shard')} to redo" if numbers else text)

    def _first_info(self) -> WorkerInfo:
        if self._first is None:
            raise RuntimeError("use the executor in a with statement")
        return self._first[1]
