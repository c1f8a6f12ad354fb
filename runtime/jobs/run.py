"""One run: begin or go on, do the shards that are not committed, finish.

    OUT/masks/NAME.png ...        results, by sink        OUT/report.html       a page to look at
    OUT/labels.jsonl              a line an image         OUT/.multisa/         inventory, journal, times
    OUT/failed.jsonl              what could not be done

Every byte outside OUT/.multisa and the page is decided by the images, the bundle and the options, whatever
number of workers, kills and sittings it took.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from multisa.runtime.bundle import load_bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.files import sha256_of_file
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.jobs.begin import begin
from multisa.runtime.jobs.executor import Executor
from multisa.runtime.jobs.finalize import is_report_written, record_report, remove_page, write_page
from multisa.runtime.jobs.fingerprint import run_config
from multisa.runtime.jobs.journal import Journal
from multisa.runtime.jobs.monitor import RunMonitor, stop_on_signals
from multisa.runtime.jobs.output import JOURNAL, SNAPSHOT, check_places, output_errors, run_lock
from multisa.runtime.jobs.record import RunSummary, read_record, run_record, write_record
from multisa.runtime.jobs.session import RunSession
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job, RunOptions
from multisa.runtime.jobs.telemetry import Telemetry
from multisa.runtime.writers.registry import writer_folder

ExecutorFactory = Callable[[Job, RunMonitor], Executor]


def run(
    job: Job,
    options: RunOptions,
    make_executor: ExecutorFactory,
    *,
    labels: Path | None = None,
    telemetry: Telemetry | None = None,
) -> RunSummary:
    """Do a job, or what is left of it, and return what was done.

    labels: a file of image-level labels. telemetry: is told what happens, and closed. Raises UsageError for
    what cannot be used or does not fit the run in OUT, Interrupted after a signal, TooManyFailures as soon as
    more images fail than the options allow, MultisaError where OUT cannot be written; the same command goes
    on after each of them.
    """
    bundle = load_bundle(job.bundle)
    rows = read_image_labels(labels, bundle.manifest.foreground) if labels else None
    check_places(job.source, job.out, map(writer_folder, job.writers))
    with ExitStack() as stack:
        watch = stack.enter_context(RunMonitor(job.command, telemetry))
        opened = stack.enter_context(ExitStack())
        executor = opened.enter_context(make_executor(job, watch))
        bundle_sha256 = sha256_of_file(bundle.path / MANIFEST_NAME)
        config = run_config(
            job,
            executor.identity(),
            bundle_sha256=bundle_sha256,
            labels_sha256=sha256_of_file(labels) if labels else None,
            shard_size=options.shard_size,
        )
        stack.enter_context(output_errors(job.out))
        stack.enter_context(run_lock(job.out))
        stop = stack.enter_context(stop_on_signals())
        if options.overwrite:
            remove_page(job.out)
        begin(job, options, config, rows, bundle.manifest.foreground)
        snapshot = stack.enter_context(Snapshot(job.out / SNAPSHOT))
        journal = stack.enter_context(Journal(job.out / JOURNAL))
        # The first to be closed, whatever happens: who lets go of the journal and the lock writes no more.
        stack.enter_context(opened.pop_all())
        classes = bundle.manifest.foreground
        sitting = RunSession(job, options, snapshot, journal, stop, watch, classes)
        sitting.do(executor)
        news = sitting.finalize(job.open_writers(bundle))
        summary = sitting.summary(executor)
        record = {} if news else read_record(job)
        if not record:
            record = run_record(job, bundle, summary, snapshot, executor, sitting.started)
            write_record(job, record)
            sitting.record_finalized()
        if options.report_images and not is_report_written(job.out, options.report_images):
            write_page(job, bundle.manifest, snapshot, options.shard_size, record, options.report_images)
            record_report(job.out, options.report_images)
        return summary
