"""What a run does, in plain values that can be sent to any machine that processes shards of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle, LabelMethod
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.imaging.decode import MAX_PIXELS
from multisa.runtime.jobs.stages import PipelineConfig
from multisa.runtime.predict.prediction import Predictor
from multisa.runtime.predict.pseudo_labeler import PseudoLabeler
from multisa.runtime.predict.segmenter import Segmenter
from multisa.runtime.report.report import REPORT_IMAGES
from multisa.runtime.sources.base import Source
from multisa.runtime.sources.registry import open_source
from multisa.runtime.system import usable_cpus
from multisa.runtime.writers.base import Writer, WriterContext
from multisa.runtime.writers.registry import open_writers

SHARD_SIZE = 256  # images: seconds of work on a GPU, a minute or two on a laptop
MAX_SHARD_SIZE = 1_000_000
REMOTE_READERS = 16  # threads: a bucket answers slowly, but many requests at once
THREADS_PER_CALL = 1  # workers run images in parallel, which is faster than one image on all cores

_LIST_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
_LIST_HEAD_BYTES = 1 << 16  # read from a list to see whether it names URLs


@dataclass(frozen=True)
class RunOptions:
    """How a run is done. Only shard_size, batch, max_pixels and writers affect the bytes it writes."""

    workers: int = field(default_factory=usable_cpus)
    readers: int | None = None  # None: as many as workers, or REMOTE_READERS for remote sources
    batch: int = 1
    shard_size: int = SHARD_SIZE
    max_pixels: int = MAX_PIXELS
    writers: tuple[str, ...] = ("masks",)
    max_failures: str | None = None  # "3" or "2%"; None: no failure allowed, checked at the end
    retry_failed: bool = False
    overwrite: bool = False  # remove the results of an existing run and start over
    skip_source_check: bool = False  # resume without listing the source again
    verify: bool = False  # re-hash committed files and redo the shards that changed
    report_images: int = REPORT_IMAGES
    log_other_files: bool = True  # log how many files of the source are not images

    def __post_init__(self) -> None:
        """Raise UsageError for a number out of range."""
        for name in ("workers", "readers", "batch", "shard_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, expected at least 1")
        if self.report_images < 0:
            raise UsageError(f"report_images: got {self.report_images}, expected at least 0")
        if self.shard_size > MAX_SHARD_SIZE:
            raise UsageError(f"shard_size: got {self.shard_size}, expected at most {MAX_SHARD_SIZE}")

    def pipeline_config(self, *, remote: bool) -> PipelineConfig:
        """Number of threads of each stage; remote: whether images come over a network."""
        readers = self.readers or (REMOTE_READERS if remote else self.workers)
        return PipelineConfig(readers=readers, workers=self.workers, batch=self.batch, separate_decoders=remote)


@dataclass(frozen=True)
class Job:
    """Everything a worker needs besides the images of a shard."""

    command: str  # "label" or "segment"
    source: str  # as `open_source` takes it
    output: Path
    bundle: Path
    backend: BackendRequest
    writers: tuple[str, ...]
    max_pixels: int
    pipeline: PipelineConfig
    storage_options: str | None = None  # JSON, for sources behind a URL
    image_prefix: str = ""  # where Label Studio finds the images
    method: LabelMethod | None = None  # of `label`; None: the bundle's
    min_area: float | None = None  # None: the bundle's

    def open_source(self, classes: Sequence[str] = ()) -> Source:
        """Open the source. Only listing it needs `classes`, to check labels that the source contains."""
        ignore = self.command != "label"
        return open_source(self.source, classes=classes, ignore_labels=ignore, storage_options=self.storage_options)

    def open_writers(self, bundle: Bundle) -> Sequence[Writer]:
        """Create the writers, which write below `output`."""
        digest = sha256_of_file(bundle.path / MANIFEST_NAME)
        context = WriterContext(self.output, self.command, bundle.manifest, digest)
        return open_writers(self.writers, context, image_prefix=self.image_prefix)

    def open_predictor(self, bundle: Bundle) -> Predictor:
        """Open the predictor of `command`; a context manager."""
        options: dict[str, Any] = {
            "backend": self.backend.backend,
            "precision": self.backend.precision,
            "engine_cache": self.backend.engine_cache,
            "threads": THREADS_PER_CALL,
            "min_area": self.min_area,
        }
        if self.command == "label":
            return PseudoLabeler(bundle, method=self.method, **options)
        return Segmenter(bundle, **options)


# more than six parameters: the fields of Job
def make_job(
    command: str,
    source: str,
    output: Path,
    bundle: Path,
    backend: BackendRequest,
    options: RunOptions,
    *,
    storage_options: str | None = None,
    image_prefix: str = "",
    method: LabelMethod | None = None,
    min_area: float | None = None,
) -> Job:
    """Make a job from the options of a run."""
    return Job(
        command=command,
        source=source,
        output=output,
        bundle=bundle,
        backend=backend,
        writers=options.writers,
        max_pixels=options.max_pixels,
        pipeline=options.pipeline_config(remote=_is_remote(source)),
        storage_options=storage_options,
        image_prefix=image_prefix,
        method=method,
        min_area=min_area,
    )


def _is_remote(source: str) -> bool:
    """Whether images come over a network: from a URL, or from a local list that begins with URLs."""
    if "://" in source:
        return not source.startswith(("file://", "local://"))
    path = Path(source)
    if path.suffix.lower() not in _LIST_SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"://" in file.read(_LIST_HEAD_BYTES)
