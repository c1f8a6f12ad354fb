"""One run: start or resume it, process the shards that are not committed, finalize it.

    OUT/masks/NAME.png ...        results, by writer      OUT/report.html       a page to look at
    OUT/labels.jsonl              one line per image      OUT/.multisa/         snapshot, journal, times
    OUT/failed.jsonl              images that failed

You can kill a run at any time. Run the same command again: it resumes with the shards that are not committed,
and every file outside OUT/.multisa and the report is byte-identical to that of an uninterrupted run, whatever
the number of workers, processes and resumed runs. Runs are tested on Linux.
"""

import itertools
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from multisa.runtime.bundle import load_bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import Interrupted, MultisaError, UsageError
from multisa.runtime.files import read_json_object, sha256_of_file
from multisa.runtime.image_labels import ClassNames, ImageLabels, LabelMapping, Labels, image_key, read_image_labels
from multisa.runtime.jobs.finalize import (
    failed_indices,
    failure_reasons,
    finalize_files,
    finalized_counts,
    finalized_files,
    is_finalized,
    is_report_written,
    record_finalized,
    remove_report,
    reopen,
    write_failures,
    write_run_report,
)
from multisa.runtime.jobs.fingerprint import (
    Fingerprint,
    differences,
    read_fingerprint,
    run_fingerprint,
    write_fingerprint,
)
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.monitor import RunMonitor, StopRequest, check_failures, failure_limit, stop_on_signals
from multisa.runtime.jobs.output import (
    JOURNAL,
    RUN,
    SNAPSHOT,
    UNUSED,
    check_empty,
    check_output,
    image_checker,
    output_errors,
    remove_results,
    run_lock,
)
from multisa.runtime.jobs.record import RunSummary, run_record, without_secrets, write_record
from multisa.runtime.jobs.shards import clear_temporary, is_intact
from multisa.runtime.jobs.snapshot import Shard, Snapshot, take_snapshot
from multisa.runtime.jobs.spec import Job, RunOptions
from multisa.runtime.jobs.telemetry import Telemetry
from multisa.runtime.jobs.worker import Executor, ExecutorFactory
from multisa.runtime.progress import EXAMPLES_SHOWN, format_examples, log, pluralize
from multisa.runtime.sources.base import Listed, Skipped, SourceItem, describe_other_files
from multisa.runtime.sources.lists import FilesSource, ListSource
from multisa.runtime.writers.base import Writer
from multisa.runtime.writers.registry import writer_folder

_LABEL_FILES = ("labels.csv", "labels.json")  # names that documentation and data sets use
_ALTERNATIVES = "start over (--overwrite), or choose another folder"


def prepare_output(
    job: Job, options: RunOptions, fingerprint: Fingerprint, labels: ImageLabels | None, foreground: Sequence[str]
) -> None:
    """Make OUT hold the snapshot and the settings of this run, or check that it does.

    Raises UsageError if OUT holds a run of other settings or other images, or results of unknown origin.
    """
    existing = None if options.overwrite else read_fingerprint(job.output)
    if options.overwrite:
        remove_results(job.output, finalized_files(job.output))
    if existing is None and options.retry_failed:
        raise UsageError(f"{job.output}: holds no run, expected one with failed images to try again")
    if existing is None:
        if not options.overwrite:
            check_empty(job.output, map(writer_folder, job.writers), finalized_files(job.output))
            remove_results(job.output, ())  # of a run whose start or removal was interrupted
        _take_snapshot(job, options, labels, foreground)
        write_fingerprint(job.output, fingerprint)
    elif different := differences(fingerprint, existing):
        raise UsageError(
            f"{job.output}: holds a run of other settings ({'; '.join(different)}): use those, {_ALTERNATIVES}"
        )
    elif not options.skip_source_check and not options.retry_failed:
        _check_source(job, foreground)
    clear_temporary(job.output)


