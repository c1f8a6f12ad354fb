"""What a run is, in plain values: the same on every machine that does shards of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from multisa.runtime.bulk.method import Method
from multisa.runtime.bulk.options import RunOptions
from multisa.runtime.bulk.pipeline import Sizes
from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.choice import EngineRequest
from multisa.runtime.label import open_labelling
from multisa.runtime.segment import open_segmenting

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

    @contextmanager
    def open_method(self, bundle: Bundle) -> Iterator[Method]:
        """Open the engines, and close them at the end."""
        soft = "soft" in self.sinks
        with METHODS[self.command](bundle, self.request, soft=soft) as method:
            yield method


def make_job(
    command: str, source: str, out: Path, bundle: Path, engine: EngineRequest, options: RunOptions
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
        sizes=options.sizes(remote="://" in source),
    )
