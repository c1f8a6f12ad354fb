"""What a run did."""

from collections.abc import Mapping
from dataclasses import dataclass

from multisa.runtime.progress import counted


@dataclass(frozen=True)
class RunSummary:
    """Counts of all sittings; seconds of this one."""

    images: int  # in the inventory
    done: int  # with a mask
    failures: int  # tried, and not done
    done_now: int  # in this sitting
    seconds: float
    stage_seconds: Mapping[str, float]  # of this sitting, summed over the threads
    workers: int
    skipped: int  # entries of the source that were passed over
    failure_kinds: Mapping[str, int]

    @property
    def images_per_second(self) -> float:
        """How many images were done in a second of this sitting."""
        return self.done_now / self.seconds if self.seconds else 0.0


def describe_summary(summary: RunSummary) -> str:
    """The run in two lines: images, rate and the share of each stage, the slowest first."""
    total = sum(summary.stage_seconds.values()) or 1.0
    stages = sorted(summary.stage_seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages)
    return (
        f"{counted(summary.done, 'image')} done, {summary.failures} failed; {summary.done_now} in "
        f"{summary.seconds:.1f} s ({summary.images_per_second:.2f}/s)\ntime by stage: {shares}"
    )
