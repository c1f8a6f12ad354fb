"""The beginning of a run, or of a further sitting: OUT holds the frozen list of images of this very run."""

from collections.abc import Sequence

from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import ImageLabels, Labels
from multisa.runtime.jobs.finalize import finished_files
from multisa.runtime.jobs.fingerprint import Config, differences, read_config, write_config
from multisa.runtime.jobs.output import SNAPSHOT, check_empty, place_check, remove_results
from multisa.runtime.jobs.shards import clear_temporary
from multisa.runtime.jobs.snapshot import Snapshot, take_snapshot
from multisa.runtime.jobs.spec import Job, RunOptions
from multisa.runtime.progress import EXAMPLES_SHOWN, format_examples, log, pluralize
from multisa.runtime.sources.base import SourceItem
from multisa.runtime.sources.lists import ListSource
from multisa.runtime.writers.registry import writer_folder

_ALTERNATIVES = "begin anew (--overwrite), or choose another folder"


def begin(
    job: Job, options: RunOptions, config: Config, labels: ImageLabels | None, foreground: Sequence[str]
) -> bool:
    """See to it that OUT holds the inventory of this run; returns whether the run was there before.

    Raises UsageError where OUT holds a run of other settings or other images, or results of no known run.
    """
    there = read_config(job.out)
    if options.overwrite:
        remove_results(job.out, finished_files(job.out))
        there = None
    if there is None and options.retry_failed:
        raise UsageError(f"{job.out}: holds no run, expected one with failed images to be tried again")
    if there is None:
        if not options.overwrite:
            check_empty(job.out, map(writer_folder, job.writers), finished_files(job.out))
            remove_results(job.out, ())  # of a run whose beginning, or whose removal, was cut
        _take_snapshot(job, options, labels, foreground)
        write_config(job.out, config)
    else:
        if different := differences(config, there):
            raise UsageError(
                f"{job.out}: holds a run of other settings ({'; '.join(different)}): use those, "
                f"{_ALTERNATIVES}"
            )
        if not options.skip_source_check and not options.retry_failed:
            _compare(job, foreground)
    clear_temporary(job.out)
    return there is not None


def _take_snapshot(
    job: Job, options: RunOptions, labels: ImageLabels | None, foreground: Sequence[str]
) -> None:
    matcher = None
    if labels:
        with job.open_source(foreground) as source:
            images = (entry for entry in source.listing() if isinstance(entry, SourceItem))
            matcher = labels.matcher(item.id for item in images)
    without: list[str] = []  # the first of them
    n_without = 0
    check_place = place_check(job.source, job.out, map(writer_folder, job.writers))

    def labels_of(item: SourceItem) -> Labels | None:
        nonlocal n_without
        if is_list:
            check_place(item.uri)
        found = matcher.find(item.id) if matcher else None
        if found is None and item.labels is not None:
            found = _checked(item, item.labels, foreground)
        if matcher and found is None:
            n_without += 1
            if len(without) < EXAMPLES_SHOWN:
                without.append(item.id)
        return found

    with job.open_source(foreground) as source:
        is_list = isinstance(source, ListSource)
        take_snapshot(job.out / SNAPSHOT, source.listing(), labels_of, source.description)
    with Snapshot(job.out / SNAPSHOT) as snapshot:
        if snapshot.skipped:
            some = [f"{entry.id}: {entry.reason}" for entry in snapshot.skipped_entries(EXAMPLES_SHOWN)]
            log.info(f"passed over {snapshot.skipped}: {format_examples(some, snapshot.skipped)}")
        if snapshot.other_files and options.tell_other_files:
            log.info(f"left out, no image by extension: {pluralize(snapshot.other_files, 'file')}")
        if labels and n_without == snapshot.images:
            raise UsageError(
                f"{labels.path}: has no row about any of {pluralize(snapshot.images, 'image')}, expected "
                f"paths below {job.source}, or file names, such as {format_examples(without, n_without)}; without "
                "--labels they are labelled from scores"
            )
        if labels and without:
            log.info(
                f"without a row in {labels.path} and labelled from scores: {n_without} of "
                f"{pluralize(snapshot.images, 'image')}: {format_examples(without, n_without)}"
            )
    if labels and matcher and (unused := matcher.unused()):
        rows = pluralize(len(unused), "row")
        log.info(f"about none of the images: {rows} of {labels.path}: {format_examples(unused)}")


def _checked(item: SourceItem, labels: Sequence[str], foreground: Sequence[str]) -> Labels:
    unknown = [name for name in labels if name not in foreground]
    if unknown:
        raise UsageError(f"{item.id}: unknown class {unknown[0]!r}, expected {', '.join(foreground)}")
    return tuple(name for name in foreground if name in labels)


def _compare(job: Job, foreground: Sequence[str]) -> None:
    with job.open_source(foreground) as source, Snapshot(job.out / SNAPSHOT) as snapshot:
        changed = snapshot.difference(source.listing)
    if changed:
        raise UsageError(
            f"{job.source}: has changed since the run in {job.out} began: {changed}: go on with the images "
            "of then (--skip-source-check), try failed images that were repaired again (--retry-failed), "
            f"{_ALTERNATIVES}"
        )
