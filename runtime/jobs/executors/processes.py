"""Several processes of this machine: with NVIDIA GPUs each has one, without them they share the cores.

with ProcessExecutor(job, watch, processes=4) as crew:
    crew.do(shards, committed)

Processes are spawned, never forked: neither CUDA nor threads live through a fork. A script that starts a run
on several needs `if __name__ == "__main__":`, as each of them imports it.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.jobs.executors.remote import Answer, RemoteExecutor, WorkerDied, WorkerHandle
from multisa.runtime.jobs.executors.worker import UNDER_WAY, RemoteError, ShardTask, ShardWorker
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job

_PATIENCE = 10.0  # seconds for a process to close what it has open
_VISIBLE = "CUDA_VISIBLE_DEVICES"

_Pipe = connection.Connection


@dataclass(eq=False, kw_only=True)
class _Member(WorkerHandle):
    index: int
    process: SpawnProcess
    pipe: _Pipe


class ProcessExecutor(RemoteExecutor[_Member]):
    """So many processes; one that dies is started again."""

    _advice = "if the memory is full, take fewer --num-processes, and the same command goes on"

    def __init__(self, job: Job, watch: RunMonitor, processes: int) -> None:
        super().__init__(job, watch)
        workers = max(1, job.sizes.workers // processes)
        self._share = replace(job, sizes=replace(job.sizes, workers=workers))
        self._count_of_processes = processes
        self._gpus: list[str] = []
        self._processes: dict[int, _Member] = {}

    def _open(self) -> None:
        self._gpus = visible_gpus()
        for index in range(self._count_of_processes):
            self._processes[index] = self._start(index)
        while not all(member.ready for member in self._processes.values()):
            self._take_answers()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self._processes.values():
            if error is None:
                with contextlib.suppress(OSError):
                    member.pipe.send(None)
            else:  # nothing that is cut off is lost
                member.process.kill()
        for member in self._processes.values():
            member.process.join(_PATIENCE)
            _bury(member)
        self._processes = {}

    def _members(self) -> Collection[_Member]:
        return self._processes.values()

    def _give(self, member: _Member, order: ShardTask) -> None:
        with contextlib.suppress(OSError):  # it has died, which is read from the pipe next
            member.pipe.send(order)

    def _drop(self, member: _Member) -> None:
        _bury(self._processes.pop(member.index))

    def _answers(self) -> Iterator[tuple[_Member, Answer]]:
        members = {member.pipe: member for member in self._processes.values()}
        for pipe in connection.wait(list(members)):
            member = members[pipe]  # type: ignore[index]  # sockets and numbers could be waited for, too
            try:
                answer: Answer = member.pipe.recv()
            except (EOFError, OSError):
                _bury(member)
                self._processes[member.index] = self._start(member.index)
                answer = WorkerDied(_how_it_ended(member.process.exitcode))
            yield member, answer

    def _start(self, index: int) -> _Member:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        gpu = self._gpus[index % len(self._gpus)] if self._gpus else None
        process = context.Process(
            target=_work, args=(self._share, theirs, gpu), name=f"multisa-{index + 1}", daemon=True
        )
        with _signals_held_back():
            process.start()
        theirs.close()
        return _Member(f"process {index + 1}", index=index, process=process, pipe=ours)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be for each GPU that this process sees."""
    count = len(probe_gpus().gpus)
    asked = os.environ.get(_VISIBLE, "")
    names = asked.split(",") if asked else list(map(str, range(count)))
    return names[:count]


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; one that is started here does not hear of it."""
    resource_tracker.ensure_running()  # it lets these signals through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    why = ", as when memory is short" if -code == signal.SIGKILL else ""
    return f"it was ended by signal {-code}, {name}{why}"


def _bury(member: _Member) -> None:
    """End a process for good."""
    member.pipe.close()
    member.process.kill()
    member.process.join()


def _work(job: Job, pipe: _Pipe, gpu: str | None) -> None:
    """What a started process does, until it is told to end or the one that leads is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if gpu is not None:
        os.environ[_VISIBLE] = gpu  # before anything of CUDA is loaded
    orders: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    sending = threading.Lock()

    def answer(future: Future[Any]) -> None:
        error = future.exception()
        with sending, contextlib.suppress(OSError):  # nobody is there, which `_listen` notices
            pipe.send(RemoteError.of(error) if error else future.result())

    hand = ShardWorker(job)
    with contextlib.closing(hand), ThreadPoolExecutor(UNDER_WAY) as threads:
        threads.submit(hand.open).add_done_callback(answer)
        while (order := orders.get()) is not None:
            threads.submit(hand.do, order).add_done_callback(answer)


def _listen(pipe: _Pipe, orders: "queue.SimpleQueue[ShardTask | None]") -> None:
    """Take orders. Nothing that is cut off is lost, so without anyone to answer to there is no more to do."""
    try:
        while (order := pipe.recv()) is not None:
            orders.put(order)
        orders.put(None)
    except (EOFError, OSError):
        os._exit(1)
