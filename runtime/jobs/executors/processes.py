"""Several processes on this machine: each has a GPU if there are NVIDIA GPUs, else they share the cores.

Processes are spawned, never forked: neither CUDA nor threads survive a fork. Each of them imports the script
that started the run, so such a script needs `if __name__ == "__main__":`.
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
from multisa.runtime.jobs.executors.remote import Message, RemoteExecutor, WorkerDied, WorkerHandle
from multisa.runtime.jobs.executors.worker import SHARDS_IN_FLIGHT, RemoteError, ShardTask, ShardWorker
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import Job

_CLOSE_SECONDS = 10.0  # for a process to close what it has open, before it is killed
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(eq=False, kw_only=True)
class _ProcessHandle(WorkerHandle):
    index: int
    process: SpawnProcess
    pipe: connection.Connection


class ProcessExecutor(RemoteExecutor[_ProcessHandle]):
    """An executor with several worker processes; one that dies is started again."""

    _advice = "if memory is short, use fewer --num-processes, then run the same command again to resume"

    def __init__(self, job: Job, monitor: RunMonitor, processes: int) -> None:
        super().__init__(job, monitor)
        workers = max(1, job.pipeline.workers // processes)
        self._worker_job = replace(job, pipeline=replace(job.pipeline, workers=workers))
        self._count_of_processes = processes
        self._gpus: list[str] = []
        self._processes: dict[int, _ProcessHandle] = {}

    def _open(self) -> None:
        self._gpus = visible_gpus()
        for index in range(self._count_of_processes):
            self._processes[index] = self._start(index)
        while not all(worker.is_ready for worker in self._processes.values()):
            self._handle_messages()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._processes.values():
            if error is None:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
            else:  # a shard that is cut off is not committed, so nothing is lost
                worker.process.kill()
        for worker in self._processes.values():
            worker.process.join(_CLOSE_SECONDS)
            _end(worker)
        self._processes = {}

    def _workers(self) -> Collection[_ProcessHandle]:
        return self._processes.values()

    def _send(self, worker: _ProcessHandle, task: ShardTask) -> None:
        with contextlib.suppress(OSError):  # it has died, and its pipe tells so next
            worker.pipe.send(task)

    def _drop(self, worker: _ProcessHandle) -> None:
        _end(self._processes.pop(worker.index))

    def _receive(self) -> Iterator[tuple[_ProcessHandle, Message]]:
        by_pipe = {worker.pipe: worker for worker in self._processes.values()}
        for pipe in connection.wait(list(by_pipe)):
            worker = by_pipe[pipe]  # type: ignore[index]  # wait also takes sockets and numbers
            try:
                message: Message = worker.pipe.recv()
            except (EOFError, OSError):
                _end(worker)
                self._processes[worker.index] = self._start(worker.index)
                message = WorkerDied(_describe_exit(worker.process.exitcode))
            yield worker, message

    def _start(self, index: int) -> _ProcessHandle:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        gpu = self._gpus[index % len(self._gpus)] if self._gpus else None
        process = context.Process(
            target=_work, args=(self._worker_job, theirs, gpu), name=f"multisa-{index + 1}", daemon=True
        )
        with _signals_blocked():
            process.start()
        theirs.close()
        return _ProcessHandle(f"process {index + 1}", index=index, process=process, pipe=ours)


def visible_gpus() -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each GPU that this process sees."""
    count = len(probe_gpus().gpus)
    visible = os.environ.get(_VISIBLE, "")
    names = visible.split(",") if visible else list(map(str, range(count)))
    return names[:count]


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start a process with blocked signals, as Ctrl-C is sent to all processes of a terminal."""
    resource_tracker.ensure_running()  # it unblocks these signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    hint = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code}, {name}{hint}"


def _end(worker: _ProcessHandle) -> None:
    """Kill a process, if it still runs, and release what belongs to it."""
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _work(job: Job, pipe: connection.Connection, gpu: str | None) -> None:
    """The main function of a worker process: serve until the coordinator says so, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if gpu is not None:
        os.environ[_VISIBLE] = gpu  # of this process alone, before it loads anything of CUDA
    tasks: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    sending = threading.Lock()

    def send_result(future: Future[Any]) -> None:
        error = future.exception()
        with sending, contextlib.suppress(OSError):  # the coordinator is gone, which `_listen` notices
            pipe.send(RemoteError.of(error) if error else future.result())

    worker = ShardWorker(job)
    with contextlib.closing(worker), ThreadPoolExecutor(SHARDS_IN_FLIGHT) as threads:
        threads.submit(worker.open).add_done_callback(send_result)
        while (task := tasks.get()) is not None:
            threads.submit(worker.run, task).add_done_callback(send_result)


def _listen(pipe: connection.Connection, tasks: "queue.SimpleQueue[ShardTask | None]") -> None:
    """Receive tasks. Without a coordinator there is nothing more to do, and nothing committed is lost."""
    try:
        while (task := pipe.recv()) is not None:
            tasks.put(task)
        tasks.put(None)
    except (EOFError, OSError):
        os._exit(1)
