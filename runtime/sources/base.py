"""What every source of images keeps: a listing in a fixed order, and the bytes of one image."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True)
class SourceItem:
    """One image of a source; everything but its bytes."""

    id: str  # posix path, unique in the source and safe as a path below OUT: results are named after it
    place: str  # where `Source.read` finds it, in the source's own words
    size: int  # bytes; -1 where the source does not know
    version: str = ""  # other bytes, another version (modification time, ETag, CRC); "" where unknown
    labels: tuple[str, ...] | None = None  # classes that the source itself names, unchecked


@dataclass(frozen=True)
class Skipped:
    """An entry of a source that is not taken, and why; nothing is passed over without being named."""

    id: str  # printable
    reason: str


@dataclass(frozen=True)
class OtherFiles:
    """How many entries are no images by their extension."""

    count: int


Listed = SourceItem | Skipped | OtherFiles


class Source(Protocol):
    """Images somewhere; a context manager. `read` may be called from several threads at once."""

    @property
    def description(self) -> str:
        """What it is and where, for people: "folder photos", "2 tar files of s3://bucket/shards"."""

    def listing(self) -> Iterator[Listed]:
        """Every entry, in an order that depends on the content alone; nothing is held in memory for long.

        Raises UsageError when the source does not exist or cannot be listed.
        """

    def read(self, item: SourceItem) -> bytes:
        """The bytes of one image. Raises ImageError (the reason, without the id) when it cannot be had.

        What has another size than `item.size` (unless that is -1), another version where the store tells it
        with the bytes, or more than MAX_FILE_BYTES, is refused.
        """

    def exists(self, item: SourceItem) -> bool:
        """Whether what `item` is in can still be reached: asked when the item itself could not be read.

        False for a disk, a server or an archive that is gone, or keys that are valid no more; then no other
        item of it can be read either.
        """

    def close(self) -> None:
        """Give handles and connections back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
