"""What a run is, in plain values: the same on every machine that does shards of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
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
    writers: tuple[str, ...] = ("masks",)
    max_failures: str | None = None  # "3" or "2%"; None: none, judged at the end
    retry_failed: bool = False
    overwrite: bool = False  # remove the results of the run that is there
    skip_source_check: bool = False  # resume without listing the source again
    verify: bool = False  # read every committed file again, and do again what was altered
    report_images: int = REPORT_IMAGES
    tell_other_files: bool = True  # say how many files of the source are no images

    def __post_init__(self) -> None:
        """Raise UsageError for a number that cannot be used."""
        for name in ("workers", "readers", "batch", "shard_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, expected at least 1")
        if self.shard_size > MOST_IN_A_SHARD:
            raise UsageError(f"shard_size: got {self.shard_size}, expected at most {MOST_IN_A_SHARD}")

    def sizes(self, *, remote: bool) -> PipelineConfig:
        """Threads of the stages."""
        readers = self.readers or (REMOTE_READERS if remote else self.workers)
        return PipelineConfig(readers=readers, workers=self.workers, batch=self.batch, decode_apart=remote)


_LISTS = (".txt", ".csv", ".jsonl", ".parquet")
_LOOKED_AT = 1 << 16  # bytes of a list
THREADS_PER_CALL = 1  # the workers run images side by side, which is faster than one image on all cores


@dataclass(frozen=True)
class Job:
    """Everything a worker needs beside the images of a shard."""

    command: str  # "label" or "segment"
    source: str  # as `open_source` takes it
    out: Path
    bundle: Path
    request: BackendRequest
    writers: tuple[str, ...]
    max_pixels: int
    sizes: PipelineConfig
    storage_options: str | None = None  # JSON, for sources behind a URL
    image_prefix: str = ""  # where Label Studio finds the images

    def open_source(self, classes: Sequence[str] = ()) -> Source:
        """Open the source; `classes` are needed for its listing alone, to read labels in it."""
        return open_source(self.source, classes=classes, storage_options=self.storage_options)

    def open_writers(self, bundle: Bundle) -> Sequence[Writer]:
        """Make the sinks, which write below `out`."""
        digest = sha256_of_file(bundle.path / MANIFEST_NAME)
        context = WriterContext(self.out, self.command, bundle.manifest, digest)
        return open_writers(self.writers, context, image_prefix=self.image_prefix)

    def open_predictor(self, bundle: Bundle) -> Predictor:
        """Open the predictor of `command`; a context manager.

        Raises UsageError where a writer needs class probabilities and the command has none.
        """
        probabilities = any(writer.needs_probabilities for writer in self.open_writers(bundle))
        backend, precision, cache = self.request.backend, self.request.precision, self.request.engine_cache
        if self.command == "label":
            return PseudoLabeler(
                bundle,
                backend=backend,
                precision=precision,
                threads=THREADS_PER_CALL,
                engine_cache=cache,
                probabilities=probabilities,
            )
        if probabilities:
            raise UsageError(
                "segment has no class probabilities, argmax and confidence are in its graph: leave out "
                "--writer probabilities"
            )
        return Segmenter(
            bundle, backend=backend, precision=precision, threads=THREADS_PER_CALL, engine_cache=cache
        )


def make_job(
    command: str,
    source: str,
    out: Path,
    bundle: Path,
    backend: BackendRequest,
    options: RunOptions,
    *,
    storage_options: str | None = None,
    image_prefix: str = "",
) -> Job:
    """A job of the options that decide what is written and how wide the stages are."""
    return Job(
        command=command,
        source=source,
        out=out,
        bundle=bundle,
        request=backend,
        writers=options.writers,
        max_pixels=options.max_pixels,
        sizes=options.sizes(remote=_names_urls(source)),
        storage_options=storage_options,
        image_prefix=image_prefix,
    )


def _names_urls(source: str) -> bool:
    """Whether images come over a network: a URL, or a list or manifest here that begins with some."""
    if "://" in source:
        return not source.startswith(("file://", "local://"))
    path = Path(source)
    if path.suffix.lower() not in _LISTS or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"://" in file.read(_LOOKED_AT)