class _LabelLookup:
    """The labels of each image of a source: from the label file, else those that the source contains."""

    def __init__(self, job: Job, labels: ImageLabels | None, foreground: Sequence[str]) -> None:
        self._names = ClassNames(foreground)
        self._skipped_rows: dict[str, str] = {}  # rows of entries that the source skips, and the reason
        self._is_label = job.command == "label"
        self._labels = labels
        self.matcher = None
        if labels:
            with job.open_source(foreground) as source:
                self.matcher = labels.matcher(self._images(source.listing()), source.folder_name)
        self._unlabelled: list[str] = []  # ids of the first images whose classes are predicted
        self._n_unlabelled = 0
        self._n_ignored = 0  # images whose labels `segment` does not use
        self._replaced: list[str] = []  # ids of images with other labels in the source than in the label file
        self._source = without_secrets(job.source)

    def _images(self, listing: Iterable[Listed]) -> Iterator[str]:
        for entry in listing:
            if isinstance(entry, SourceItem):
                yield entry.id
            elif isinstance(entry, Skipped) and self._labels and (key := image_key(entry.id)) in self._labels.rows:
                self._skipped_rows[key] = f"its image is skipped: {entry.reason}"

    def find(self, item: SourceItem) -> Labels | None:
        """The labels of an image; None: its classes are predicted. Raises UsageError."""
        if not self._is_label:
            self._n_ignored += item.labels is not None
            return None
        found = self.matcher.find(item.id) if self.matcher else None
        if item.labels is not None:
            own = self._names.resolve(item.labels, f"{self._source}: {item.id}")
            if found not in (None, own):
                self._replaced.append(item.id)
            found = own if found is None else found
        if found is None:
            self._n_unlabelled += 1
            if len(self._unlabelled) < EXAMPLES_SHOWN:
                self._unlabelled.append(item.id)
        return found

    def log(self, n_images: int) -> None:
        """Log which images and which rows of the label file are without each other.

        Raises UsageError if no image has a row, and none has labels in the source.
        """
        images = pluralize(n_images, "image")
        examples = format_examples(self._unlabelled, self._n_unlabelled)
        if self._n_ignored:
            log.info(f"segment does not use image-level labels: those of {self._n_ignored} of {images} are ignored")
        if self._labels and self.matcher and self._n_unlabelled == n_images:
            near = [f"{row} ({self.matcher.why_unused(row)})" for row in sorted(self.matcher.misplaced)]
            rows = format_examples(near or list(self._labels.rows))
            raise UsageError(
                f"{self._labels.name}: has no row for any of {images}: got rows such as {rows}, expected paths below "
                f"{self._source}, or file names, such as {examples}; without --labels, classes are predicted"
            )
        if self._n_unlabelled:
            without = f"without a row in {self._labels.name} and " if self._labels else ""
            named = f": {examples}" if self._n_unlabelled < n_images else ""
            level = logging.WARNING if self._labels else logging.INFO
            log.log(level, f"{without}labelled with predicted classes: {self._n_unlabelled} of {images}{named}")
        if self._labels is None or self.matcher is None:
            unread = [path for name in _LABEL_FILES if (path := Path(self._source, name)).is_file()]
            if self._is_label and unread:
                log.warning(f"{unread[0]} is not read: name it with --labels to use it")
            return
        if self._replaced:
            examples = format_examples(self._replaced)
            count = pluralize(len(self._replaced), "image")
            log.info(f"labels of {count} in the source are replaced by those of {self._labels.name}: {examples}")
        if self.unused_rows:
            some = [f"{row} ({reason})" for row, reason in self.unused_rows[:EXAMPLES_SHOWN]]
            rows = pluralize(len(self.unused_rows), "row")
            examples = format_examples(some, len(self.unused_rows))
            log.warning(f"without an image: {rows} of {self._labels.name}: {examples}")
        if moved := [f"{row} for {image}" for row, image in sorted(self.matcher.moved.items())]:
            rows = pluralize(len(moved), "row")
            log.info(f"used, though they name another folder: {rows} of {self._labels.name}: {format_examples(moved)}")

    @cached_property
    def unused_rows(self) -> list[tuple[str, str]]:
        """The rows of the label file that belong to no image, and why; read it when all images are found."""
        matcher = self.matcher
        if matcher is None:
            return []
        return [(row, self._skipped_rows.get(row) or matcher.why_unused(row)) for row in matcher.unused()]


