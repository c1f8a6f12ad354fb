"""The machines of a Ray cluster: an actor on each GPU, or on each machine if the cluster has no GPU.

Machines may leave and join during a run. All of them must see the images, the bundle and OUT at the same
paths and have the same version of multisa; the machine that started the run keeps the journal.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from multisa.runtime.errors import BackendUnavailable, MultisaError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.jobs.executors.remote import Message, RemoteExecutor, WorkerDied, WorkerHandle
from multisa.runtime.jobs.executors.worker import SHARDS_IN_FLIGHT, RemoteError, ShardTask, ShardWorker
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.shards import TEMPORARY
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.progress import log

LOCAL = "local"  # the address of a cluster of this machine alone, for this run

_POLL_SECONDS = 2.0  # between looks at which machines there are: Ray has no event for that
_RESTART_SECONDS = 5.0  # before an actor that died is restarted: is its machine still there?
_JOIN_SECONDS = 60.0  # the first actor waits for the others, to find out at once if they differ
_NOTICE_SECONDS = 30.0  # without an actor, until that is logged
_GIVE_UP_SECONDS = 600.0  # without an actor, until the run ends
_STORE_BYTES = 100 << 20  # for Ray's objects: results of shards are small
_MAX_REASON = 300  # characters of what Ray says about a death
# Of the cluster that a run starts: no usage statistics, no warning about a variable of actors without a GPU.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class _Slot:
    """Where one actor can run."""

    node: str
    host: str
    position: int  # among the slots of its node
    cpus: int
    gpus: int


@dataclass(eq=False, kw_only=True)
class _ActorHandle(WorkerHandle):
    slot: _Slot
    actor: Any
    calls: list[Any] = field(default_factory=list)  # references to results
    since: float = field(default_factory=time.monotonic)
    is_overdue: bool = False  # logged that it has not joined


class RayExecutor(RemoteExecutor[_ActorHandle]):
    """An Executor of actors on a cluster; one that dies is started again while its machine is there."""

    def __init__(self, job: Job, monitor: RunMonitor, address: str) -> None:
        """Raises BackendUnavailable without Ray."""
        super().__init__(_with_absolute_paths(job), monitor)
        self._address = address
        self._ray = _import_ray()
        self._is_connected_here = False  # and so must be disconnected at the end
        self._use_gpus = False
        self._actors: dict[_Slot, _ActorHandle] = {}
        self._not_before: dict[_Slot, float] = {}  # time of the next start
        self._dropped: set[_Slot] = set()
        self._last_poll = 0.0
        self._shared_file = ""  # below OUT; every machine must see it
        self._no_actor_since = time.monotonic()
        self._no_actor_logged = False

    def _open(self) -> None:
        self._connect()
        self._use_gpus = any(slot.gpus for slot in self._slots())
        start = time.monotonic()
        while not self._is_complete(time.monotonic() - start):
            self._handle_messages()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._actors.values():
            self._ray.kill(worker.actor)  # a shard that is cut off is not committed, so nothing is lost
        self._actors = {}
        if self._is_connected_here:
            self._ray.shutdown()
            self._is_connected_here = False

    def run(self, shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
        """See RemoteExecutor."""
        self._shared_file = f"{TEMPORARY}/shared-{secrets.token_hex(8)}"
        path = self._job.output / self._shared_file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, b"")
        try:
            super().run(shards, on_commit)
        finally:
            path.unlink(missing_ok=True)

    def _workers(self) -> Collection[_ActorHandle]:
        return self._actors.values()

    def _send(self, worker: _ActorHandle, task: ShardTask) -> None:
        worker.calls.append(worker.actor.run.remote(replace(task, shared_file=self._shared_file)))

    def _is_local_problem(self, error: RemoteError) -> bool:
        """One machine may have lost what the others still see: the images, OUT, its disk."""
        return error.error is not None

    def _drop(self, worker: _ActorHandle) -> None:
        self._dropped.add(worker.slot)
        self._kill(worker)

    def _receive(self) -> Iterator[tuple[_ActorHandle, Message]]:
        self._update_actors()
        by_call = {call: worker for worker in self._actors.values() for call in worker.calls}
        if not by_call:
            time.sleep(_POLL_SECONDS)
            return
        finished, _ = self._ray.wait(list(by_call), num_returns=1, timeout=_POLL_SECONDS)
        exceptions = self._ray.exceptions
        for call in finished:
            worker = by_call[call]
            worker.calls.remove(call)
            try:
                message: Message = self._ray.get(call)
            except exceptions.RayTaskError:  # of ShardWorker; others mean that the actor died
                raise
            except exceptions.RayError as error:
                self._kill(worker)
                self._not_before[worker.slot] = time.monotonic() + _RESTART_SECONDS
                message = WorkerDied(_last_line(error))
            yield worker, message

    def _kill(self, worker: _ActorHandle) -> None:
        """It may still run behind a broken network; what it finishes has the same bytes."""
        self._ray.kill(worker.actor)
        self._actors.pop(worker.slot, None)

    def _is_complete(self, waited: float) -> bool:
        ready = [worker.is_ready for worker in self._actors.values()]
        return any(ready) and (all(ready) or waited > _JOIN_SECONDS)

    def _update_actors(self) -> None:
        """Start an actor in every free slot, every few seconds, as machines join and leave."""
        now = time.monotonic()
        self._check_any_actor(now)
        if now - self._last_poll < _POLL_SECONDS:
            return
        self._last_poll = now
        for worker in self._actors.values():
            if not worker.is_ready and not worker.is_overdue and now - worker.since > _NOTICE_SECONDS:
                worker.is_overdue = True
                log.info(f"{worker.name} has not joined yet: check with `ray status` whether there is room")
        for slot in self._slots():
            is_free = slot not in self._actors and slot not in self._dropped
            if is_free and slot.gpus == int(self._use_gpus) and self._not_before.get(slot, now) <= now:
                self._actors[slot] = self._start(slot)

    def _check_any_actor(self, now: float) -> None:
        if any(worker.is_ready for worker in self._actors.values()):
            self._no_actor_since = now
            self._no_actor_logged = False
        elif now - self._no_actor_since > _GIVE_UP_SECONDS:
            raise MultisaError(
                f"--ray {self._address}: no machine of the cluster started an actor within "
                f"{_GIVE_UP_SECONDS:.0f} s: check `ray status`, then run the same command again to resume"
            )
        elif now - self._no_actor_since > _NOTICE_SECONDS and not self._no_actor_logged:
            self._no_actor_logged = True
            log.info("waiting for the cluster: no machine has room for an actor yet, check `ray status`")

    def _start(self, slot: _Slot) -> _ActorHandle:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor_class = self._ray.remote(ShardWorker).options(
            num_cpus=min(slot.cpus, 1),  # asking for all of a machine that others use, too, would get none
            num_gpus=slot.gpus,
            max_concurrency=SHARDS_IN_FLIGHT,
            max_restarts=0,  # the shards of a dead actor are handed out again, to whoever is there
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        )
        pipeline = replace(self._job.pipeline, workers=max(1, slot.cpus))
        actor = actor_class.remote(replace(self._job, pipeline=pipeline))
        name = f"actor {slot.position + 1} on {slot.host} (node {slot.node[:8]})"
        return _ActorHandle(name, slot=slot, actor=actor, calls=[actor.open.remote()])

    def _slots(self) -> list[_Slot]:
        """One for each GPU, and one for each machine without a GPU."""
        slots = []
        for node in self._ray.nodes():
            cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
            if not node["Alive"] or not (cpus or gpus):
                continue
            for position in range(gpus or 1):
                share = cpus // (gpus or 1)
                host = node["NodeManagerHostname"]
                slots.append(_Slot(node["NodeID"], host, position, share, min(gpus, 1)))
        return slots

    def _connect(self) -> None:
        if self._ray.is_initialized():  # by the program that this run is a part of
            return
        _check_reachable(self._address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == LOCAL:
            options |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            with _environment(_QUIET):
                self._ray.init(address=self._address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(self._address, _last_line(error)) from error
        self._is_connected_here = True


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, for the processes that are started inside; unset them at the end."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _check_reachable(address: str) -> None:
    """Fail at once, as Ray tries for minutes to reach a machine that is not there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_NOTICE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> MultisaError:
    return MultisaError(
        f"--ray {address}: cannot be reached ({reason}), expected auto, {LOCAL}, HOST:PORT or "
        "ray://HOST:PORT of a running cluster: start one with `ray start --head`"
    )


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        cause = "ray is not installed" if error.name == "ray" else f"ray cannot be imported: {error}"
        raise BackendUnavailable(cause, remedy='pip install "multisa[ray]"') from error
    return ray


def _with_absolute_paths(job: Job) -> Job:
    """The job as other machines, whose working directory is another one, understand it."""
    source = job.source if "://" in job.source else str(Path(job.source).absolute())
    engine_cache = job.backend.engine_cache and job.backend.engine_cache.absolute()
    return replace(
        job,
        source=source,
        output=job.output.absolute(),
        bundle=job.bundle.absolute(),
        backend=replace(job.backend, engine_cache=engine_cache),
    )


def _last_line(error: Exception) -> str:
    """The last line of the message, where Ray has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:_MAX_REASON] if lines else type(error).__name__
