"""Sources for the images below a folder, all or those that match a pattern, and for a single image.

FolderSource("photos", LocalStore("photos"), Pattern("**/*.jpg"))
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.base import (
    Listed,
    OtherFileCounter,
    OtherFiles,
    Skipped,
    Source,
    SourceItem,
    no_image_error,
)
from multisa.runtime.sources.storage import (
    LONGEST_PATH,
    Entry,
    LocalStore,
    NameFilter,
    Store,
    is_image,
    join,
    last_name,
    mask_name,
    printable,
    reason_of,
    unread_format,
)


class Pattern:
    """A glob pattern for paths below a folder: `*`, `?`, `[a-z]` within a name, `**` for any folders.

    Part i of the pattern is state i of an automaton that consumes the names of a path.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        # None stands for "**". `fnmatch` matches "[a" and "[]" literally and ignores empty ranges like [z-a].
        self._parts = [None if p == "**" else re.compile(fnmatch.translate(p)) for p in text.split("/")]

    def matches(self, path: str) -> bool:
        """Return whether the pattern matches the file `path`."""
        return len(self._parts) in self._states(path)

    def may_contain(self, folder: str) -> bool:
        """Return whether a file below `folder` can match."""
        return any(state < len(self._parts) for state in self._states(folder))

    def _states(self, path: str) -> set[int]:
        """Return the states that the names of `path` lead to."""
        states = self._skip_folders({0})
        for name in path.split("/"):
            moved = set()
            for state in states - {len(self._parts)}:
                part = self._parts[state]
                if part is None:
                    moved.add(state)
                if part.fullmatch(name) if part else state == len(self._parts) - 1:
                    moved.add(state + 1)
            states = self._skip_folders(moved)
        return states

    def _skip_folders(self, states: set[int]) -> set[int]:
        """Add the states after each "**", which also matches no folder at all."""
        reached = set(states)
        for state in range(len(self._parts) - 1):
            if state in reached and self._parts[state] is None:
                reached.add(state + 1)
        return reached


def walk(store: Store, root: str, keep: NameFilter, pattern: Pattern | None) -> Iterator[Entry | OtherFiles]:
    """Yield everything below `root`, depth first, names sorted by code point; `name` is the path.

    Skipped entries have a `problem`. The last item counts the files that `keep` rejects. Memory holds the
    names of one folder and of its parents. Raises OSError when `root` cannot be read.
    """
    others = OtherFileCounter()
    stack = [("", store.folder(root, keep))]
    while stack:
        prefix, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        if entry.is_folder:
            if pattern and not pattern.may_contain(path):
                continue
            problem = entry.problem or ("its name is too long" if len(path) > LONGEST_PATH else "")
            if not problem:
                try:
                    stack.append((path + "/", store.folder(join(root, path), keep)))
                except OSError as error:
                    problem = reason_of(error)
            if problem:
                yield entry._replace(name=path, problem=problem)
        elif pattern and not pattern.matches(path):
            continue
        elif keep(entry.name):
            yield entry._replace(name=path)
        elif problem := unread_format(entry.name):
            yield entry._replace(name=path, problem=problem)
        else:
            others.add(path)
    yield from others.total()


class FolderSource(Source):
    """The images below `root`; ids and URIs are their paths below it."""

    def __init__(self, root: str, store: Store, pattern: Pattern | None = None) -> None:
        self._root = root
        self._store = store
        self._pattern = pattern
        name = printable(root)
        self.description = f"files {join(name, pattern.text)}" if pattern else f"folder {name}"
        self.folder_name = last_name(root)

    def listing(self) -> Iterator[Listed]:
        try:
            for entry in walk(self._store, self._root, is_image, self._pattern):
                if isinstance(entry, OtherFiles):
                    yield entry
                elif problem := entry.problem or mask_name(entry.name):
                    yield Skipped(printable(entry.name), problem)
                else:
                    yield SourceItem(entry.name, entry.name, entry.size, entry.version)
        except OSError as error:
            raise UsageError(
                f"{printable(self._root)}: cannot be listed ({reason_of(error)}), expected a folder of images"
            ) from error

    def exists(self, item: SourceItem) -> bool:
        return self._store.exists(self._root)

    def _read(self, item: SourceItem) -> bytes:
        return self._store.read(join(self._root, inside(item.uri)), item.size, item.version)


