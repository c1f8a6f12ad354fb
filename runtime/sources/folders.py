"""A folder with all that is below it, or what a pattern takes of it; one image alone.

FolderSource("photos", LocalStore("photos"), Pattern("**/*.jpg"))
"""

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.names import LONGEST_PATH, is_image, printable
from multisa.runtime.sources.storage import Entry, Store, Wanted, join, why


class Pattern:
    """A glob pattern on paths below a folder: `*`, `?`, `[a-z]` within a name, `**` for any folders."""

    def __init__(self, text: str) -> None:
        self.text = text
        parts = text.split("/")
        self._parts = [re.compile(_part_regex(part)) for part in parts[:-1]]
        self._deep = parts.index("**") if "**" in parts else len(parts) - 1
        self._any_depth = "**" in parts
        whole = "".join(
            (r"(?:[^/]+/)*" if i < len(parts) - 1 else r"(?:[^/]+/)*[^/]+")
            if part == "**"
            else _part_regex(part) + ("/" if i < len(parts) - 1 else "")
            for i, part in enumerate(parts)
        )
        self._whole = re.compile(whole)

    def takes(self, path: str) -> bool:
        """Whether the file `path` is meant."""
        return bool(self._whole.fullmatch(path))

    def may_hold(self, folder: str) -> bool:
        """Whether a file below `folder` can be meant."""
        names = folder.split("/")
        if not self._any_depth and len(names) > self._deep:
            return False
        return all(part.fullmatch(name) for part, name in zip(self._parts[: self._deep], names, strict=False))


def walk(store: Store, root: str, wanted: Wanted, pattern: Pattern | None) -> Iterator[Entry | OtherFiles]:
    """Everything below `root`, depth first, the names of each folder by code point; `name` is the path.

    What is not taken has a `problem`; files that are not `wanted` are counted at the end. One folder's names
    are held at a time, and those of the folders it is in. Raises OSError when `root` cannot be read.
    """
    others = 0
    stack = [("", store.folder(root, wanted))]
    while stack:
        prefix, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        if entry.is_folder:
            if pattern and not pattern.may_hold(path):
                continue
            problem = entry.problem or ("its name is too long" if len(path) > LONGEST_PATH else "")
            if not problem:
                try:
                    stack.append((path + "/", store.folder(join(root, path), wanted)))
                except OSError as error:
                    problem = why(error)
            if problem:
                yield entry._replace(name=path, problem=problem)
        elif pattern and not pattern.takes(path):
            continue
        elif wanted(entry.name):
            yield entry._replace(name=path)
        elif not entry.problem:
            others += 1
    if others:
        yield OtherFiles(others)


class SourceBase:
    """What the sources share: a `with`, and nothing to close."""

    def close(self) -> None:
        """See Source."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FolderSource(SourceBase):
    """The images below `root`; ids and places are their paths below it."""

    def __init__(self, root: str, store: Store, pattern: Pattern | None = None) -> None:
        self._root = root
        self._store = store
        self._pattern = pattern

    @property
    def description(self) -> str:
        """See Source."""
        shown = printable(self._root)
        return f"files {join(shown, self._pattern.text)}" if self._pattern else f"folder {shown}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        try:
            for entry in walk(self._store, self._root, is_image, self._pattern):
                if isinstance(entry, OtherFiles):
                    yield entry
                elif entry.problem:
                    yield Skipped(printable(entry.name), entry.problem)
                else:
                    yield SourceItem(entry.name, entry.name, entry.size, entry.version)
        except OSError as error:
            raise UsageError(
                f"{printable(self._root)}: cannot be listed ({why(error)}), expected a folder of images"
            ) from error

    def exists(self, item: SourceItem) -> bool:
        """See Source."""
        return self._store.exists(self._root)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        try:
            return self._store.read(join(self._root, inside(item.uri)), item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error


class OneFileSource(SourceBase):
    """One image; its id is its name."""

    def __init__(self, path: str, store: Store) -> None:
        self._path = path
        self._store = store

    @property
    def description(self) -> str:
        """See Source."""
        return f"image {printable(self._path.partition('?')[0])}"

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        name = self._path.partition("?")[0].rpartition("/")[2] if "://" in self._path else _name(self._path)
        try:
            with self._store.open(self._path) as blob:
                yield SourceItem(name, "", blob.size, blob.version)
        except OSError as error:
            raise UsageError(f"{self.description}: cannot be read ({why(error)})") from error

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        try:
            return self._store.read(self._path, item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error

    def exists(self, item: SourceItem) -> bool:
        """See Source."""
        return self._store.exists(self._path)


def inside(place: str) -> str:
    """`place` as it is, where it cannot lead out of its folder. Raises ImageError otherwise."""
    if place.startswith("/") or ".." in place.split("/"):
        raise ImageError(f"{printable(place)}: is no path below the folder")
    return place


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _part_regex(part: str) -> str:
    """The regular expression of one name's pattern."""
    made: list[str] = []
    i = 0
    while i < len(part):
        letter = part[i]
        end = part.find("]", i + 2) if letter == "[" else -1
        if letter == "*":
            if not made or made[-1] != "[^/]*":  # more of them in a row mean the same, and take for ever
                made.append("[^/]*")
        elif letter == "?":
            made.append("[^/]")
        elif end > 0:
            inner = part[i + 1 : end].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            made.append(f"[^/{inner[1:]}]" if inner[0] == "!" else f"[{inner}]")
            i = end
        else:
            made.append(re.escape(letter))
        i += 1
    return "".join(made)
