"""The snapshot of a run: its list of images in a database, with the names of their results and their shards.

A run works on the images that its source had when the run began. OUT/.multisa/snapshot.sqlite stores them, so
that resuming does not depend on the source, and any change of the source is noticed.
"""

import hashlib
import itertools
import json
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import flush_file, flush_folder
from multisa.runtime.image_labels import Labels, without_suffix
from multisa.runtime.progress import EXAMPLES_SHOWN
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem, no_image_error

MASK_SUFFIX = ".png"  # of the files that are named after an image

_SCHEMA = """
CREATE TABLE items (i INTEGER PRIMARY KEY, id TEXT NOT NULL, place TEXT NOT NULL, size INTEGER NOT NULL,
                    version TEXT NOT NULL, labels TEXT, name TEXT NOT NULL, listed TEXT);
CREATE TABLE skipped (id TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE retries (shard INTEGER NOT NULL, i INTEGER NOT NULL, PRIMARY KEY (shard, i)) WITHOUT ROWID;
CREATE INDEX retries_of_image ON retries (i, shard);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_SAMPLE = "i, id, place, size, version, labels, name"
_RETRIED_LATER = "EXISTS (SELECT 1 FROM retries AS later WHERE later.i = items.i AND later.shard > ?)"
_ROWS_AT_ONCE = 10_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One image of a run."""

    index: int  # position in the run
    item: SourceItem
    name: str  # of its results, without extension
    labels: Labels | None  # its classes, where they are known; None: to be predicted


@dataclass(frozen=True)
class Shard:
    """The unit of commit: images whose results are written, and counted as done, together."""

    number: int
    samples: tuple[Sample, ...]


