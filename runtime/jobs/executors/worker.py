"""A process that does shards for a run which another process leads: what it has, and what it answers."""

import contextlib
import io
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multisa.runtime import errors
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.jobs.executor import ShardReport
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.snapshot import Sample, Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Failure, PipelineConfig
from multisa.runtime.jobs.worker import Worker
from multisa.runtime.system import usable_cpus

# Shards under way in one process: the next is read and decoded while the last images of one are finished.
UNDER_WAY = 2


@dataclass(frozen=True)
class WorkerInfo:
    """What a process answers once everything is open."""

    identity: Mapping[str, Any]  # as of Crew
    backends: Mapping[str, Any]  # as of Crew
    bundle: str  # SHA-256 of its manifest, which may be another one at the same path of another machine
    said: Sequence[str]  # lines for people, which the leader shows once
    sizes: PipelineConfig
    host: str
    cores: int  # of the host, that may be used


@dataclass(frozen=True)
class ShardTask:
    """A shard to be done, and how."""

    shard: Shard
    # A file below OUT that is there as long as the run is, and is seen from everywhere; "" where OUT is this
    # machine's own.
    shared: str = ""
    # A file below OUT for the position of the image in hand: one at a time then, as one of them may end the
    # process; "" for all side by side.
    progress_file: str = ""
    failures: tuple[Failure, ...] = ()  # of images that are not to be tried


@dataclass(frozen=True)
class RemoteError:
    """An error on its way to the process that leads, in plain values: not every exception can be pickled."""

    kind: str
    message: str
    errno: int | None = None
    filename: str | None = None
    trace: str = ""  # of what is an error of ours

    @classmethod
    def of(cls, error: BaseException) -> "RemoteError":
        """Take an error apart."""
        kind = type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            name = None if error.filename is None else str(error.filename)
            return cls(kind, error.strerror or "", error.errno, name)
        if isinstance(error, MultisaError):
            return cls(kind, str(error))
        return cls(kind, str(error), trace="".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """The same error again: one of runtime.errors or an OSError; RuntimeError for any other."""
        if self.trace:
            return RuntimeError(f"{self.kind}: {self.message}, in a process that does shards:\n{self.trace}")
        if self.errno is not None:
            return OSError(self.errno, self.message, self.filename)
        kind = getattr(errors, self.kind)
        error: MultisaError = kind(self.message)
        return error


class ShardWorker:
    """Does shards of a job; what goes wrong it answers, as the process that leads is to raise it."""

    def __init__(self, job: Job) -> None:
        """Open nothing yet."""
        self._job = job
        self._watcher = _FailuresByImage()
        self._worker: Worker | None = None
        self._reporting = threading.Lock()
        self._reported: dict[str, float] = {}
        self._shared_seen = ""

    def open(self) -> WorkerInfo | RemoteError:
        """Open the source, the engines and the sinks."""
        said = io.StringIO()
        try:
            # Which engine it is would be said by each of many.
            with contextlib.redirect_stderr(said):
                self._worker = Worker(self._job, self._watcher)
            digest = sha256_of_file(self._job.bundle / MANIFEST_NAME)
        except (MultisaError, OSError) as error:
            return RemoteError.of(error)
        backends = {choice.graph: choice.to_json() for choice in self._worker.backends}
        return WorkerInfo(
            self._worker.identity(),
            backends,
            digest,
            said.getvalue().splitlines(),
            sizes=self._job.sizes,
            host=socket.gethostname(),
            cores=usable_cpus(),
        )

    def do(self, order: ShardTask) -> ShardReport | RemoteError:
        """Do one shard; UNDER_WAY threads may do one each."""
        if self._worker is None:
            raise RuntimeError("a hand was given a shard before it was opened")
        results: list[ShardResult] = []
        try:
            self._check_shared(order.shared)
            if order.progress_file:
                self._do_one_by_one(self._worker, order, results.append)
            else:
                self._worker.wait(self._worker.start(order.shard, results.append, guard=order.shared))
        except (MultisaError, OSError) as error:
            return RemoteError.of(error)
        return ShardReport(results[0], self._watcher.take(order.shard), self._seconds())

    def close(self) -> None:
        """Close what is open."""
        if self._worker is not None:
            self._worker.__exit__(None, None, None)

    def _do_one_by_one(
        self, worker: Worker, order: ShardTask, committed: Callable[[ShardResult], None]
    ) -> None:
        progress_file = self._job.out / order.progress_file
        progress_file.parent.mkdir(parents=True, exist_ok=True)
        for failure in order.failures:
            self._watcher.image_failed(failure)
        worker.run_isolated(
            order.shard,
            committed,
            failures=order.failures,
            begin=lambda index: progress_file.write_text(str(index)),
            guard=order.shared,
        )
        progress_file.unlink(missing_ok=True)

    def _seconds(self) -> Mapping[str, float]:
        """Seconds of work since they were asked for last."""
        if self._worker is None:
            return {}
        with self._reporting:
            now = self._worker.timer.seconds()
            since = {name: seconds - self._reported.get(name, 0.0) for name, seconds in now.items()}
            self._reported = now
        return since

    def _check_shared(self, shared: str) -> None:
        if shared != self._shared_seen and not (self._job.out / shared).is_file():
            raise UsageError(
                f"{self._job.out}: is another folder on {socket.gethostname()} than where the run was "
                "started: expected one that all machines share, at the same path"
            )
        self._shared_seen = shared


class _FailuresByImage:
    """Keeps the failures until their shard is done."""

    def __init__(self) -> None:
        self._failures: dict[int, Failure] = {}  # by position in the run

    def image_done(self, work: Sample) -> None:
        """Counted by the shard."""

    def image_failed(self, failure: Failure) -> None:
        """Keep it."""
        self._failures[failure.index] = failure

    def stage_busy(self, stage: str, seconds: float) -> None:
        """Summed by the clock."""

    def queue_depth(self, stage: str, images: int) -> None:
        """Of no interest elsewhere."""

    def in_flight(self, images: int) -> None:
        """Of no interest elsewhere."""

    def take(self, shard: Shard) -> tuple[Failure, ...]:
        """Those of one shard, in the order of its images."""
        found = (self._failures.pop(work.index, None) for work in shard.works)
        return tuple(failure for failure in found if failure is not None)
