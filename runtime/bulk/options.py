"""How a run is done."""

from dataclasses import dataclass, field

from multisa.runtime.bulk.stages import Sizes
from multisa.runtime.cpus import usable_cpus
from multisa.runtime.errors import UsageError
from multisa.runtime.images import MAX_PIXELS
from multisa.runtime.report.report import PICTURED

MOST_IN_A_SHARD = 1_000_000
SHARD_SIZE = 256  # images: seconds of work on a GPU, a minute or two on a laptop
REMOTE_READERS = 16  # threads: a disk answers at once, a bucket takes its time


@dataclass(frozen=True)
class RunOptions:
    """Only shard_size, batch, max_pixels and sinks decide what is written."""

    workers: int = field(default_factory=usable_cpus)
    readers: int | None = None  # None: by where the source is
    batch: int = 1
    shard_size: int = SHARD_SIZE
    max_pixels: int = MAX_PIXELS
    sinks: tuple[str, ...] = ("masks",)
    max_failures: str | None = None  # "3" or "2%"; None: none, judged at the end
    retry_failed: bool = False
    overwrite: bool = False  # remove the results of the run that is there
    frozen: bool = False  # go on without a look at the source's listing
    verify: bool = False  # read every committed file again, and do again what was altered
    pictured: int = PICTURED
    tell_other_files: bool = True  # say how many files of the source are no images

    def __post_init__(self) -> None:
        """Raise UsageError for a number that cannot be used."""
        for name in ("workers", "readers", "batch", "shard_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, expected at least 1")
        if self.shard_size > MOST_IN_A_SHARD:
            raise UsageError(f"shard_size: got {self.shard_size}, expected at most {MOST_IN_A_SHARD}")

    def sizes(self, *, remote: bool) -> Sizes:
        """Threads of the stages."""
        readers = self.readers or (REMOTE_READERS if remote else self.workers)
        return Sizes(readers=readers, workers=self.workers, batch=self.batch, decode_apart=remote)
