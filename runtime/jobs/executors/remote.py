"""Shards whose doers were lost again and again: done image by image, to find the one that ends processes."""

import secrets
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from multisa.runtime.errors import BackendUnavailable, MultisaError, UsageError
from multisa.runtime.jobs.executor import ShardReport
from multisa.runtime.jobs.executors.worker import UNDER_WAY, RemoteError, ShardTask, WorkerInfo
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.shards import TEMPORARY, clear_temporary
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency, Failure
from multisa.runtime.predict.prediction import StageTimer
from multisa.runtime.progress import log, pluralize

MAX_LOSSES_AT_A_SHARD = 3  # until its images are done one by one
MAX_LOSSES_AT_AN_IMAGE = 2  # that was in hand by itself, until it is a failure
MAX_FAILURES_OF_A_SHARD = 3  # so found; with more it is not the images
_REASON = "ends the process that does it, as a decoder that crashes or too little memory do"


class PoisonImages:
    """What is known of shards that were in hand where a process was lost."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._losses: Counter[int] = Counter()  # by shard
        self._losses_at: Counter[int] = Counter()  # by position of an image
        self._failures: dict[int, list[Failure]] = {}  # by shard that is a suspect
        self._waiting: deque[Shard] = deque()
        self.in_hand: dict[int, str] = {}  # the marker of each suspect that is being done

    def __bool__(self) -> bool:
        """Whether one waits to be done."""
        return bool(self._waiting)

    def __contains__(self, shard: int) -> bool:
        return shard in self._failures

    def next_order(self) -> ShardTask:
        """The next one that waits, for a process that has nothing else in hand."""
        shard = self._waiting.popleft()
        self.in_hand[shard.number] = progress_file = f"{TEMPORARY}/at-{secrets.token_hex(8)}"
        return ShardTask(shard, progress_file=progress_file, failures=tuple(self._failures[shard.number]))

    def done(self, shard: int) -> None:
        """Note a shard that is committed."""
        self.in_hand.pop(shard, None)

    def lost(self, shard: Shard, reason: str) -> bool:
        """Note that a process was lost with a shard in hand; returns whether it explains the loss for now."""
        progress_file = self.in_hand.pop(shard.number, None)
        if progress_file is None:
            self._losses[shard.number] += 1
            if self._losses[shard.number] >= MAX_LOSSES_AT_A_SHARD:
                self._failures[shard.number] = []
                self._waiting.append(shard)
            return self._losses[shard.number] > 1
        self._waiting.append(shard)
        return self._blame(shard, self._read(progress_file), reason)

    def append(self, shard: Shard) -> None:
        """Take back one whose process was left out for another reason."""
        self.in_hand.pop(shard.number, None)
        self._waiting.append(shard)

    def _blame(self, shard: Shard, index: int, reason: str) -> bool:
        found = [work for work in shard.works if work.index == index]
        self._losses_at[index] += 1
        few = len(self._failures[shard.number]) < MAX_FAILURES_OF_A_SHARD
        if not found or not few or self._losses_at[index] < MAX_LOSSES_AT_AN_IMAGE:
            return False
        image = found[0].item.id
        log.info(f"{image}: ends whoever does it ({reason}): it is left out")
        self._failures[shard.number].append(Failure(index, image, "process", _REASON))
        return True

    def _read(self, progress_file: str) -> int:
        """The position of the image that was in hand; -1 for none."""
        path = self._out / progress_file
        try:
            return int(path.read_text())
        except (FileNotFoundError, ValueError):
            return -1
        finally:
            path.unlink(missing_ok=True)


# Losses of one member in a row, with no shard done in between, that cannot be chance any more.
MAX_LOSSES = 3


@dataclass(eq=False)
class WorkerHandle:
    """One process of a crew, as the one that leads sees it."""

    name: str  # for people: "process 2"
    ready: bool = False
    shards: dict[int, Shard] = field(default_factory=dict)  # under way, by number


@dataclass(frozen=True)
class WorkerDied:
    """A process that is no more, and what is known of why."""

    reason: str


Answer = WorkerInfo | ShardReport | RemoteError | WorkerDied
AnyHandle = TypeVar("AnyHandle", bound=WorkerHandle)


class RemoteExecutor(ABC, Generic[AnyHandle]):
    """What crews of other processes have in common: a Crew, but for how it begins and ends."""

    _advice = "the same command goes on from what is done"  # where processes are lost again and again

    def __init__(self, job: Job, watch: RunMonitor) -> None:
        self._job, self._watch = job, watch
        self._timer = StageTimer(watch.stage_busy)
        self._first: tuple[str, WorkerInfo] | None = None  # the name of a member, and what all must answer
        self._ready: dict[str, WorkerInfo] = {}  # by the name of the member
        self._said: set[str] = set()
        self._again: deque[Shard] = deque()
        self._poison = PoisonImages(job.out)
        self._doing = False
        self._losses: Counter[str] = Counter()  # in a row, by the name of the member
        self._was_lost = False

    @abstractmethod
    def _open(self) -> None:
        """Start all members, and wait until they are ready."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException as error:  # what was started by then must not outlive this
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    @abstractmethod
    def _members(self) -> Collection[AnyHandle]:
        """All who are there, ready or not."""

    @abstractmethod
    def _give(self, member: AnyHandle, order: ShardTask) -> None:
        """Hand a shard out. A member that is lost is so noticed by `_answers`, and not here."""

    @abstractmethod
    def _answers(self) -> Iterable[tuple[AnyHandle, Answer]]:
        """Wait a while for answers of members; who is Lost is no member any more."""

    @abstractmethod
    def _drop(self, member: AnyHandle) -> None:
        """Have it, or what was started in its place, be a member no more."""

    def _is_of_member(self, fault: RemoteError) -> bool:
        """Whether others may do what one could not do."""
        return fault.kind == BackendUnavailable.__name__

    def _leave_out(self, member: AnyHandle, error: Exception) -> None:
        """Go on without a member that cannot be had; raise why where it is the last, or the run begins."""
        if not self._doing or not any(other.ready for other in self._members() if other is not member):
            raise error
        log.info(f"{member.name} is left out: {error}")
        self._drop(member)

    def identity(self) -> Mapping[str, Any]:
        """See Crew."""
        return self._answered().identity

    def backends(self) -> Mapping[str, Any]:
        """See Crew."""
        return self._answered().backends

    def width(self) -> Concurrency:
        """See Crew; the cores of a machine count once, however many are on it."""
        ready = self._ready.values()
        cores = {one.host: one.cores for one in ready}
        return Concurrency(tuple(one.sizes for one in ready), sum(cores.values()))

    def seconds(self) -> Mapping[str, float]:
        """See Crew."""
        return self._timer.seconds()

    def do(self, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        """Hand out all shards; what was lost comes last, as it may be a shard that ends whoever does it.

        `committed` is called in this thread. Raises what was raised where a shard was done, and MultisaError
        when processes are lost again and again.
        """
        self._doing = True
        while True:
            all_out = self._hand_out(shards)
            if all_out and not any(member.shards for member in self._members()):
                break
            self._take_answers(committed)
        if self._was_lost:
            clear_temporary(self._job.out)  # of those that were lost

    def _hand_out(self, shards: Iterator[Shard]) -> bool:
        """Give to whoever is free; returns whether one was left with nothing to do."""
        while free := [m for m in self._members() if m.ready and self._has_room(m)]:
            shard = next(shards, None) or (self._again.popleft() if self._again else None)
            member = min(free, key=lambda m: len(m.shards))
            if shard is not None:
                order = ShardTask(shard)
            elif not self._poison:
                return True
            elif member.shards:  # it would take others with it
                return False
            else:
                order = self._poison.next_order()
            member.shards[order.shard.number] = order.shard
            self._give(member, order)
        return False  # it may be that nobody is there, and then nothing is known of what is left

    def _has_room(self, member: AnyHandle) -> bool:
        alone = any(number in self._poison.in_hand for number in member.shards)
        return len(member.shards) < UNDER_WAY and not alone

    def _take_answers(self, committed: Callable[[ShardResult], None] | None = None) -> None:
        for member, answer in self._answers():
            if isinstance(answer, RemoteError):
                if member.ready and not self._is_of_member(answer):
                    raise answer.error()
                for shard in member.shards.values():
                    (self._poison if shard.number in self._poison else self._again).append(shard)
                self._leave_out(member, answer.error())
            elif isinstance(answer, WorkerInfo):
                self._welcome(member, answer)
            elif isinstance(answer, WorkerDied):
                self._lose(member, answer.reason)
            elif committed is not None:
                del member.shards[answer.result.shard]
                self._poison.done(answer.result.shard)
                self._losses[member.name] = 0
                self._count(answer)
                committed(answer.result)

    def _count(self, outcome: ShardReport) -> None:
        for stage, seconds in outcome.seconds.items():
            self._timer.add(stage, seconds)
        for failure in outcome.failures:
            self._watch.image_failed(failure)
        self._watch.images_done(outcome.result.images)

    def _welcome(self, member: AnyHandle, ready: WorkerInfo) -> None:
        """Take a process into the crew, unless it would write other bytes than the others."""
        name, first = self._first = self._first or (member.name, ready)
        theirs = {**ready.identity, "SHA-256 of the bundle": ready.bundle}
        ours = {**first.identity, "SHA-256 of the bundle": first.bundle}
        if different := [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]:
            listed = "; ".join(f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in different)
            message = (
                f"{name} and {member.name} would not write the same bytes ({listed}): install the same "
                "versions, and name one engine for all (--backend, --precision)"
            )
            self._leave_out(member, UsageError(message))
            return
        for line in ready.said:
            if line not in self._said:
                log.info(line)
        self._said.update(ready.said)
        self._ready[member.name] = ready
        member.ready = True

    def _lose(self, member: AnyHandle, reason: str) -> None:
        self._was_lost = True
        self._losses[member.name] += 1
        for shard in member.shards.values():
            if self._poison.lost(shard, reason):
                self._losses[member.name] = 0  # it is not the member
            if shard.number not in self._poison:
                self._again.append(shard)
        numbers = ", ".join(map(str, member.shards))
        said = f"{member.name} was lost{f' at shard {numbers}' if numbers else ''} ({reason})"
        if self._losses[member.name] >= MAX_LOSSES:
            times = f"{MAX_LOSSES} times in a row without a shard done"
            self._leave_out(member, MultisaError(f"{said}, {times}: {self._advice}"))
            return
        again = f": {pluralize(len(member.shards), 'shard')} to be done again" if numbers else ""
        log.info(f"{said}{again}")

    def _answered(self) -> WorkerInfo:
        if self._first is None:
            raise RuntimeError("a crew was asked before it was opened")
        return self._first[1]
