"""Images in tar shards, with the labels that lie beside them, as webdataset writes them.

    0001.jpg  0001.json {"labels": ["cat"]}  or  0001.cls  or  0001.txt

One look at every header lists a shard; a read then takes the image's bytes alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.contract import MAX_FILE_BYTES, Listed, OtherFiles, PassedOver, SourceItem
from multisa.runtime.sources.folders import Pattern, SourceBase, inside, walk
from multisa.runtime.sources.label_cells import CellReader
from multisa.runtime.sources.names import (
    LONGEST_PATH,
    Seen,
    is_image,
    is_tar,
    printable,
    safe_id,
    unsafe_path,
)
from multisa.runtime.sources.storage import Blob, Entry, Store, join, why
from multisa.runtime.sources.tar_members import Member, TarDamaged, tar_members

MOST_SHARDS = 1_000_000
_LARGEST_SIDECAR = 2**20  # bytes of a file of labels
_LARGEST_SAMPLE = 256  # members of one key that are looked at together
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")


def has_range(spec: str) -> bool:
    """Whether `spec` has a range like {000000..000123}."""
    return bool(_RANGE.search(spec))


def expand_range(spec: str) -> Iterator[str]:
    """The paths of `spec` with {000000..000123} counted up.

    Raises UsageError for more than one range, or too large a one.
    """
    first, *more = _RANGE.finditer(spec)
    if more:
        raise UsageError(f"{spec}: got several ranges, expected one like {{000000..000123}}")
    low, high = int(first[1]), int(first[2])
    if not low <= high < low + MOST_SHARDS:
        raise UsageError(
            f"{spec}: got a range of {high - low + 1} files, expected 1 to {MOST_SHARDS}, the smaller "
            "number first"
        )
    width = len(first[1])
    return (f"{spec[: first.start()]}{i:0{width}}{spec[first.end() :]}" for i in range(low, high + 1))


def found_shards(store: Store, root: str, pattern: Pattern) -> Iterator[Entry]:
    """The tar files below `root` that a pattern takes. Raises UsageError where there is none."""
    count = 0
    try:
        for entry in walk(store, root, is_tar, pattern):
            if isinstance(entry, Entry):
                count += not entry.problem
                yield entry
    except OSError as error:
        raise UsageError(f"{printable(root)}: cannot be listed ({why(error)})") from error
    if not count:
        raise UsageError(f"{printable(join(root, pattern.text))}: no file of this name, expected tar files")


class TarSource(SourceBase):
    """Tar files below `root`; ids are "shard/member", places "shard.tar#offset"."""

    def __init__(
        self,
        root: str,
        store: Store,
        shards: Callable[[], Iterable[Entry]],
        description: str,
        cells: CellReader,
    ) -> None:
        self._root = root
        self._store = store
        self._shards = shards
        self._cells = cells
        self._description = description

    @property
    def description(self) -> str:
        """See Source."""
        return self._description

    def listing(self) -> Iterator[Listed]:
        """See Source."""
        seen, stems = Seen(), Seen()
        others = 0
        for shard in self._shards():
            if shard.problem:
                yield PassedOver(printable(shard.name), shard.problem)
                continue
            if not stems.add(shard.name[:-4]):
                raise UsageError(
                    f"{printable(shard.name)}: another tar file differs in upper and lower case of .tar alone"
                )
            for listed in self._shard(shard.name, seen):
                if isinstance(listed, OtherFiles):
                    others += listed.count
                else:
                    yield listed
        if others:
            yield OtherFiles(others)

    def read(self, item: SourceItem) -> bytes:
        """See Source."""
        path, _, offset = item.place.rpartition("#")
        if item.size > MAX_FILE_BYTES or item.size < 0:
            raise ImageError(f"got {item.size} bytes, expected at most {MAX_FILE_BYTES}")
        try:
            path = join(self._root, inside(path))
            data = self._store.read_range(path, int(offset), item.size, item.version)
        except OSError as error:
            raise ImageError(why(error)) from error
        if len(data) != item.size:
            raise ImageError(f"the tar file ends after {len(data)} of the image's {item.size} bytes")
        return data

    def is_there(self, item: SourceItem) -> bool:
        """See Source; it is about the item's tar file."""
        return self._store.is_there(join(self._root, item.place.rpartition("#")[0]))

    def _shard(self, name: str, seen: Seen) -> Iterator[Listed]:
        shown = printable(join(self._root, name))
        prefix = safe_id(name[:-4])
        any_member = False
        try:
            with self._store.open(join(self._root, name)) as blob:
                if not blob.size:
                    yield PassedOver(printable(name), "is empty")
                for sample in _samples(tar_members(blob)):
                    any_member = True
                    yield from self._sample((name, prefix), sample, blob, seen)
        except TarDamaged as error:
            if not any_member:
                raise UsageError(f"{shown}: cannot be read as a tar file: {error}") from error
            reason = f"damaged at byte {error.offset}: {error}; what follows is not read"
            yield PassedOver(printable(name), reason)
        except OSError as error:
            raise UsageError(f"{shown}: cannot be read ({why(error)}), expected a tar file") from error

    def _sample(
        self, shard: tuple[str, str], members: list[Member], blob: Blob, seen: Seen
    ) -> Iterator[Listed]:
        """The entries of one sample of a shard, which is given as its path and what its ids begin with."""
        path, prefix = shard
        images = [member for member in members if is_image(member.name)]
        sidecars = {
            member.name.rpartition(".")[2].lower(): member
            for member in members
            if len(members) > 1
            and images
            and member.name[len(_key(member.name)) :].lower() in (".json", ".cls", ".txt")
        }
        labels = None
        if images:
            labels, problems = self._labels(sidecars, blob)
            yield from (PassedOver(printable(f"{prefix}/{name}"), why_not) for name, why_not in problems)
        for member in images:
            made = f"{prefix}/{member.name}"
            problem = _problem(member, made)
            if not problem and not seen.add(made):
                problem = "another member has the same name: the first is taken"
            if problem:
                yield PassedOver(printable(made), problem)
            else:
                yield SourceItem(made, f"{path}#{member.offset}", member.size, blob.version, labels)
        if others := len(members) - len(images) - len(sidecars):
            yield OtherFiles(others)

    def _labels(
        self, sidecars: dict[str, Member], blob: Blob
    ) -> tuple[tuple[str, ...] | None, list[tuple[str, str]]]:
        """What the files beside an image say, and those that cannot be read, with the reason."""
        problems: list[tuple[str, str]] = []
        for kind in ("json", "cls", "txt"):
            member = sidecars.get(kind)
            if member is None:
                continue
            problem = member.problem
            if not problem and member.size > _LARGEST_SIDECAR:
                problem = f"got {member.size} bytes of labels, expected at most {_LARGEST_SIDECAR}"
            try:
                if not problem:
                    found = self._cells.from_file(kind, blob.read_at(member.offset, member.size))
                    if found is not None:
                        return found, problems
            except ValueError as error:
                problem = str(error)
            if problem:
                problems.append((member.name, problem))
        return None, problems


def _samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members of one key that follow each other; those before damage come before its exception."""
    sample: list[Member] = []
    key = ""
    try:
        for member in members:
            its = _key(member.name)
            if sample and (its != key or len(sample) == _LARGEST_SAMPLE):
                yield sample
                sample = []
            key = its
            sample.append(member)
    except TarDamaged:
        if sample:
            yield sample
        raise
    if sample:
        yield sample


def _problem(member: Member, made: str) -> str:
    """Why a member is not taken under the id `made`, or ""."""
    problem = unsafe_path(member.name) or member.problem
    if not problem and member.size > MAX_FILE_BYTES:
        problem = f"got {member.size} bytes, expected at most {MAX_FILE_BYTES}"
    return problem or ("its name is too long" if len(made.encode()) > LONGEST_PATH else "")


def _key(name: str) -> str:
    """What the members of one sample share: the path up to the first dot in the name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
