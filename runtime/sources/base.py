"""The protocol of every source of images: a listing in a fixed order, and the bytes of one image."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True)
class SourceItem:
    """One image of a source, without its bytes."""

    id: str  # posix path, unique in the source and safe below the output folder: results are named after it
    uri: str  # where `Source.read` finds it, in a form of the source's own
    size: int  # bytes; -1 if unknown
    version: str = ""  # changes with the bytes (modification time, ETag, CRC); "" if unknown
    labels: tuple[str, ...] | None = None  # classes that the source names, unchecked


@dataclass(frozen=True)
class Skipped:
    """An entry of a source that is not read, and the reason. No entry is skipped silently."""

    id: str  # printable
    reason: str


@dataclass(frozen=True)
class OtherFiles:
    """How many entries are not images by their extension."""

    count: int


Listed = SourceItem | Skipped | OtherFiles


class Source(Protocol):
    """A collection of images; a context manager. Several threads may call `read` at once."""

    @property
    def description(self) -> str:
        """What it is and where, for people: "folder photos", "tar files s3://bucket/shards/*.tar"."""

    def listing(self) -> Iterator[Listed]:
        """Every entry, in an order that depends on the content alone, without holding all in memory.

        Raises UsageError when the source does not exist or cannot be listed.
        """

    def read(self, item: SourceItem) -> bytes:
        """The bytes of one image. Raises ImageError (the reason, without the id) when they cannot be read.

        Refuses an image of another size than `item.size` (unless that is -1), of another version if the
        store returns it with the bytes, or of more than MAX_FILE_BYTES.
        """

    def exists(self, item: SourceItem) -> bool:
        """Whether the disk, server or archive of `item` can be reached; called after `read` has failed.

        False also for credentials that have expired: then no other item of it can be read either.
        """

    def close(self) -> None:
        """Release handles and connections."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
