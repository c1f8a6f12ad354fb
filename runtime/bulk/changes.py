"""How the images that a source lists now differ from the frozen list of a run, in words."""

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from multisa.runtime.bulk.failures import NAMED
from multisa.runtime.sources.contract import Listed, SourceItem

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
def beside_frozen(frozen: Path, listing: Iterable[Listed]) -> Iterator[sqlite3.Connection]:
    """A database of a listing, `now`, beside the frozen one; on the disk, and gone when it is closed."""
    with closing(sqlite3.connect("")) as scratch:
        scratch.execute(_NOW)
        items = (item for item in listing if isinstance(item, SourceItem))
        rows = ((e.id, e.place, e.size, e.version, labels_text(e.labels)) for e in items)
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
    some = [row[0] for row in scratch.execute(f"{query} LIMIT {NAMED}")]
    return f"{count} {word} ({', '.join(some)}{', ...' if count > NAMED else ''})" if count else ""


def labels_text(labels: Sequence[str] | None) -> str | None:
    """Labels as the tables keep them."""
    return None if labels is None else json.dumps(list(labels), ensure_ascii=False)


def digested(id_: str, size: int, version: str, listed: str | None) -> bytes:
    """What a digest is made of; listed: the labels in the source, as text."""
    # No field holds a NUL, so these bytes stand for one item only.
    return "\0".join((id_, str(size), version, listed or "", "")).encode()
