"""What a run did."""

from collections.abc import Mapping
from dataclasses import dataclass

from multisa.runtime.bulk.finish import FAILED_FILE, LABELS_FILE
from multisa.runtime.bulk.folder import REPORT_PAGE
from multisa.runtime.bulk.job import Job
from multisa.runtime.bulk.stages import Width
from multisa.runtime.report.summary import RunFigures, StageTime, describe_run
from multisa.runtime.sinks.choice import sink_folder


@dataclass(frozen=True)
class RunSummary:
    """Counts of all sittings; seconds of this one."""

    images: int  # in the inventory
    done: int  # with a mask
    failures: int  # tried, and not done
    done_now: int  # in this sitting
    seconds: float
    stage_seconds: Mapping[str, float]  # of this sitting, summed over the threads
    job: Job
    width: Width  # of all who did shards
    passed_over: int  # entries of the source that were passed over
    failure_kinds: Mapping[str, int]  # of this sitting
    reasons: Mapping[str, int]  # images by reason, of all that have failed

    @property
    def images_per_second(self) -> float:
        """How many images were done in a second of this sitting."""
        return self.done_now / self.seconds if self.seconds else 0.0


def describe_summary(summary: RunSummary, *, pictured: int) -> str:
    """The run in lines of text: what was done, which stage is the limit, what failed, where to look."""
    job, out = summary.job, summary.job.out
    looks = [f"{out / sink_folder(sink)}" for sink in job.sinks] + [str(out / LABELS_FILE)]
    if summary.failures:
        looks.append(f"{out / FAILED_FILE}: the failures (--retry-failed tries them again)")
    if pictured:
        looks.append(f"{out / REPORT_PAGE}: the most doubtful first")
    stages = summary.stage_seconds.items()
    return describe_run(
        RunFigures(
            command=job.command,
            done=summary.done_now,
            failed=summary.failures,
            seconds=summary.seconds,
            stages=tuple(StageTime(name, busy, summary.width.threads_of(name)) for name, busy in stages),
            kept=summary.done - summary.done_now,
            passed_over=summary.passed_over,
            cores=summary.width.cores,
            reasons=summary.reasons,
            look_at=tuple(looks),
        )
    )
