"""Names of the results of a run: one for each image, none of them twice, whatever the file system."""

import sqlite3
import unicodedata

from multisa.runtime.errors import UsageError

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