def _take_snapshot(job: Job, options: RunOptions, labels: ImageLabels | None, foreground: Sequence[str]) -> None:
    lookup = _LabelLookup(job, labels, foreground)
    check_image = image_checker(job.source, job.output, map(writer_folder, job.writers))

    def labels_of(item: SourceItem) -> Labels | None:
        if is_list:
            check_image(item.uri)
        return lookup.find(item)

    with job.open_source(foreground) as source:
        is_list = isinstance(source, ListSource) and not isinstance(source, FilesSource)  # those are checked already
        take_snapshot(job.output / SNAPSHOT, source.listing(), labels_of, source.description)
    with Snapshot(job.output / SNAPSHOT) as snapshot:
        if snapshot.skipped:
            log.info(f"skipped {snapshot.skipped}: {format_examples(snapshot.skipped_by_reason())}")
        if snapshot.other_files.count and options.log_other_files:
            log.info(f"ignored {describe_other_files(snapshot.other_files)}")
        lookup.log(snapshot.images)
        _write_unused(job.output / UNUSED, snapshot, lookup)


def _write_unused(path: Path, snapshot: Snapshot, lookup: _LabelLookup) -> None:
    """Write what the run does not use, one JSON object per line; no file if it uses everything."""
    entries = (("entry of the source", entry.id, entry.reason) for entry in snapshot.skipped_entries())
    rows = (("row of the label file", row, reason) for row, reason in lookup.unused_rows)
    n_unused = 0
    with path.open("w", encoding="utf-8") as file:
        for what, name, reason in itertools.chain(entries, rows):
            file.write(json.dumps({"what": what, "name": name, "reason": reason}, ensure_ascii=False) + "\n")
            n_unused += 1
    if n_unused:
        log.info(f"full list of what is not used ({n_unused}): {path}")
    else:
        path.unlink()


def _check_source(job: Job, foreground: Sequence[str]) -> None:
    with job.open_source(foreground) as source, Snapshot(job.output / SNAPSHOT) as snapshot:
        changed = snapshot.difference(source.listing)
    if changed:
        raise UsageError(
            f"{without_secrets(job.source)}: has changed since the run in {job.output} began: {changed}: continue with "
            "the original list of images (--skip-source-check), retry failed images that were repaired "
            f"(--retry-failed), {_ALTERNATIVES}"
        )


