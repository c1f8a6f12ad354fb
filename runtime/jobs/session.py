"""One sitting of a run: the shards that are not committed yet, and the end once all are."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from multisa.runtime.errors import Interrupted, MultisaError, UsageError
from multisa.runtime.jobs.executor import Executor
from multisa.runtime.jobs.finalize import (
    failed_indices,
    failure_reasons,
    finalize_files,
    is_finalized,
    record_finalized,
    reopen,
    write_failures,
)
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.monitor import RunMonitor, StopRequest, check_failures, failure_limit
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.shards import is_intact
from multisa.runtime.jobs.snapshot import Shard, Snapshot
from multisa.runtime.jobs.spec import Job, RunOptions
from multisa.runtime.progress import log, pluralize
from multisa.runtime.writers.base import Writer


@dataclass
class RunSession:
    """From the journal as it is to the journal that has every shard."""

    job: Job
    options: RunOptions
    snapshot: Snapshot
    journal: Journal
    stop: StopRequest
    watch: RunMonitor
    classes: Sequence[str]  # of the foreground
    _altered: set[int] = field(default_factory=set)  # committed, and to be done again
    _failed_before: int = 0
    _start: float = field(default_factory=time.perf_counter)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def do(self, executor: Executor) -> None:
        """Do every shard that is not committed. Raises Interrupted or TooManyFailures when stopped before."""
        if self.journal.torn:
            log.info("the last line of the journal was torn: its shard is done again")
        if self.options.retry_failed:
            self._add_retries()
        if self.options.verify:
            self._find_altered()
        before = self.journal.images + self.journal.failed
        if self.options.max_failures is not None:
            self._failed_before = self._count_failed()
            if self._is_left():  # a restart does not creep past the limit
                self._check_failures(self._failed_before)
        if before:
            log.info(f"done before: {pluralize(self.journal.shards, 'shard')}")
        self.watch.begin(self.snapshot.images, min(before, self.snapshot.images))

        def committed(result: ShardResult) -> None:
            self.journal.append(result)
            self.watch.shard_committed(result.shard, result.images)
            if self.options.max_failures is not None:
                limit = failure_limit(self.options.max_failures, self.snapshot.images)
                self.stop.too_many_failures |= self._failed_before + self.watch.failed > limit

        executor.do(self._pending(), committed)
        self._raise_if_stopped()

    def summary(self, executor: Executor) -> RunSummary:
        """What was done, in all sittings and in this one."""
        failed = len(failed_indices(self.job.out, *self._committed()))
        images = self.snapshot.images
        return RunSummary(
            images=images,
            done=images - failed,
            failures=failed,
            done_now=self.watch.done,
            seconds=time.perf_counter() - self._start,
            stage_seconds=executor.seconds(),
            job=self.job,
            width=executor.width(),
            skipped=self.snapshot.skipped,
            failure_kinds=dict(self.watch.failure_kinds),
            reasons=failure_reasons(self.job.out),
        )

    def finalize(self, writers: Sequence[Writer]) -> bool:
        """Write what is one file for the whole run; returns whether there was anything to write."""
        shards, retries = self._committed()
        if is_finalized(self.job.out, len(shards) + len(retries)):
            return False
        finalize_files(self.job.out, writers, shards, retries)
        return True

    def record_finalized(self) -> None:
        """Note that nothing but the page is left to be written."""
        record_finalized(self.job.out, sum(map(len, self._committed())))

    def _pending(self) -> Iterator[Shard]:
        for number, _ in list(self.snapshot.shards(self.options.shard_size)):  # no rows are left open
            if self.stop:
                return
            if number not in self.journal or number in self._altered:
                yield self.snapshot.shard(number, self.options.shard_size)

    def _is_left(self) -> bool:
        numbers = [number for number, _ in self.snapshot.shards(self.options.shard_size)]
        return bool(self._altered) or any(number not in self.journal for number in numbers)

    def _committed(self) -> tuple[list[int], list[int]]:
        """Numbers of the committed shards: the first ones, those of retries."""
        first = -(-self.snapshot.images // self.options.shard_size)
        numbers = [n for n, _ in self.snapshot.shards(self.options.shard_size) if n in self.journal]
        return [n for n in numbers if n < first], [n for n in numbers if n >= first]

    def _add_retries(self) -> None:
        waiting = {
            work.index
            for number, _ in self.snapshot.shards(self.options.shard_size)
            if number not in self.journal and number * self.options.shard_size >= self.snapshot.images
            for work in self.snapshot.shard(number, self.options.shard_size).works
        }
        failed = [i for i in failed_indices(self.job.out, *self._committed()) if i not in waiting]
        changed = ""
        if not self.options.skip_source_check:
            with self.job.open_source(self.classes) as source:
                changed = self.snapshot.take_changes(source.listing, failed)
        if changed:
            raise UsageError(
                f"{self.job.source}: has changed since the run began, and not only the failed images: "
                f"{changed}: expected all others as they were; --skip-source-check takes the images of then"
            )
        log.info(f"{pluralize(len(failed), 'failed image')} to be tried again")
        self.snapshot.add_retries(failed, self.options.shard_size)
        reopen(self.job.out)

    def _count_failed(self) -> int:
        """Images that have failed for now; what is tried again, or done again, counts when it fails again."""
        size, first = self.options.shard_size, -(-self.snapshot.images // self.options.shard_size)
        kept = [[n for n in numbers if n not in self._altered] for numbers in self._committed()]
        again = {
            work.index
            for number, _ in self.snapshot.shards(size)
            if number >= first and (number not in self.journal or number in self._altered)
            for work in self.snapshot.shard(number, size).works
        }
        return len(set(failed_indices(self.job.out, *kept)) - again)

    def _find_altered(self) -> None:
        out, known = self.job.out, {n for numbers in self._committed() for n in numbers}
        digests = {n: digest for n, digest in self.journal.digests() if n in known}  # the last one counts
        self._altered = {n for n, digest in digests.items() if not is_intact(out, n, digest)}
        if self._altered:
            log.info(f"altered or missing files, done again: {pluralize(len(self._altered), 'shard')}")
        reopen(out)  # what is one file for the whole run is cheap to make anew

    def _raise_if_stopped(self) -> None:
        committed, retries = self._committed()
        done, shards = (
            len(committed) + len(retries),
            len(list(self.snapshot.shards(self.options.shard_size))),
        )
        if done == shards:  # there is nothing left to be kept from
            return
        so_far = f"{done} of {pluralize(shards, 'shard')} are done, and the same command goes on from there"
        if self.stop.signal is not None:
            raise Interrupted(f"interrupted: {so_far}", signal=self.stop.signal)
        if self.stop.too_many_failures and self.options.max_failures is not None:
            log.info(f"stopped: {done} of {pluralize(shards, 'shard')} are done")
            write_failures(self.job.out, committed, retries)
            failed = self._failed_before + self.watch.failed
            self._check_failures(failed)
        raise MultisaError(f"the run ended before its end: {so_far}")  # never as if all were done

    def _check_failures(self, failed: int) -> None:
        check_failures(failed, self.snapshot.images, self.options.max_failures, self.job.out)
