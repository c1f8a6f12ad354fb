"""The images that a list or a manifest names, in its order: beside it, elsewhere, or behind URLs."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.contract import Listed, SourceItem
from multisa.runtime.sources.folders import SourceBase
from multisa.runtime.sources.names import Seen, printable, safe_id, unique_id
from multisa.runtime.sources.remote import protocol_of
from multisa.runtime.sources.storage import Store, join, why
from multisa.runtime.sources.tables import Columns, rows_of


class _Found(NamedTuple):
    place: str  # as SourceItem: below the list's folder where it can be said so
    id: str
    identity: str  # the same for two ways to write one place


class ListSource(SourceBase):
    """Images by name; `store_of` gives the store of a protocol ("" is this machine).

    Ids are the paths below the list's folder. What lies elsewhere has the path that is written, without what
    leads upwards; where another image has that id already, a digest of the place is put to it.
    """

    def __init__(self, path: str, store_of: Callable[[str], Store], columns: Columns) -> None:
        self._path = path
        self._store_of = store_of
        self._columns = columns
        self._protocol = protocol_of(path)
        whole = path if self._protocol else os.path.abspath(path)  # noqa: PTH100 (text, as all paths here)
        self._home = whole.partition("?")[0].rpartition("/")[0]

    @property
    def description(self) -> str:
        """See Source."""
        return f"list {printable(self._path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        identities, ids = Seen(), Seen()
        for row in rows_of(self._store_of(self._protocol), self._path, self._columns):
            where = f"{self.description}, {row.place}"
            found = self._find(row.image, where)
            if not identities.add(found.identity):
                raise UsageError(f"{where}: {printable(row.image)} came before, expected each image once")
            name, attempts = found.id, itertools.count()
            while not ids.add(name):
                name = unique_id(found.id, found.place, next(attempts))
            size, version = self._status(found.place)
            yield SourceItem(name, found.place, size, version, row.labels)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        protocol = protocol_of(item.place)
        try:
            if protocol:
                return self._store_of(protocol).read(item.place, item.size, item.version)
            return self._store_of(self._protocol).read(self._absolute(item.place), item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error

    def is_there(self, item: SourceItem) -> bool:
        """See Source; it is about the disk or the server of the item, of which a list may name many."""
        protocol = protocol_of(item.place)
        if protocol:
            return self._store_of(protocol).reaches(item.place)
        store = self._store_of(self._protocol)
        if not self._protocol:
            if item.size < 0:
                return True  # it was not there when it was listed: of its disk nothing is known
            if not item.place.startswith("/") and not store.is_there(self._home):
                return False
        return store.reaches(self._absolute(item.place))

    def _find(self, image: str, where: str) -> _Found:
        if "\0" in image or printable(image) != image:
            raise UsageError(f"{where}: {printable(image)!r} is no path, expected UTF-8 without NUL")
        if "://" in image:
            if protocol_of(image) in ("", "file", "local") or "::" in image:
                raise UsageError(
                    f"{where}: {image}: expected a path or the URL of one file (s3://, https://)"
                )
            rest = image.partition("://")[2]
            return _Found(image, safe_id(rest.partition("?")[0]), image)
        if self._protocol:
            if image.startswith("/") or ".." in image.split("/"):
                raise UsageError(
                    f"{where}: {image} leaves the list's folder, expected a path below it, or a URL"
                )
            place = os.path.normpath(image)
            return _Found(place, safe_id(place), join(self._home, place))
        whole = os.path.normpath(os.path.join(self._home, image))  # noqa: PTH118 (a Path for each is slow)
        if whole.startswith(self._home + "/"):
            inside = whole[len(self._home) + 1 :]
            return _Found(inside, safe_id(inside), whole)
        place = os.path.normpath(image)
        return _Found(place, safe_id(place), whole)

    def _absolute(self, place: str) -> str:
        return place if place.startswith("/") else join(self._home, place)

    def _status(self, place: str) -> tuple[int, str]:
        """Size and version where they cost no request; a file that is not there is found out by `read`."""
        if self._protocol or protocol_of(place):
            return -1, ""
        try:
            status = os.stat(self._absolute(place))  # noqa: PTH116 (a Path for each is slow)
        except OSError:
            return -1, ""
        return status.st_size, str(status.st_mtime_ns)
