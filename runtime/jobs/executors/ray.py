"""The machines of a Ray cluster: an actor on each GPU, or on each machine where the cluster has none.

with RayExecutor(job, watch, "auto") as crew:
    crew.do(shards, committed)

Machines may leave and join while a run goes on. All of them see the images, the bundle and OUT at the same
paths, and have the same version of multisa; whoever started the run keeps the journal.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from multisa.runtime.errors import BackendUnavailable, MultisaError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.jobs.executors.remote import Answer, RemoteExecutor, WorkerDied, WorkerHandle
from multisa.runtime.jobs.executors.worker import UNDER_WAY, RemoteError, ShardTask, ShardWorker
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.shards import TEMPORARY
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.progress import log

LOCAL = "local"  # the address for a cluster of this machine alone, for this run

_LOOK = 2.0  # seconds between looks at which machines there are
_REST = 5.0  # seconds before an actor is started again where one was lost: is the machine still there?
_OTHERS = 60.0  # seconds the first waits for the others, to find out at once if they differ
_NOTICE, _NOBODY = 30.0, 600.0  # seconds without an actor until that is said, and until the run is given up
_STORE = 100 << 20  # bytes for Ray's objects: results of shards are small
_SAID = 300  # characters of what Ray says of a loss
# Ray would send statistics of use, and warn of a variable that it sets for actors without a GPU.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class _Place:
    """Room for one actor."""

    node: str
    host: str
    position: int  # among those of its node
    cpus: int
    gpus: int


@dataclass(eq=False, kw_only=True)
class _Actor(WorkerHandle):
    place: _Place
    handle: Any
    calls: list[Any] = field(default_factory=list)  # references to answers
    since: float = field(default_factory=time.monotonic)
    said: bool = False  # that it is waited for


class RayExecutor(RemoteExecutor[_Actor]):
    """The actors of a cluster; where one is lost another is started, while the machine is there."""

    def __init__(self, job: Job, watch: RunMonitor, address: str) -> None:
        """Raises BackendUnavailable without Ray."""
        super().__init__(_absolute(job), watch)
        self._address, self._ray = address, _import_ray()
        self._ours = False  # whether the connection to the cluster is to be closed at the end
        self._on_gpus = False
        self._actors: dict[_Place, _Actor] = {}
        self._not_before: dict[_Place, float] = {}
        self._left_out: set[_Place] = set()
        self._looked = 0.0
        self._shared = ""  # a file below OUT that every machine must see
        self._nobody_since = time.monotonic()
        self._nobody_said = False

    def _open(self) -> None:
        self._connect()
        places = self._places()
        self._on_gpus = any(place.gpus for place in places)
        start = time.monotonic()
        while not self._is_complete(time.monotonic() - start):
            self._take_answers()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor.handle)  # nothing that is cut off is lost
        self._actors = {}
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    def do(self, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        """See Hands."""
        self._shared = f"{TEMPORARY}/shared-{secrets.token_hex(8)}"
        path = self._job.out / self._shared
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, b"")
        try:
            super().do(shards, committed)
        finally:
            path.unlink(missing_ok=True)

    def _members(self) -> Collection[_Actor]:
        return self._actors.values()

    def _give(self, member: _Actor, order: ShardTask) -> None:
        member.calls.append(member.handle.do.remote(replace(order, shared=self._shared)))

    def _is_of_member(self, fault: RemoteError) -> bool:
        """One machine may have lost what the others still see: the images, OUT, its disk."""
        return not fault.trace

    def _drop(self, member: _Actor) -> None:
        self._left_out.add(member.place)
        self._dismiss(member)

    def _answers(self) -> Iterator[tuple[_Actor, Answer]]:
        self._settle()
        by_call = {call: actor for actor in self._actors.values() for call in actor.calls}
        if not by_call:
            time.sleep(_LOOK)
            return
        answered, _ = self._ray.wait(list(by_call), num_returns=1, timeout=_LOOK)
        for call in answered:
            actor = by_call[call]
            actor.calls.remove(call)
            try:
                answer: Answer = self._ray.get(call)
            except (
                self._ray.exceptions.RayTaskError
            ):  # an error of ours: the rest says that all is lost there
                raise
            except self._ray.exceptions.RayError as error:
                self._dismiss(actor)
                self._not_before[actor.place] = time.monotonic() + _REST
                answer = WorkerDied(_in_short(error))
            yield actor, answer

    def _dismiss(self, actor: _Actor) -> None:
        """It may still be alive behind a broken network; what it finishes has the same bytes."""
        self._ray.kill(actor.handle)
        self._actors.pop(actor.place, None)

    def _is_complete(self, waited: float) -> bool:
        ready = [actor.ready for actor in self._actors.values()]
        return any(ready) and (all(ready) or waited > _OTHERS)

    def _settle(self) -> None:
        """Start an actor wherever there is room; now and then, as machines join and leave."""
        now = time.monotonic()
        self._check_somebody(now)
        if now - self._looked < _LOOK:
            return
        self._looked = now
        for actor in self._actors.values():
            if not actor.ready and not actor.said and now - actor.since > _NOTICE:
                actor.said = True
                log.info(f"{actor.name} has not joined yet: is there room for it? see `ray status`")
        for place in self._places():
            taken = place in self._actors or place in self._left_out
            if not taken and place.gpus == int(self._on_gpus) and self._not_before.get(place, now) <= now:
                self._actors[place] = self._start(place)

    def _check_somebody(self, now: float) -> None:
        if any(actor.ready for actor in self._actors.values()):
            self._nobody_since, self._nobody_said = now, False
        elif now - self._nobody_since > _NOBODY:
            raise MultisaError(
                f"--ray {self._address}: no machine of the cluster has taken an actor for {_NOBODY:.0f} s: "
                "see `ray status`; the same command goes on from what is done"
            )
        elif now - self._nobody_since > _NOTICE and not self._nobody_said:
            self._nobody_said = True
            log.info("waiting for the cluster: no machine has room for an actor yet; see `ray status`")

    def _start(self, place: _Place) -> _Actor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = self._ray.remote(ShardWorker).options(
            num_cpus=min(place.cpus, 1),  # who asks for all of a machine that others use gets none
            num_gpus=place.gpus,
            max_concurrency=UNDER_WAY,
            max_restarts=0,  # lost shards are handed out again, to whoever is there
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
        )
        sizes = replace(self._job.sizes, workers=max(1, place.cpus))
        handle = remote.remote(replace(self._job, sizes=sizes))
        name = f"actor {place.position + 1} on {place.host} (node {place.node[:8]})"
        return _Actor(name, place=place, handle=handle, calls=[handle.open.remote()])

    def _places(self) -> list[_Place]:
        """One for each GPU, and one for each machine that has none."""
        places = []
        for node in self._ray.nodes():
            cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
            if not node["Alive"] or not (cpus or gpus):
                continue
            for position in range(gpus or 1):
                share = cpus // (gpus or 1)
                host = node["NodeManagerHostname"]
                places.append(_Place(node["NodeID"], host, position, share, min(gpus, 1)))
        return places

    def _connect(self) -> None:
        if self._ray.is_initialized():  # by the program that this is a part of
            return
        _check_answers(self._address)
        local = {"include_dashboard": False, "object_store_memory": _STORE} if self._address == LOCAL else {}
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _not_reached(self._address, _in_short(error)) from error
        self._ours = True


def _check_answers(address: str) -> None:
    """Ray tries for minutes to reach a machine that is not there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_NOTICE).close()
    except (OSError, OverflowError) as error:
        raise _not_reached(address, str(error)) from error


def _not_reached(address: str, reason: str) -> MultisaError:
    return MultisaError(
        f"--ray {address}: cannot be reached ({reason}), expected auto, {LOCAL}, HOST:PORT or "
        "ray://HOST:PORT of a cluster that runs: ray start --head"
    )


def _import_ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        cause = "ray is not installed" if error.name == "ray" else f"ray cannot be imported: {error}"
        raise BackendUnavailable(cause, remedy='pip install "multisa[ray]"') from error
    return ray


def _absolute(job: Job) -> Job:
    """The job as other machines, and other folders of work, understand it."""
    source = job.source if "://" in job.source else str(Path(job.source).absolute())
    engine_cache = job.request.engine_cache and job.request.engine_cache.absolute()
    return replace(
        job,
        source=source,
        out=job.out.absolute(),
        bundle=job.bundle.absolute(),
        request=replace(job.request, engine_cache=engine_cache),
    )


def _in_short(error: Exception) -> str:
    """The last line, where Ray has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:_SAID] if lines else type(error).__name__
