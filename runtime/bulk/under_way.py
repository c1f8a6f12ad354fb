"""Shards and images on their way through the pipeline."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from multisa.runtime.bulk.decode import WorkingImage
from multisa.runtime.bulk.encode import EncodedImage
from multisa.runtime.bulk.inventory import Shard, Work
from multisa.runtime.bulk.stages import Failure
from multisa.runtime.errors import MultisaError


@dataclass(frozen=True, eq=False)
class DoneShard:
    """A shard whose images are all encoded, or failed, in their order."""

    shard: Shard
    images: Sequence[EncodedImage]
    failures: Sequence[Failure]


@dataclass(eq=False)
class OpenShard:
    """A shard under way; its lists have a place for each image."""

    shard: Shard
    commit: Callable[[DoneShard], None]
    left: int
    images: list[EncodedImage | None]
    failures: list[Failure | None]
    finished: Future[None] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class Fed:
    """An image under way."""

    open: OpenShard
    position: int
    work: Work
    decoded: "Future[WorkingImage | StageFailed]" = field(default_factory=Future)  # where it is waited for


@dataclass(frozen=True, eq=False)
class Decoded:
    fed: Fed
    image: WorkingImage


@dataclass(frozen=True, eq=False)
class StageFailed:
    """An image's error on its way from a stage to the one that counts."""

    kind: str
    error: MultisaError | MemoryError
