"""What a run is, in plain values: the same on every machine that does shards of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from multisa.runtime.bulk.method import Method
from multisa.runtime.bulk.options import RunOptions
from multisa.runtime.bulk.stages import Sizes
from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.choice import EngineRequest
from multisa.runtime.files import sha256_of_file
from multisa.runtime.label import open_labelling
from multisa.runtime.manifest import MANIFEST_NAME
from multisa.runtime.segment import open_segmenting
from multisa.runtime.sinks.choice import open_sinks
from multisa.runtime.sinks.contract import Sink, SinkContext
from multisa.runtime.sources.choice import open_source
from multisa.runtime.sources.contract import Source

_LISTS = (".txt", ".csv", ".jsonl", ".parquet")
_LOOKED_AT = 1 << 16  # bytes of a list
METHODS = {"label": open_labelling, "segment": open_segmenting}


@dataclass(frozen=True)
class Job:
    """Everything a worker needs beside the images of a shard."""

    command: str  # a key of METHODS
    source: str  # as `open_source` takes it
    out: Path
    bundle: Path
    request: EngineRequest
    sinks: tuple[str, ...]
    max_pixels: int
    sizes: Sizes
    storage_options: str | None = None  # JSON, for sources behind a URL
    image_prefix: str = ""  # where Label Studio finds the images

    def open_source(self, classes: Sequence[str] = ()) -> Source:
        """Open the source; `classes` are needed for its listing alone, to read labels in it."""
        return open_source(self.source, classes=classes, storage_options=self.storage_options)

    def open_sinks(self, bundle: Bundle) -> Sequence[Sink]:
        """Make the sinks, which write below `out`."""
        digest = sha256_of_file(bundle.path / MANIFEST_NAME)
        context = SinkContext(self.out, self.command, bundle.manifest, digest)
        return open_sinks(self.sinks, context, image_prefix=self.image_prefix)

    @contextmanager
    def open_method(self, bundle: Bundle) -> Iterator[Method]:
        """Open the engines, and close them at the end."""
        soft = any(sink.needs_soft_maps for sink in self.open_sinks(bundle))
        with METHODS[self.command](bundle, self.request, soft=soft) as method:
            yield method


def make_job(
    command: str,
    source: str,
    out: Path,
    bundle: Path,
    engine: EngineRequest,
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
        request=engine,
        sinks=options.sinks,
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