class Snapshot(AbstractContextManager["Snapshot"]):
    """An existing snapshot; a context manager, for one thread."""

    def __init__(self, path: Path) -> None:
        """Open. Raises MultisaError for a file that is not a snapshot of this version."""
        self._path = path
        try:
            self._rows = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)
            facts = dict(self._rows.execute("SELECT key, value FROM facts"))
            self.images = int(facts["images"])
            kinds = {
                extension: (count, first) for extension, (count, first) in json.loads(facts["other_kinds"]).items()
            }
            self.other_files = OtherFiles(int(facts["other_files"]), kinds)
            self.digest = facts["digest"]
        except (sqlite3.Error, KeyError, ValueError) as error:
            raise MultisaError(
                f"{path}: cannot be read ({error}), expected the list of a run's images: start over with --overwrite"
            ) from error

    def __exit__(self, *error: object) -> None:
        self._rows.close()

    def shards(self, size: int) -> Iterator[tuple[int, int]]:
        """(number, images) of every shard of `size` images as first made; those of retries come last."""
        for number in range(-(-self.images // size)):
            yield number, min(size, self.images - number * size)
        query = "SELECT shard, COUNT(*) FROM retries GROUP BY shard ORDER BY shard"
        # All rows at once: only this thread may close a cursor, but any may drop this generator.
        yield from self._rows.execute(query).fetchall()

    def shard(self, number: int, size: int) -> Shard:
        """The images of one shard, without those that belong to a later retry.

        So each image belongs to one shard, the one in which it was tried last, and a shard that is processed
        again cannot write an image twice, even if it fails the first time and succeeds the second time.
        """
        first = number * size
        if first < self.images:
            where = "i >= ? AND i < ?"
            values = [first, first + size]
        else:
            where = "i IN (SELECT i FROM retries WHERE shard = ?)"
            values = [number]
        query = f"SELECT {_SAMPLE} FROM items WHERE {where} AND NOT {_RETRIED_LATER} ORDER BY i"
        rows = self._rows.execute(query, [*values, number])
        return Shard(number, tuple(map(_sample, rows)))

    def add_retries(self, indices: Iterable[int], size: int) -> int:
        """Put images into further shards, to be tried again; returns the number of these shards."""
        last = self._rows.execute("SELECT MAX(shard) FROM retries").fetchone()[0]
        first = -(-self.images // size) if last is None else last + 1
        groups = list(_in_groups(indices, size))
        rows = [(number, i) for number, group in enumerate(groups, first) for i in group]
        with self._rows:
            self._rows.executemany("INSERT INTO retries VALUES (?, ?)", rows)
        return len(groups)

    def sample(self, index: int) -> Sample:
        """One image."""
        return _sample(self._rows.execute(f"SELECT {_SAMPLE} FROM items WHERE i = ?", (index,)).fetchone())

    def shard_of(self, index: int, size: int) -> int:
        """The shard in which an image was tried last."""
        last = self._rows.execute("SELECT MAX(shard) FROM retries WHERE i = ?", (index,)).fetchone()[0]
        return index // size if last is None else int(last)

    @property
    def skipped(self) -> int:
        """Number of entries of the source that were skipped."""
        return int(self._rows.execute("SELECT COUNT(*) FROM skipped").fetchone()[0])

    def skipped_entries(self, limit: int = -1) -> Iterator[Skipped]:
        """The entries that were skipped, or the first of them."""
        return (Skipped(*row) for row in self._rows.execute("SELECT id, reason FROM skipped LIMIT ?", (limit,)))

    def skipped_by_reason(self) -> list[str]:
        """The reasons with the number of entries that were skipped for each, and the first of them."""
        return _skipped_by_reason(self._rows)

    def difference(self, listing: Callable[[], Iterable[Listed]]) -> str:
        """How a source's listing differs from the snapshot, in words; "" if it does not.

        `listing` lists the source; it is called a second time if the first listing differs.
        """
        if _digest_of_listing(listing()) == self.digest:
            return ""
        with _compare_listing(self._path, listing()) as scratch:
            found = [_describe(scratch, word, query) for word, query in _DIFFERENCES.items()]
        return "; ".join(filter(None, found)) or _OTHER_ORDER

    def accept_changes(self, listing: Callable[[], Iterable[Listed]], indices: Iterable[int]) -> str:
        """Update the images `indices` from the source, if nothing else has changed; else say what has.

        These images may also have been removed. The order of all images and their labels must be the same.
        """
        query = "SELECT id FROM items WHERE i = ?"
        accepted = [self._rows.execute(query, (i,)).fetchone() for i in indices]
        with _compare_listing(self._path, listing()) as scratch:
            scratch.execute("CREATE TABLE accepted (id TEXT PRIMARY KEY)")
            scratch.executemany("INSERT INTO accepted VALUES (?)", accepted)
            found = [
                _describe(scratch, word, f"SELECT id FROM ({query}) WHERE id NOT IN (SELECT id FROM accepted)")
                for word, query in _DIFFERENCES.items()
            ]
            if any(found):
                return "; ".join(filter(None, found))
            if not _is_same_order(scratch):
                return _OTHER_ORDER
            query = "SELECT place, size, version, id FROM now WHERE id IN (SELECT id FROM accepted)"
            changed = scratch.execute(query).fetchall()
            rows = scratch.execute("SELECT id, size, version, listed FROM now ORDER BY i")
            digest = _digest_of(itertools.starmap(_digest_bytes, rows))
        with self._rows:
            self._rows.executemany("UPDATE items SET place = ?, size = ?, version = ? WHERE id = ?", changed)
            self._rows.execute("UPDATE facts SET value = ? WHERE key = 'digest'", (digest,))
        self.digest = digest
        return ""


def take_snapshot(
    path: Path,
    listing: Iterable[Listed],
    labels_of: Callable[[SourceItem], Labels | None],
    description: str = "the source",
) -> None:
    """Write the snapshot of a listing to `path`, which appears when it is complete.

    labels_of: the known classes of an image, None where they are predicted. description: of the
    source, for messages. Raises UsageError if there is no image, or if an id occurs twice.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as rows:
        rows.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")
        images, others, digest = _fill(rows, listing, labels_of)
        if not images:
            raise no_image_error(description, _skipped_by_reason(rows), others)
        _assign_names(rows)
        others_by_kind = json.dumps(dict(others.kinds))
        facts = {"images": images, "other_files": others.count, "other_kinds": others_by_kind, "digest": digest}
        rows.executemany("INSERT INTO facts VALUES (?, ?)", [(key, str(v)) for key, v in facts.items()])
        rows.commit()
    flush_file(temporary)
    temporary.replace(path)
    flush_folder(path.parent)


def _skipped_by_reason(rows: sqlite3.Connection) -> list[str]:
    groups = rows.execute("SELECT reason, COUNT(*), MIN(id) FROM skipped GROUP BY reason ORDER BY 2 DESC, 1")
    return [f"{reason}: {count} ({first})" for reason, count, first in groups]


def _fill(
    rows: sqlite3.Connection, listing: Iterable[Listed], labels_of: Callable[[SourceItem], Labels | None]
) -> tuple[int, OtherFiles, str]:
    """Store a listing; returns the number of images, the other files, and the digest of the images."""
    digest = hashlib.sha256()
    others = OtherFiles(0)
    images = 0
    rows.execute("CREATE TEMP TABLE folds (i INTEGER PRIMARY KEY, fold TEXT NOT NULL, step INTEGER NOT NULL)")
    rows.execute("CREATE TEMP TABLE folders (fold TEXT PRIMARY KEY) WITHOUT ROWID")
    last_folder = ""
    for group in _in_groups(listing, _ROWS_AT_ONCE):
        items: list[tuple[int, str, str, int, str, str | None, str, str | None]] = []
        folders: set[str] = set()
        for entry in group:
            if isinstance(entry, OtherFiles):
                others = entry
            elif isinstance(entry, Skipped):
                rows.execute("INSERT INTO skipped VALUES (?, ?)", (entry.id, entry.reason))
            else:
                listed = _encode_labels(entry.labels)
                digest.update(_digest_bytes(entry.id, entry.size, entry.version, listed))
                labels = _encode_labels(labels_of(entry))
                folder, name = entry.id.rpartition("/")[0], without_suffix(entry.id)
                items.append((images, entry.id, entry.uri, entry.size, entry.version, labels, name, listed))
                images += 1
                if folder != last_folder:
                    last_folder = folder
                    folders.update(fold_name(parent) for parent in _with_parents(folder))
        rows.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?)", items)
        folds = [(item[0], fold_name(item[6])) for item in items]
        rows.executemany("INSERT INTO folds VALUES (?, ?, 0)", folds)
        rows.executemany("INSERT OR IGNORE INTO folders VALUES (?)", [(folder,) for folder in folders])
    return images, others, digest.hexdigest()


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _sample(row: tuple[int, str, str, int, str, str | None, str]) -> Sample:
    index, id_, place, size, version, labels, name = row
    known = None if labels is None else tuple(json.loads(labels))
    return Sample(index, SourceItem(id_, place, size, version), name, known)


def _in_groups(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


_SHARED = "SELECT fold FROM folds GROUP BY fold HAVING COUNT(*) > 1"


def _assign_names(rows: sqlite3.Connection) -> None:
    """Give each image in `items` a name for its results that is unique on any file system.

    `folds` holds the names after `fold_name`, `folders` the folders of the ids, folded too. Images that would
    share a name all keep their full id; so does an image whose mask would have the name of a folder (a.jpg
    beside a.png/b.jpg). If full ids differ only in case or in the way an accent is written, or are names of
    folders, the index of the image is appended.

    Raises UsageError for an id that occurs twice.
    """
    rows.create_function("fold_name", 1, fold_name, deterministic=True)
    rows.execute("CREATE INDEX temp.by_fold ON folds (fold)")
    twice = rows.execute(
        "SELECT id FROM items JOIN folds ON items.i = folds.i WHERE fold IN "
        f"({_SHARED}) GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
    ).fetchone()
    if twice:
        raise UsageError(f"{twice[0]}: is in the source twice, expected each image once")
    rows.execute("CREATE TEMP TABLE moved (i INTEGER PRIMARY KEY)")
    # A full id may be the short name of another image, so repeat until no name is shared.
    while _rename(rows, "step = 0", f"fold IN ({_SHARED})") or _rename(
        rows, "step > 0", f"fold IN ({_SHARED}) AND i NOT IN (SELECT MIN(i) FROM folds GROUP BY fold)"
    ):
        pass


def fold_name(name: str) -> str:
    """What two names have in common if some file system takes them for one.

    Canonical caseless matching of Unicode (The Unicode Standard, version 16, section 3.13.5).
    """
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _rename(rows: sqlite3.Connection, which: str, shared: str) -> bool:
    """Give the next name to the images `which` whose name is shared or that of a folder; whether any was."""
    rows.execute("DELETE FROM moved")
    is_folder = f"fold || '{MASK_SUFFIX}' IN (SELECT fold FROM folders)"
    rows.execute(f"INSERT INTO moved SELECT i FROM folds WHERE {which} AND (({shared}) OR {is_folder})")
    rows.execute(
        "UPDATE items SET name = CASE (SELECT step FROM folds WHERE folds.i = items.i) "
        "WHEN 0 THEN id WHEN 1 THEN id || '~' || i ELSE name || '~' END WHERE i IN (SELECT i FROM moved)"
    )
    rows.execute(
        "UPDATE folds SET fold = (SELECT fold_name(name) FROM items WHERE items.i = folds.i), "
        "step = step + 1 WHERE i IN (SELECT i FROM moved)"
    )
    return bool(rows.execute("SELECT COUNT(*) FROM moved").fetchone()[0])


# Word for a difference -> the query for the ids.
_DIFFERENCES = {
    "added": "SELECT id FROM now WHERE id NOT IN (SELECT id FROM snapshot.items)",
    "removed": "SELECT id FROM snapshot.items WHERE id NOT IN (SELECT id FROM now)",
    "changed": "SELECT a.id FROM now a JOIN snapshot.items b ON a.id = b.id "
    "WHERE a.size != b.size OR a.version != b.version",
}
_OTHER_ORDER = "another order, or other labels"
_NOW = "CREATE TABLE now (i INTEGER PRIMARY KEY, id TEXT, place TEXT, size INTEGER, version TEXT, listed TEXT)"


@contextmanager
def _compare_listing(path: Path, listing: Iterable[Listed]) -> Iterator[sqlite3.Connection]:
    """A temporary database with a listing as the table `now`, beside the snapshot at `path`."""
    with closing(sqlite3.connect("")) as scratch:
        scratch.execute(_NOW)
        items = (item for item in listing if isinstance(item, SourceItem))
        rows = ((e.id, e.uri, e.size, e.version, _encode_labels(e.labels)) for e in items)
        scratch.executemany("INSERT INTO now VALUES (NULL, ?, ?, ?, ?, ?)", rows)
        scratch.execute("CREATE INDEX now_by_id ON now (id)")
        scratch.commit()
        scratch.execute("ATTACH ? AS snapshot", (str(path),))
        yield scratch


def _is_same_order(scratch: sqlite3.Connection) -> bool:
    """Whether the images listed now, none of which is new, have the order and labels of the snapshot."""
    now = scratch.execute("SELECT id, listed FROM now ORDER BY i")
    query = "SELECT id, listed FROM snapshot.items WHERE id IN (SELECT id FROM now) ORDER BY i"
    return all(a == b for a, b in itertools.zip_longest(now, scratch.execute(query)))


def _describe(scratch: sqlite3.Connection, word: str, query: str) -> str:
    """How many ids a query of _DIFFERENCES finds, and the first of them; "" for none."""
    count = scratch.execute(f"SELECT COUNT(*) FROM ({query})").fetchone()[0]
    some = [row[0] for row in scratch.execute(f"{query} LIMIT {EXAMPLES_SHOWN}")]
    return f"{count} {word} ({', '.join(some)}{', ...' if count > EXAMPLES_SHOWN else ''})" if count else ""


def _digest_of_listing(listing: Iterable[Listed]) -> str:
    """SHA-256 of the images of a listing, in their order."""
    items = (item for item in listing if isinstance(item, SourceItem))
    return _digest_of(_digest_bytes(e.id, e.size, e.version, _encode_labels(e.labels)) for e in items)


def _digest_of(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _digest_bytes(id_: str, size: int, version: str, listed: str | None) -> bytes:
    """What identifies an image in a digest; listed: its labels in the source, encoded."""
    # No field contains a NUL, so these bytes stand for one image only.
    return "\0".join((id_, str(size), version, listed or "", "")).encode()


def _encode_labels(labels: Sequence[str] | None) -> str | None:
    """Labels as the tables store them."""
    return None if labels is None else json.dumps(list(labels), ensure_ascii=False)
