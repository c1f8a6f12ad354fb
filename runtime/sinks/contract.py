"""What every format of results keeps: each image encoded by itself, each shard written as a whole.

    payload = sink.encode(image)               # in a worker's thread, for one image
    sink.write_shard(files, shard, payloads)   # in one thread, in the order of the images
    sink.finish(folder, shards)   # once, at the end: files for the whole run

All bytes that a sink writes are determined by its images: no times, no random names, no order of a dictionary
that depends on threads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from multisa.runtime.manifest import Manifest

UInt8 = npt.NDArray[np.uint8]
Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class SoftMaps:
    """Class probabilities before the argmax, at the size the networks saw."""

    class_ids: tuple[int, ...]  # 0 is the background
    probabilities: Float16  # [len(class_ids), h, w], 0..1


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One finished image, as sinks get it."""

    index: int  # position in the run, from 0; the same in every run over the same source
    id: str  # of the source's item
    name: str  # path of its results without extension, unique in the run; "a/b" from the id "a/b.jpg"
    mask: UInt8  # [H, W] class ids, of the image's own size (upright)
    png: bytes  # the mask as a palette PNG
    confidence: UInt8  # [h, w] of the chosen class, 0..255 for 0..1, at the size the networks saw
    record: Mapping[str, Any]  # its line of labels.jsonl
    soft: SoftMaps | None = None  # only where a sink asks for them


class ShardFiles(Protocol):
    """Takes the files of one shard; they appear at their paths together, when the shard is committed."""

    def write(self, relative: str, data: bytes) -> None:
        """Keep a file for the posix path `relative` below OUT."""

    def write_part(self, sink: str, data: bytes) -> None:
        """Keep what `Sink.finish` needs of this shard; it is not one of the results."""


class RunFolder(Protocol):
    """The folder of a run that is complete, as `Sink.finish` sees it."""

    def parts(self, sink: str) -> Iterator[bytes]:
        """What `write_part` was given, in the order of the shards; one at a time."""

    def write(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file below OUT piece by piece, flushed and renamed into place at the end."""


@dataclass(frozen=True)
class SinkContext:
    """What a sink may know about the run."""

    out: Path
    command: str  # "label" or "segment"
    manifest: Manifest  # classes, palette, the bundle's name
    bundle_sha256: str


class Sink(Protocol):
    """One format. `encode` may be called from several threads at once."""

    @property
    def needs_soft_maps(self) -> bool:
        """Whether `LabelledImage.soft` must be there."""

    def encode(self, image: LabelledImage) -> Any:
        """Everything the shard needs of one image, small: masks as PNG or runs, not as arrays.

        Raises ImageError when the format cannot hold the image.
        """

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[Any]) -> None:
        """Write the files of shard `shard`; payloads in the order of the images, none of failed ones."""

    def finish(self, folder: RunFolder, shards: int) -> None:
        """Write what is one file for the whole run; called again after a retry, then from all parts anew.

        Shards of a retry come after the others, so parts are sorted by the index of the image where order
        matters.
        """

    def results(self, name: str) -> Sequence[str]:
        """Paths below OUT that are named after the image `name`; empty where files are named after shards."""
