"""Names of the results of a run: one for each image, none of them twice, whatever the file system."""

import hashlib
import itertools
import json
import os
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import flush_folder
from multisa.runtime.image_labels import Labels
from multisa.runtime.progress import EXAMPLES_SHOWN
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem

MASK_ENDING = ".png"  # of the files that are named after an image

_SHARED = "SELECT fold FROM folds GROUP BY fold HAVING COUNT(*) > 1"


def name_results(rows: sqlite3.Connection) -> None:
    """Name the results of the images in `items`, the table of an inventory that is being written.

    `folds` has their names `folded`, `folders` the folders of their ids, folded, too. Images that would share
    a name keep their full id, every one of them; so does an image whose mask would have the name of a folder
    (a.jpg beside a.png/b.jpg). Upper and lower case, and the ways to write an accent, count as the same, as
    some file systems take them so; where full ids differ in that alone, or are the names of folders, too, the
    position of the image is put behind.

    Raises UsageError for an id that is there twice.
    """
    rows.create_function("folded", 1, folded, deterministic=True)
    rows.execute("CREATE INDEX temp.by_fold ON folds (fold)")
    twice = rows.execute(
        "SELECT id FROM items JOIN folds ON items.i = folds.i WHERE fold IN "
        f"({_SHARED}) GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
    ).fetchone()
    if twice:
        raise UsageError(f"{twice[0]}: is in the source twice, expected each image once")
    rows.execute("CREATE TEMP TABLE moved (i INTEGER PRIMARY KEY)")
    # A full id may in turn be the short name of another image, so this goes on until none is shared.
    while _rename(rows, "step = 0", f"fold IN ({_SHARED})") or _rename(
        rows, "step > 0", f"fold IN ({_SHARED}) AND i NOT IN (SELECT MIN(i) FROM folds GROUP BY fold)"
    ):
        pass


def folded(name: str) -> str:
    """What two names share that some file system takes for one (Unicode 16, 3.13.5: canonical caseless)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _rename(rows: sqlite3.Connection, of: str, shared: str) -> bool:
    """Give the images `of` whose names are shared, or are those of folders, the next one; whether any was."""
    rows.execute("DELETE FROM moved")
    is_folder = f"fold || '{MASK_ENDING}' IN (SELECT fold FROM folders)"
    rows.execute(f"INSERT INTO moved SELECT i FROM folds WHERE {of} AND (({shared}) OR {is_folder})")
    rows.execute(
        "UPDATE items SET name = CASE (SELECT step FROM folds WHERE folds.i = items.i) "
        "WHEN 0 THEN id WHEN 1 THEN id || '~' || i ELSE name || '~' END WHERE i IN (SELECT i FROM moved)"
    )
    rows.execute(
        "UPDATE folds SET fold = (SELECT folded(name) FROM items WHERE items.i = folds.i), step = step + 1 "
        "WHERE i IN (SELECT i FROM moved)"
    )
    return bool(rows.execute("SELECT COUNT(*) FROM moved").fetchone()[0])


# Word for a difference -> the query for the ids.
DIFFERENCES = {
    "added": "SELECT id FROM now WHERE id NOT IN (SELECT id FROM frozen.items)",
    "removed": "SELECT id FROM frozen.items WHERE id NOT IN (SELECT id FROM now)",
    "changed": "SELECT a.id FROM now a JOIN frozen.items b ON a.id = b.id "
    "WHERE a.size != b.size OR a.version != b.version",
}
ANOTHER_ORDER = "another order, or other labels"
_NOW = (
    "CREATE TABLE now (i INTEGER PRIMARY KEY, id TEXT, place TEXT, size INTEGER, version TEXT, listed TEXT)"
)


@contextmanager
def compare_listings(frozen: Path, listing: Iterable[Listed]) -> Iterator[sqlite3.Connection]:
    """A database of a listing, `now`, beside the frozen one; on the disk, and gone when it is closed."""
    with closing(sqlite3.connect("")) as scratch:
        scratch.execute(_NOW)
        items = (item for item in listing if isinstance(item, SourceItem))
        rows = ((e.id, e.uri, e.size, e.version, labels_text(e.labels)) for e in items)
        scratch.executemany("INSERT INTO now VALUES (NULL, ?, ?, ?, ?, ?)", rows)
        scratch.execute("CREATE INDEX now_by_id ON now (id)")
        scratch.commit()
        scratch.execute("ATTACH ? AS frozen", (str(frozen),))
        yield scratch


def is_same_order(scratch: sqlite3.Connection) -> bool:
    """Whether the images listed now, of which none is new, come as then, and with the same labels."""
    now = scratch.execute("SELECT id, listed FROM now ORDER BY i")
    query = "SELECT id, listed FROM frozen.items WHERE id IN (SELECT id FROM now) ORDER BY i"
    return all(a == b for a, b in itertools.zip_longest(now, scratch.execute(query)))


def listing_digest(listing: Iterable[Listed]) -> str:
    """SHA-256 of the images of a listing, in their order."""
    items = (item for item in listing if isinstance(item, SourceItem))
    return digest_of(digested(e.id, e.size, e.version, labels_text(e.labels)) for e in items)


def digest_of(items: Iterable[bytes]) -> str:
    """SHA-256 of images that are `digested`."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item)
    return digest.hexdigest()


