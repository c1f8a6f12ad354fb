"""The base class of every source of images: a listing in a fixed order, and the bytes of one image."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.progress import format_examples, pluralize
from multisa.runtime.sources.storage import extension, reason_of

_LONGEST_EXTENSION = 10
_MOST_KINDS = 50  # extensions that are counted one by one


@dataclass(frozen=True)
class SourceItem:
    """One image of a source, without its bytes."""

    id: str  # posix path, unique in the source and safe below the output folder: results are named after it
    uri: str  # where `Source.read` finds it; each kind of source has its own form
    size: int  # bytes; -1 if unknown
    version: str = ""  # changes with the bytes (modification time, ETag, CRC); "" if unknown
    labels: tuple[str, ...] | None = None  # classes that the source names, unchecked


@dataclass(frozen=True)
class Skipped:
    """An entry that the source does not read, and the reason. No entry is skipped silently."""

    id: str  # printable
    reason: str


@dataclass(frozen=True)
class OtherFiles:
    """The number of entries whose extension is not that of an image, in all and by extension."""

    count: int
    kinds: Mapping[str, tuple[int, str]] = field(default_factory=dict, compare=False)  # (number, first name)


class OtherFileCounter:
    """Counts the entries of a source that are not named like an image."""

    def __init__(self) -> None:
        self._count = 0
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, name: str) -> None:
        """Count one entry."""
        self._count += 1
        kind = extension(name)
        if len(kind) > _LONGEST_EXTENSION or (kind not in self._kinds and len(self._kinds) >= _MOST_KINDS):
            kind = ""
        count, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = (count + 1, first)

    def total(self) -> Iterator[OtherFiles]:
        """Yield what was counted, or nothing."""
        if self._count:
            yield OtherFiles(self._count, self._kinds)


def describe_other_files(others: OtherFiles) -> str:
    """Say in words what is not named like an image."""
    kinds = sorted(others.kinds.items(), key=lambda kind: (-kind[1][0], kind[0]))
    words = [f"{kind or 'no extension'}: {count} ({first})" for kind, (count, first) in kinds]
    examples = f": {format_examples(words)}" if words else ""
    return f"{pluralize(others.count, 'file')} not named like an image{examples}"


Listed = SourceItem | Skipped | OtherFiles


def no_image_error(description: str, skipped: Sequence[str], others: OtherFiles) -> UsageError:
    """The error for a source without an image; skipped: its entries that were skipped, by reason."""
    found = [*skipped, *([describe_other_files(others)] if others.count else [])]
    what = f"found only {format_examples(found)}" if found else "nothing is there"
    return UsageError(
        f"{description}: no image found ({what}), expected at least one: images are recognised by their "
        "extension (.jpg, .png, ...)"
    )


class Source(ABC):
    """A collection of images; a context manager. Several threads may call `read` at once."""

    description: str  # for messages: "folder photos", "tar files s3://bucket/shards/*.tar"
    folder_name: str = ""  # of the folder that ids are below; paths in label files may begin with it

    @abstractmethod
    def listing(self) -> Iterator[Listed]:
        """Yield every entry, in an order that depends only on the content, without holding all in memory.

        Raises UsageError when the source does not exist or cannot be listed.
        """

    def read(self, item: SourceItem) -> bytes:
        """Return the bytes of one image. Raises ImageError (the reason, without the id) on failure.

        Refuses an image whose size differs from `item.size` (unless that is -1), whose version differs (if
        the store returns it with the bytes), or that is larger than MAX_FILE_BYTES.
        """
        try:
            return self._read(item)
        except OSError as error:
            raise ImageError(reason_of(error)) from error

    @abstractmethod
    def _read(self, item: SourceItem) -> bytes:
        """Implement `read`; an OSError becomes an ImageError."""

    @abstractmethod
    def exists(self, item: SourceItem) -> bool:
        """Return whether the disk, server or archive of `item` can be reached. Called after `read` failed.

        Also False when credentials have expired: then no other item can be read either.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 (a default, not a forgotten override)
        """Release nothing: the sources here hold no handle between two calls."""