class OneFileSource(Source):
    """A single image; its id is its name."""

    def __init__(self, path: str, store: Store) -> None:
        self._path = path
        self._store = store
        self.description = f"image {printable(path.partition('?')[0])}"
        self.folder_name = last_name(path.rpartition("/")[0])

    def listing(self) -> Iterator[Listed]:
        path = self._path.partition("?")[0] if "://" in self._path else self._path
        name = path.rpartition("/")[2]
        try:
            with self._store.open(self._path) as blob:
                yield SourceItem(name, "", blob.size, blob.version)
        except OSError as error:
            raise UsageError(f"{self.description}: cannot be read ({reason_of(error)})") from error

    def _read(self, item: SourceItem) -> bytes:
        return self._store.read(self._path, item.size, item.version)

    def exists(self, item: SourceItem) -> bool:
        return self._store.exists(self._path)


@dataclass(frozen=True)
class ListedImage:
    """One image of a folder."""

    path: Path
    relative: str  # posix path below the folder
    name: str  # `relative` without extension; with it where two images would share a name


@dataclass(frozen=True)
class ListedImages:
    """The images of a folder, sorted by relative path, and everything else below it."""

    images: tuple[ListedImage, ...]
    skipped: tuple[Skipped, ...]
    others: tuple[str, ...]  # posix paths of the files without the extension of an image, printable


def list_images(folder: Path) -> ListedImages:
    """List all images below a folder at once, for data sets that fit in memory.

    Raises UsageError when `folder` is not a folder, cannot be listed, or holds no image.
    """
    name = printable(str(folder))
    if not folder.is_dir():
        raise UsageError(f"{name}: is not a folder, expected a folder of images")
    try:
        found = walk(LocalStore(str(folder)), str(folder), lambda _: True, None)
        entries = sorted((entry for entry in found if isinstance(entry, Entry)), key=lambda entry: entry.name)
        entries = [entry._replace(problem=entry.problem or mask_name(entry.name)) for entry in entries]
    except OSError as error:
        raise UsageError(f"{name}: cannot be listed ({reason_of(error)}), expected a folder of images") from error
    files = [entry.name for entry in entries if not entry.problem]
    relatives = [relative for relative in files if is_image(relative)]
    skipped = tuple(Skipped(printable(entry.name), entry.problem) for entry in entries if entry.problem)
    others = tuple(printable(relative) for relative in files if not is_image(relative))
    if not relatives:
        counter = OtherFileCounter()
        for other in others:
            counter.add(other)
        total = next(counter.total(), OtherFiles(0))
        raise no_image_error(f"folder {name}", [f"{entry.reason}: {entry.id}" for entry in skipped], total)
    names = _result_names(relatives)
    return ListedImages(
        tuple(ListedImage(folder / r, r, name) for r, name in zip(relatives, names, strict=True)), skipped, others
    )


def _result_names(relatives: list[str]) -> list[str]:
    """Drop the extensions, except where images would then share a name: all of those keep their full paths.

    So does an image whose mask would have the name of a folder (a.jpg beside a.png/b.jpg).
    """
    names = {relative: PurePosixPath(relative).with_suffix("").as_posix() for relative in relatives}
    folders = {parent.as_posix().casefold() for r in relatives for parent in PurePosixPath(r).parents}
    while True:
        # Some file systems ignore case.
        uses = Counter(name.casefold() for name in names.values())
        for name in names.values():
            uses[name.casefold()] += f"{name}.png".casefold() in folders
        shared = [r for r, name in names.items() if uses[name.casefold()] > 1 and name != r]
        if not shared:
            return [names[relative] for relative in relatives]
        # A full path may in turn be the short name of another image: repeat until none is shared.
        names.update({relative: relative for relative in shared})


def inside(path: str) -> str:
    """Return `path`. Raises ImageError if it leads out of its folder."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ImageError(f"{printable(path)}: is not a path below the folder")
    return path