def described(scratch: sqlite3.Connection, word: str, query: str) -> str:
    """How many ids a query of DIFFERENCES finds, and the first of them; "" for none."""
    count = scratch.execute(f"SELECT COUNT(*) FROM ({query})").fetchone()[0]
    some = [row[0] for row in scratch.execute(f"{query} LIMIT {EXAMPLES_SHOWN}")]
    return f"{count} {word} ({', '.join(some)}{', ...' if count > EXAMPLES_SHOWN else ''})" if count else ""


def labels_text(labels: Sequence[str] | None) -> str | None:
    """Labels as the tables keep them."""
    return None if labels is None else json.dumps(list(labels), ensure_ascii=False)


def digested(id_: str, size: int, version: str, listed: str | None) -> bytes:
    """What a digest is made of; listed: the labels in the source, as text."""
    # No field holds a NUL, so these bytes stand for one item only.
    return "\0".join((id_, str(size), version, listed or "", "")).encode()


Item = TypeVar("Item")

_SCHEMA = """
CREATE TABLE items (i INTEGER PRIMARY KEY, id TEXT NOT NULL, place TEXT NOT NULL, size INTEGER NOT NULL,
                    version TEXT NOT NULL, labels TEXT, name TEXT NOT NULL, listed TEXT);
CREATE TABLE skipped (id TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE retries (shard INTEGER NOT NULL, i INTEGER NOT NULL, PRIMARY KEY (shard, i)) WITHOUT ROWID;
CREATE INDEX retries_of_image ON retries (i, shard);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_WORK = "i, id, place, size, version, labels, name"
_MOVED_ON = "EXISTS (SELECT 1 FROM retries AS later WHERE later.i = items.i AND later.shard > ?)"
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Sample:
    """One image to be done."""

    index: int  # position in the run
    item: SourceItem
    name: str  # of its results, without extension
    labels: Labels | None  # the classes it is said to show; None: from scores


@dataclass(frozen=True)
class Shard:
    """The unit of commit: images that are written, and counted as done, together."""

    number: int
    works: tuple[Sample, ...]


class Snapshot:
    """An inventory that is there; a context manager. For one thread."""

    def __init__(self, path: Path) -> None:
        """Open. Raises MultisaError for a file that is no inventory of this version."""
        self._path = path
        try:
            self._rows = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)
            facts = dict(self._rows.execute("SELECT key, value FROM facts"))
            self.images, self.other_files = int(facts["images"]), int(facts["other_files"])
            self._digest = facts["digest"]
        except (sqlite3.Error, KeyError, ValueError) as error:
            raise MultisaError(
                f"{path}: cannot be read ({error}), expected the list of a run's images: "
                "begin anew with --overwrite"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rows.close()

    def shards(self, size: int) -> Iterator[tuple[int, int]]:
        """(number, images) of every shard of `size` images as it was made, those of retries last."""
        for number in range(-(-self.images // size)):
            yield number, min(size, self.images - number * size)
        query = "SELECT shard, COUNT(*) FROM retries GROUP BY shard ORDER BY shard"
        # All at once: a cursor may not be closed by the thread that happens to let go of this generator.
        yield from self._rows.execute(query).fetchall()

    def shard(self, number: int, size: int) -> Shard:
        """The images of one shard, without those that are, or were, tried again in a later one.

        So each image belongs to one shard, the one it was tried in last, and a shard that is done again
        cannot write an image twice: what has failed for a time might not fail the second time.
        """
        first = number * size
        if first < self.images:
            where, values = "i >= ? AND i < ?", [first, first + size]
        else:
            where, values = "i IN (SELECT i FROM retries WHERE shard = ?)", [number]
        query = f"SELECT {_WORK} FROM items WHERE {where} AND NOT {_MOVED_ON} ORDER BY i"
        rows = self._rows.execute(query, [*values, number])
        return Shard(number, tuple(map(_work, rows)))

    def add_retries(self, indices: Iterable[int], size: int) -> int:
        """Put images into further shards, to be tried again; returns how many shards."""
        last = self._rows.execute("SELECT MAX(shard) FROM retries").fetchone()[0]
        first = -(-self.images // size) if last is None else last + 1
        groups = list(_in_groups(indices, size))
        rows = [(number, i) for number, some in enumerate(groups, first) for i in some]
        with self._rows:
            self._rows.executemany("INSERT INTO retries VALUES (?, ?)", rows)
        return len(groups)

    def work(self, index: int) -> Sample:
        """One image."""
        return _work(self._rows.execute(f"SELECT {_WORK} FROM items WHERE i = ?", (index,)).fetchone())

    def shard_of(self, index: int, size: int) -> int:
        """The shard that an image was tried in last."""
        last = self._rows.execute("SELECT MAX(shard) FROM retries WHERE i = ?", (index,)).fetchone()[0]
        return index // size if last is None else int(last)

    @property
    def skipped(self) -> int:
        """How many entries of the source were not taken."""
        return int(self._rows.execute("SELECT COUNT(*) FROM skipped").fetchone()[0])

    def skipped_entries(self, limit: int) -> list[Skipped]:
        """The first of the entries that were not taken."""
        rows = self._rows.execute("SELECT id, reason FROM skipped LIMIT ?", (limit,))
        return [Skipped(*row) for row in rows]

    def difference(self, listing: Callable[[], Iterable[Listed]]) -> str:
        """What a source's listing has that this inventory has not, and the reverse, in words; "" if nothing.

        listing: lists the source; called a second time where the first was another.
        """
        if listing_digest(listing()) == self._digest:
            return ""
        with compare_listings(self._path, listing()) as scratch:
            said = [described(scratch, word, query) for word, query in DIFFERENCES.items()]
        return "; ".join(filter(None, said)) or ANOTHER_ORDER

    def take_changes(self, listing: Callable[[], Iterable[Listed]], indices: Iterable[int]) -> str:
        """Take over how the images `indices` are now, where no other has changed; else say what has.

        They may be gone, too; order and labels are to be those of then.
        """
        query = "SELECT id FROM items WHERE i = ?"
        mine = [self._rows.execute(query, (i,)).fetchone() for i in indices]
        with compare_listings(self._path, listing()) as scratch:
            scratch.execute("CREATE TABLE mine (id TEXT PRIMARY KEY)")
            scratch.executemany("INSERT INTO mine VALUES (?)", mine)
            others = {
                word: f"SELECT id FROM ({query}) WHERE id NOT IN (SELECT id FROM mine)"
                for word, query in DIFFERENCES.items()
            }
            said = [described(scratch, word, query) for word, query in others.items()]
            if any(said):
                return "; ".join(filter(None, said))
            if not is_same_order(scratch):
                return ANOTHER_ORDER
            query = "SELECT place, size, version, id FROM now WHERE id IN (SELECT id FROM mine)"
            changed = scratch.execute(query).fetchall()
            rows = scratch.execute("SELECT id, size, version, listed FROM now ORDER BY i")
            digest = digest_of(itertools.starmap(digested, rows))
        with self._rows:
            self._rows.executemany("UPDATE items SET place = ?, size = ?, version = ? WHERE id = ?", changed)
            self._rows.execute("UPDATE facts SET value = ? WHERE key = 'digest'", (digest,))
        self._digest = digest
        return ""


def take_snapshot(
    path: Path,
    listing: Iterable[Listed],
    labels_of: Callable[[SourceItem], Labels | None],
    described: str = "the source",
) -> None:
    """Write the inventory of a listing to `path`, which appears when it is complete.

    labels_of: the classes an image is said to show. described: the source, for people. Raises UsageError
    when there is no image, or one id is there twice.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as rows:
        rows.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")
        images, others, digest = _fill(rows, listing, labels_of)
        if not images:
            raise UsageError(
                f"{described}: no image found, expected at least one: images are known by their extension "
                "(.jpg, .png, ...)"
            )
        name_results(rows)
        facts = {"images": images, "other_files": others, "digest": digest}
        rows.executemany("INSERT INTO facts VALUES (?, ?)", [(key, str(v)) for key, v in facts.items()])
        rows.commit()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def _fill(
    rows: sqlite3.Connection, listing: Iterable[Listed], labels_of: Callable[[SourceItem], Labels | None]
) -> tuple[int, int, str]:
    digest, others, images = hashlib.sha256(), 0, 0
    rows.execute("CREATE TEMP TABLE folds (i INTEGER PRIMARY KEY, fold TEXT NOT NULL, step INTEGER NOT NULL)")
    rows.execute("CREATE TEMP TABLE folders (fold TEXT PRIMARY KEY) WITHOUT ROWID")
    last_folder = ""
    for some in _in_groups(listing, _ROWS_AT_ONCE):
        items: list[tuple[int, str, str, int, str, str | None, str, str | None]] = []
        folders: set[str] = set()
        for entry in some:
            if isinstance(entry, OtherFiles):
                others += entry.count
            elif isinstance(entry, Skipped):
                rows.execute("INSERT INTO skipped VALUES (?, ?)", (entry.id, entry.reason))
            else:
                listed = labels_text(entry.labels)
                digest.update(digested(entry.id, entry.size, entry.version, listed))
                labels = labels_text(labels_of(entry))
                folder, name = _folder_and_name(entry.id)
                items.append((images, entry.id, entry.uri, entry.size, entry.version, labels, name, listed))
                images += 1
                if folder != last_folder:
                    last_folder = folder
                    folders.update(folded(parent) for parent in _with_parents(folder))
        rows.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?)", items)
        folds = [(item[0], folded(item[6])) for item in items]
        rows.executemany("INSERT INTO folds VALUES (?, ?, 0)", folds)
        rows.executemany("INSERT OR IGNORE INTO folders VALUES (?)", [(folder,) for folder in folders])
    return images, others, digest.hexdigest()


def _folder_and_name(id_: str) -> tuple[str, str]:
    """The folder of an id, and the id without its ending; as pathlib has them, in a tenth of the time."""
    folder, slash, file = id_.rpartition("/")
    dot = file.rfind(".")
    return folder, f"{folder}{slash}{file[:dot] if 0 < dot < len(file) - 1 else file}"


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _work(row: tuple[int, str, str, int, str, str | None, str]) -> Sample:
    index, id_, place, size, version, labels, name = row
    given = None if labels is None else tuple(json.loads(labels))
    return Sample(index, SourceItem(id_, place, size, version), name, given)


def _in_groups(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group