@dataclass
class RunSession:
    """Processes the uncommitted shards of a run."""

    job: Job
    options: RunOptions
    snapshot: Snapshot
    journal: Journal
    stop: StopRequest
    monitor: RunMonitor
    classes: Sequence[str]  # of the foreground
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    _altered: set[int] = field(default_factory=set)  # committed shards to redo
    _failed_before: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def run(self, executor: Executor) -> None:
        """Process every shard that is not committed. Raises Interrupted or TooManyFailures if stopped."""
        if self.journal.torn:
            log.info("the last line of the journal is incomplete: its shard is processed again")
        if self.options.retry_failed:
            self._add_retries()
        if self.options.verify:
            self._find_altered()
        before = self.journal.images + self.journal.failed
        if self.options.max_failures is not None:
            self._failed_before = self._count_failed()
            if not all(map(self._is_committed, self._shards())):  # a restart must not creep past the limit
                self._check_failures(self._failed_before)
        if before:
            log.info(f"resuming: {pluralize(self.journal.shards, 'shard')} done before")
        self.monitor.start(self.snapshot.images, min(before, self.snapshot.images))

        def on_commit(result: ShardResult) -> None:
            self.journal.append(result)
            self.monitor.shard_committed(result.shard, result.images)
            if self.options.max_failures is not None:
                limit = failure_limit(self.options.max_failures, self.snapshot.images)
                self.stop.too_many_failures |= self._failed_before + self.monitor.failed > limit

        executor.run(self._pending(), on_commit)
        self._raise_if_stopped()

    def finalize(self, writers: Sequence[Writer]) -> bool:
        """Write the files that cover the whole run; returns whether there was anything to write."""
        shards, retries = self._committed()
        if is_finalized(self.job.output, len(shards) + len(retries)):
            return False
        finalize_files(self.job.output, writers, shards, retries, self.classes)
        return True

    def record_finalized(self) -> None:
        """Note that only the report may be missing."""
        record_finalized(self.job.output, shards=sum(map(len, self._committed())))

    def summary(self, executor: Executor) -> RunSummary:
        """What was done, in all sessions and in this one; call it after `finalize`."""
        failed = len(failed_indices(self.job.output, *self._committed()))
        images = self.snapshot.images
        return RunSummary(
            images=images,
            done=images - failed,
            failures=failed,
            done_now=self.monitor.done,
            seconds=time.perf_counter() - self._start,
            stage_seconds=executor.stage_seconds(),
            job=self.job,
            concurrency=executor.concurrency(),
            skipped=self.snapshot.skipped,
            failure_kinds=dict(self.monitor.failure_kinds),
            reasons=failure_reasons(self.job.output),
            images_per_class=finalized_counts(self.job.output, "images_per_class"),
            notes=finalized_counts(self.job.output, "notes"),
        )

    def _shards(self) -> list[int]:
        return [number for number, _ in self.snapshot.shards(self.options.shard_size)]

    def _n_first_shards(self) -> int:
        """Shards of the first attempt; those of retries have higher numbers."""
        return -(-self.snapshot.images // self.options.shard_size)

    def _is_committed(self, shard: int) -> bool:
        return shard in self.journal and shard not in self._altered

    def _pending(self) -> Iterator[Shard]:
        for number in self._shards():
            if self.stop:
                return
            if not self._is_committed(number):
                yield self.snapshot.shard(number, self.options.shard_size)

    def _committed(self) -> tuple[list[int], list[int]]:
        """Numbers of the committed shards: those of the first attempt, those of retries."""
        first = self._n_first_shards()
        numbers = [number for number in self._shards() if number in self.journal]
        return [n for n in numbers if n < first], [n for n in numbers if n >= first]

    def _pending_retries(self) -> set[int]:
        """Indices of the images of retries that are not committed."""
        return {
            sample.index
            for number in self._shards()
            if number >= self._n_first_shards() and not self._is_committed(number)
            for sample in self.snapshot.shard(number, self.options.shard_size).samples
        }

    def _add_retries(self) -> None:
        pending = self._pending_retries()
        failed = [i for i in failed_indices(self.job.output, *self._committed()) if i not in pending]
        changed = ""
        if not self.options.skip_source_check:
            with self.job.open_source(self.classes) as source:
                changed = self.snapshot.accept_changes(source.listing, failed)
        if changed:
            raise UsageError(
                f"{without_secrets(self.job.source)}: has changed since the run began, and not only the failed images: "
                f"{changed}: restore the others, or use the original list of images (--skip-source-check)"
            )
        log.info(f"retrying {pluralize(len(failed), 'failed image')}")
        self.snapshot.add_retries(failed, self.options.shard_size)
        reopen(self.job.output)

    def _count_failed(self) -> int:
        """Images that have failed so far, without those that are about to be tried again."""
        kept = [[n for n in numbers if n not in self._altered] for numbers in self._committed()]
        return len(set(failed_indices(self.job.output, *kept)) - self._pending_retries())

    def _find_altered(self) -> None:
        output = self.job.output
        committed = {number for numbers in self._committed() for number in numbers}
        # Of a shard that was processed twice, the last line counts.
        digests = {number: digest for number, digest in self.journal.digests() if number in committed}
        self._altered = {number for number, digest in digests.items() if not is_intact(output, number, digest)}
        if self._altered:
            log.info(f"altered or missing files: {pluralize(len(self._altered), 'shard')} to redo")
        reopen(output)  # files that cover the whole run are cheap to write again

    def _raise_if_stopped(self) -> None:
        committed, retries = self._committed()
        done = len(committed) + len(retries)
        shards = len(self._shards())
        if done == shards:  # stopped too late to matter
            return
        progress = f"{done} of {pluralize(shards, 'shard')} are done"
        if self.stop.signal is not None:
            message = f"interrupted: {progress}, run the same command again to resume"
            raise Interrupted(message, signal=self.stop.signal)
        if self.stop.too_many_failures and self.options.max_failures is not None:
            log.info(f"stopped: {progress}")
            write_failures(self.job.output, committed, retries)
            self._check_failures(self._failed_before + self.monitor.failed)
        # Never return as if all shards were done.
        raise MultisaError(f"the run ended early: {progress}, run the same command again to resume")

    def _check_failures(self, failed: int) -> None:
        check_failures(failed, self.snapshot.images, self.options.max_failures, self.job.output)


def run(
    job: Job,
    options: RunOptions,
    make_executor: ExecutorFactory,
    *,
    labels: Path | LabelMapping | None = None,
    telemetry: Telemetry | None = None,
) -> RunSummary:
    """Run a job, or resume it.

    labels: image-level labels, as a file or a mapping. telemetry: opened and closed by the run.

    Raises UsageError for input that cannot be used or does not match the run in OUT, Interrupted after a
    signal, TooManyFailures as soon as more images fail than the options allow, and MultisaError if OUT cannot
    be written. Call it again to resume after any of them.
    """
    with ExitStack() as stack:
        monitor = stack.enter_context(RunMonitor(job.command, telemetry))
        bundle = load_bundle(job.bundle)
        classes = bundle.manifest.foreground
        rows = None if labels is None else read_image_labels(labels, classes)
        check_output(job.source, job.output, map(writer_folder, job.writers))
        executor_stack = stack.enter_context(ExitStack())
        executor = executor_stack.enter_context(make_executor(job, monitor))
        fingerprint = run_fingerprint(
            job,
            executor.fingerprint(),
            bundle_sha256=sha256_of_file(bundle.path / MANIFEST_NAME),
            labels_sha256=rows.sha256 if rows else None,
            shard_size=options.shard_size,
        )
        stack.enter_context(output_errors(job.output))
        stack.enter_context(run_lock(job.output))
        stop = stack.enter_context(stop_on_signals())
        if options.overwrite:
            remove_report(job.output)
        prepare_output(job, options, fingerprint, rows, classes)
        snapshot = stack.enter_context(Snapshot(job.output / SNAPSHOT))
        journal = stack.enter_context(Journal(job.output / JOURNAL))
        # Close the executor first, whatever happens: without journal and lock nothing may be written.
        stack.enter_context(executor_stack.pop_all())
        session = RunSession(job, options, snapshot, journal, stop, monitor, classes)
        session.run(executor)
        has_new_files = session.finalize(job.open_writers(bundle))
        summary = session.summary(executor)
        record = {} if has_new_files else read_json_object(job.output / RUN)
        if not record:
            record = run_record(job, bundle, summary, snapshot, executor, session.started)
            write_record(job, record)
            session.record_finalized()
        if options.report_images and not is_report_written(job.output, options.report_images):
            write_run_report(job, bundle.manifest, snapshot, options.shard_size, record, options.report_images)
            record_finalized(job.output, report_images=options.report_images)
        return summary
