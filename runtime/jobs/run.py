"""One run: start or resume it, process the shards that are not committed, finalize it.

    OUT/masks/NAME.png ...        results, by writer      OUT/report.html       a page to look at
    OUT/labels.jsonl              one line per image      OUT/.multisa/         snapshot, journal, times
    OUT/failed.jsonl              images that failed

You can kill a run at any time. Run the same command again: it resumes with the shards that are not committed,
and every file outside OUT/.multisa and the report is byte-identical to that of an uninterrupted run, whatever
the number of workers, processes and resumed runs. Runs are tested on Linux.
"""

from contextlib import ExitStack
from pathlib import Path

from multisa.runtime.bundle import load_bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.files import read_json_object, sha256_of_file
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.jobs.executor import ExecutorFactory
from multisa.runtime.jobs.finalize import is_report_written, record_finalized, remove_report, write_run_report
from multisa.runtime.jobs.fingerprint import run_fingerprint
from multisa.runtime.jobs.journal import Journal
from multisa.runtime.jobs.monitor import RunMonitor, stop_on_signals
from multisa.runtime.jobs.output import JOURNAL, RUN, SNAPSHOT, check_output, output_errors, run_lock
from multisa.runtime.jobs.record import RunSummary, run_record, write_record
from multisa.runtime.jobs.session import RunSession, prepare_output
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job, RunOptions
from multisa.runtime.jobs.telemetry import Telemetry
from multisa.runtime.writers.registry import writer_folder


def run(
    job: Job,
    options: RunOptions,
    make_executor: ExecutorFactory,
    *,
    labels: Path | None = None,
    telemetry: Telemetry | None = None,
) -> RunSummary:
    """Do a job, or what is left of it.

    labels: a file of image-level labels. telemetry: opened and closed by the run.

    Raises UsageError for input that cannot be used or does not match the run in OUT, Interrupted after a
    signal, TooManyFailures as soon as more images fail than the options allow, and MultisaError if OUT cannot
    be written. Call it again to resume after any of them.
    """
    with ExitStack() as stack:
        monitor = stack.enter_context(RunMonitor(job.command, telemetry))
        bundle = load_bundle(job.bundle)
        classes = bundle.manifest.foreground
        rows = read_image_labels(labels, classes) if labels else None
        check_output(job.source, job.output, map(writer_folder, job.writers))
        executor_stack = stack.enter_context(ExitStack())
        executor = executor_stack.enter_context(make_executor(job, monitor))
        fingerprint = run_fingerprint(
            job,
            executor.fingerprint(),
            bundle_sha256=sha256_of_file(bundle.path / MANIFEST_NAME),
            labels_sha256=sha256_of_file(labels) if labels else None,
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
            write_run_report(
                job, bundle.manifest, snapshot, options.shard_size, record, options.report_images
            )
            record_finalized(job.output, report_images=options.report_images)
        return summary
