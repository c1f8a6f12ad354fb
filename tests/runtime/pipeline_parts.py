"""A source, a predictor and an observer for the tests of the pipeline, and the pipeline between them."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.imaging.decode import DecodedImage, load_image
from multisa.runtime.jobs.pipeline import CompletedShard, Encoder, Pipeline
from multisa.runtime.jobs.snapshot import Sample, Shard
from multisa.runtime.jobs.stages import Failure, PipelineConfig
from multisa.runtime.predict.prediction import ClassProbabilities, Labels, Prediction, StageTimer
from multisa.runtime.sources.base import SourceItem
from multisa.runtime.writers.base import WriterContext
from multisa.runtime.writers.registry import open_writers

SHAPES = ((80, 80), (64, 80), (80, 64), (80, 72))  # none of them is resized
LONG_SIDE = 80
SOON = 20.0  # seconds; what hangs would take for ever


@dataclass
class Images:
    """A source: image i is of shape i % 4 and grey i; some cannot be read, some decoded."""

    unreadable: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    error: Exception | None = None
    shapes: tuple[tuple[int, int], ...] = SHAPES
    description: str = "images of a test"
    read_now: Callable[[], None] = lambda: None

    def exists(self, item: SourceItem) -> bool:
        return True

    def read(self, item: SourceItem) -> bytes:
        index = int(item.uri)
        self.read_now()
        if index in self.unreadable:
            raise self.error or ImageError("not to be had")
        if index in self.broken:
            return b"no image"
        buffer = io.BytesIO()
        shape = self.shapes[index % len(self.shapes)]
        Image.fromarray(np.full((*shape, 3), index % 256, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass
class Predictor:
    """Labels 1 where grey is odd; remembers its batches; some images, or all with one, are refused."""

    refused: frozenset[int] = frozenset()
    predict_error: Exception | None = None
    postprocess_error: Exception | None = None
    command: str = "segment"
    backends: tuple[Any, ...] = ()
    batches: list[list[int]] = field(default_factory=list)
    manifest: Manifest | None = None  # set by `pipeline_of`

    def decode(self, data: bytes, *, max_pixels: int) -> DecodedImage:
        return load_image(data, max_pixels=max_pixels, long_side=LONG_SIDE)

    def predict_batch(self, images: np.ndarray, labels: Sequence[Labels | None], timer: StageTimer) -> Sequence[Any]:
        greys = images[:, 0, 0, 0].tolist()
        self.batches.append(greys)
        if self.refused.intersection(greys):
            raise self.predict_error or BackendError(f"cannot be run on {greys}")
        return greys

    def postprocess(self, raw: int, image: DecodedImage, timer: StageTimer) -> Prediction:
        if self.postprocess_error:
            raise self.postprocess_error
        assert self.manifest is not None
        odd = np.float32(raw % 2)
        maps = np.stack([np.full((2, 2), p, np.float32) for p in (0.8 - 0.6 * odd, 0.2 + 0.6 * odd)])
        return Prediction(
            probabilities=ClassProbabilities((0, 1), maps),
            working_size=image.rgb.shape[:2],
            size=image.size,
            manifest=self.manifest,
        )


class RunObserver:
    """Counts."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failed: list[Failure] = []
        self.most = 0  # images in flight at once

    def image_done(self, sample: Sample) -> None:
        self.done.append(sample.index)

    def image_failed(self, failure: Failure) -> None:
        self.failed.append(failure)

    def queue_depth(self, stage: str, images: int) -> None:
        assert images >= 0

    def in_flight(self, images: int) -> None:
        self.most = max(self.most, images)

    def stage_busy(self, stage: str, seconds: float) -> None:
        assert seconds >= 0


def shard_of(number: int, indices: Sequence[int]) -> Shard:
    items = ((i, SourceItem(f"{i:05d}.png", str(i), -1)) for i in indices)
    return Shard(number, tuple(Sample(i, item, f"{i:05d}", None) for i, item in items))


@contextmanager
def pipeline_of(
    output: Path,
    manifest: Manifest,
    source: Any,
    predictor: Any,
    observer: Any = None,
    config: PipelineConfig | None = None,
) -> Iterator[Pipeline]:
    predictor.manifest = manifest
    writers = open_writers(("masks",), WriterContext(output, "segment", manifest, "0" * 64))
    with Pipeline(
        predictor,
        source,
        Encoder(output, writers),
        config=config or PipelineConfig(readers=2, workers=2),
        timer=StageTimer(),
        observer=observer or RunObserver(),
        max_pixels=10**6,
    ) as pipeline:
        yield pipeline


def run_shards(pipeline: Pipeline, shards: Sequence[Shard]) -> list[CompletedShard]:
    """All of them; raises where they are not done soon."""
    done: list[CompletedShard] = []
    futures = [pipeline.submit(shard, done.append) for shard in shards]
    for future in futures:
        future.result(timeout=SOON)
    return done


def by_number(done: CompletedShard) -> int:
    return done.shard.number


def contents(done: Sequence[CompletedShard]) -> list[tuple[int, list[Any], list[Failure]]]:
    of_shards = sorted(done, key=by_number)
    return [
        (one.shard.number, [(i.index, i.record, i.payloads) for i in one.images], list(one.failures))
        for one in of_shards
    ]
