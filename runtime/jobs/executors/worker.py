"""Worker side of a run on several processes: receives shards from the coordinator and reports results."""

import logging
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Failure, PipelineConfig, RunObserver
from multisa.runtime.jobs.worker import Worker, open_worker
from multisa.runtime.progress import log
from multisa.runtime.system import usable_cpus

# Shards in flight in one process: the next one is read and decoded while the last images of one are finished.
SHARDS_IN_FLIGHT = 2


LogMessage = tuple[int, str]  # level as in logging, text


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker reports once everything is open."""

    fingerprint: Mapping[str, Any]  # see Executor
    backends: Mapping[str, Any]  # see Executor
    bundle: str  # SHA-256 of its manifest: another machine may have another bundle at the same path
    messages: Sequence[LogMessage]  # logged while opening; the coordinator logs each of them once
    pipeline: PipelineConfig
    host: str
    cores: int  # of the host, that may be used


@dataclass(frozen=True)
class ShardTask:
    """A shard to process, and how."""

    shard: Shard
    # A file below OUT that exists as long as the run and must be visible to all machines; "" where OUT is
    # local to one machine.
    shared_file: str = ""
    # A file below OUT for the index of the current image: images are processed one at a time, as one of them
    # may kill the process. "" for all in parallel.
    progress_file: str = ""
    failures: tuple[Failure, ...] = ()  # of images to leave out


@dataclass(frozen=True)
class ShardReport:
    """A shard that a worker has processed."""

    result: ShardResult
    failures: tuple[Failure, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)  # of work by stage, since the last report
    messages: Sequence[LogMessage] = ()  # logged since the last report


@dataclass(frozen=True)
class RemoteError:
    """An error on its way to the coordinator, in a form that can always be pickled."""

    error: MultisaError | OSError | None  # None for a bug, which would occur in every worker
    description: str = ""  # with the traceback

    @classmethod
    def of(cls, error: BaseException) -> "RemoteError":
        """Convert what a worker raised."""
        if isinstance(error, MultisaError):
            return cls(_portable(error))
        if isinstance(error, OSError) and error.errno is None:  # of a library: its text alone, such as a URL
            kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
            return cls(kind(str(error)))
        if isinstance(error, OSError):
            filename = None if error.filename is None else str(error.filename)
            # OSError itself makes the subclass of the number; other subclasses may not exist elsewhere.
            return cls(OSError(error.errno, error.strerror or "", filename))
        trace = "".join(traceback.format_exception(error))
        return cls(None, f"{type(error).__name__}: {error}, in a worker process:\n{trace}")

    def exception(self) -> Exception:
        """What the coordinator is to raise: the same error, or RuntimeError for an unexpected one."""
        return RuntimeError(self.description) if self.error is None else self.error


def _portable(error: MultisaError) -> MultisaError:
    """A copy of the nearest class that every process can import, with attributes that can be pickled."""
    kind: type[MultisaError] = next(base for base in type(error).__mro__ if base.__module__.startswith("multisa."))
    portable = kind.__new__(kind, str(error))
    vars(portable).update({key: value for key, value in vars(error).items() if isinstance(value, str | int)})
    if portable.exit_code != error.exit_code:
        portable.exit_code = error.exit_code
    return portable


class ShardWorker:
    """Processes shards of a job in its own process; errors are returned, for the coordinator to raise."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failures = _FailureCollector()
        self._messages = _MessageCollector()
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._reporting = threading.Lock()
        self._reported: dict[str, float] = {}
        self._seen_shared_file = ""

    def open(self) -> WorkerInfo | RemoteError:
        """Open the source, the backends and the writers."""
        try:
            self._stack.enter_context(self._messages)
            worker = self._stack.enter_context(open_worker(self._job, self._failures))
            digest = sha256_of_file(self._job.bundle / MANIFEST_NAME)
        except (MultisaError, OSError) as error:
            return RemoteError.of(error)
        self._worker = worker
        return WorkerInfo(
            fingerprint=worker.fingerprint(),
            backends={choice.graph: choice.to_json() for choice in worker.backends},
            bundle=digest,
            messages=self._messages.take(),
            pipeline=self._job.pipeline,
            host=socket.gethostname(),
            cores=usable_cpus(),
        )

    def run(self, task: ShardTask) -> ShardReport | RemoteError:
        """Process one shard; SHARDS_IN_FLIGHT threads may do so at once."""
        if self._worker is None:
            raise RuntimeError("open the worker before it gets a shard")
        results: list[ShardResult] = []
        try:
            self._check_shared_file(task.shared_file)
            if task.progress_file:
                self._run_isolated(self._worker, task, results.append)
            else:
                self._worker.start(task.shard, results.append, guard=task.shared_file).result()
        except (MultisaError, OSError) as error:
            return RemoteError.of(error)
        seconds = self._new_seconds(self._worker)
        return ShardReport(results[0], self._failures.take(task.shard), seconds, self._messages.take())

    def close(self) -> None:
        """Close what is open."""
        self._stack.close()

    def _run_isolated(self, worker: Worker, task: ShardTask, on_commit: Callable[[ShardResult], None]) -> None:
        progress_file = self._job.output / task.progress_file
        progress_file.parent.mkdir(parents=True, exist_ok=True)
        for failure in task.failures:
            self._failures.image_failed(failure)
        worker.run_isolated(
            task.shard,
            on_commit,
            failures=task.failures,
            on_image=lambda index: progress_file.write_text(str(index), encoding="utf-8"),
            guard=task.shared_file,
        )
        progress_file.unlink(missing_ok=True)

    def _new_seconds(self, worker: Worker) -> Mapping[str, float]:
        """Seconds of work in each stage since the last report."""
        with self._reporting:
            total = worker.timer.seconds()
            new = {name: seconds - self._reported.get(name, 0.0) for name, seconds in total.items()}
            self._reported = total
        return new

    def _check_shared_file(self, shared_file: str) -> None:
        if shared_file != self._seen_shared_file and not (self._job.output / shared_file).is_file():
            raise UsageError(
                f"{self._job.output}: is another folder on {socket.gethostname()} than where the run was "
                "started, expected a folder that all machines share, at the same path"
            )
        self._seen_shared_file = shared_file


class _MessageCollector(logging.Handler):
    """Collects the log messages of the process for the coordinator, which knows where to show them.

    A context manager. It replaces the console: all workers log the same, such as which backend they use.
    """

    replaces_console = True

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[LogMessage] = []

    def __enter__(self) -> Self:
        log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._messages.append((record.levelno, record.getMessage()))

    def take(self) -> list[LogMessage]:
        """The messages since the last call."""
        with self.lock or nullcontext():
            messages, self._messages = self._messages, []
        return messages


class _FailureCollector(RunObserver):
    """Keeps the failures until their shard is done; the report has everything else."""

    def __init__(self) -> None:
        self._failures: dict[int, Failure] = {}  # by index

    def image_failed(self, failure: Failure) -> None:
        """Keep it."""
        self._failures[failure.index] = failure

    def take(self, shard: Shard) -> tuple[Failure, ...]:
        """The failures of one shard, in the order of its images."""
        found = (self._failures.pop(sample.index, None) for sample in shard.samples)
        return tuple(failure for failure in found if failure is not None)
