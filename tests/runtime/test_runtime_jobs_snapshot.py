"""The snapshot, a run's list of images: names that never meet, shards, and a source that has changed."""

import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.jobs.snapshot import Snapshot, take_snapshot
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem

# Few letters, so that names meet; what a mask is called is among them.
_PART = st.sampled_from(["a", "A", "b", "a.png", "a.jpg", "a.jpg.png", "A.PNG", "a.jpg~1", "a.jpg~1.png"])
_IDS = st.lists(
    st.builds(
        lambda folders, name, end: "/".join([*folders, name + end]),
        st.lists(_PART, max_size=2),
        _PART,
        st.sampled_from([".jpg", ".png", ".JPG", ".tif"]),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


def items_of(*ids: str) -> list[Listed]:
    return [SourceItem(id_, id_, size=10 + i, version="v") for i, id_ in enumerate(ids)]


def names_of(snapshot: Snapshot) -> list[str]:
    return [work.name for work in snapshot.shard(0, snapshot.images).samples]


def make_snapshot(path: Path, listing: Sequence[Listed]) -> Snapshot:
    take_snapshot(path, listing, lambda item: item.labels)
    return Snapshot(path)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (["b.jpg", "a.JPG"], ["b", "a"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        (["A.png", "a.jpg"], ["A.png", "a.jpg"]),
        (["A.jpg", "a.jpg", "b.jpg"], ["A.jpg", "a.jpg~1", "b"]),  # one file on some file systems
        (["\u00fc.jpg", "u\u0308.JPG", "b.jpg"], ["\u00fc.jpg", "u\u0308.JPG~1", "b"]),  # two ways to write it
        (["\u00fc.png/b.jpg", "U\u0308.jpg"], ["\u00fc.png/b", "U\u0308.jpg"]),
        (["Stra\u00dfe.jpg", "strasse.png"], ["Stra\u00dfe.jpg", "strasse.png"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),  # a mask would be named as a folder
        (["A.PNG/x/b.jpg", "a.jpg"], ["A.PNG/x/b", "a.jpg"]),
        (["a.jpg", "a.jpg.png/c.jpg", "a.png/b.jpg"], ["a.jpg~0", "a.jpg.png/c", "a.png/b"]),
        (["a.jpg", "a.jpg.png/c.jpg", "a.jpg~0.png/d.jpg", "a.png/b.jpg"], None),
    ],
)
def test_names(tmp_path: Path, ids: list[str], names: list[str] | None) -> None:
    with make_snapshot(tmp_path / "i", items_of(*ids)) as snapshot:
        assert names_of(snapshot) == (names or ["a.jpg~0~", "a.jpg.png/c", "a.jpg~0.png/d", "a.png/b"])


@settings(max_examples=150, deadline=None)
@given(ids=_IDS)
def test_results_never_meet(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.sqlite"
    with make_snapshot(path, items_of(*ids)) as snapshot:
        masks = [f"{name}.png".casefold() for name in names_of(snapshot)]
    assert len(masks) == len(set(masks)) == len(ids)
    folders = {folder for mask in masks for folder in _folders(mask)}
    assert not folders & set(masks)
    with make_snapshot(path, items_of(*ids)) as again:
        assert [f"{name}.png".casefold() for name in names_of(again)] == masks


def _folders(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]


def test_thousands_of_names_that_meet_are_named_at_once(tmp_path: Path) -> None:
    name = "screenshot"
    variants = ["".join(c.upper() if i >> k & 1 else c for k, c in enumerate(name)) for i in range(1024)]
    with make_snapshot(tmp_path / "i", items_of(*(f"{v}.jpg" for v in variants))) as snapshot:
        assert len({found.casefold() for found in names_of(snapshot)}) == 1024


def test_an_image_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jpg: is in the source twice, expected each image once"):
        make_snapshot(tmp_path / "i", items_of("a.jpg", "b.jpg", "a.jpg"))
    assert not (tmp_path / "i").exists()


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image found"):
        make_snapshot(tmp_path / "i", [Skipped(".a.jpg", "hidden"), OtherFiles(3)])


def test_shards_and_retries(tmp_path: Path) -> None:
    listing = [*items_of(*(f"{i}.jpg" for i in range(7))), Skipped("x", "hidden"), OtherFiles(2)]
    with make_snapshot(tmp_path / "i", listing) as snapshot:
        assert list(snapshot.shards(3)) == [(0, 3), (1, 3), (2, 1)]
        assert [work.index for work in snapshot.shard(1, 3).samples] == [3, 4, 5]
        assert (snapshot.images, snapshot.other_files) == (7, OtherFiles(2))
        assert list(snapshot.skipped_entries(9)) == [Skipped("x", "hidden")]
        assert snapshot.add_retries([1, 2, 4, 6], 3) == 2
    with Snapshot(tmp_path / "i") as snapshot:
        assert list(snapshot.shards(3))[3:] == [(3, 3), (4, 1)]
        assert [work.index for work in snapshot.shard(4, 3).samples] == [6]
        assert snapshot.add_retries([6], 3) == 1
        assert [work.index for work in snapshot.shard(5, 3).samples] == [6]


def test_each_image_belongs_to_the_shard_it_was_tried_in_last(tmp_path: Path) -> None:
    with make_snapshot(tmp_path / "i", items_of(*(f"{i}.jpg" for i in range(7)))) as snapshot:
        snapshot.add_retries([1, 2, 4, 6], 3)
        snapshot.add_retries([2, 6], 3)
        shards = [number for number, _ in snapshot.shards(3)]
        indices = {n: [work.index for work in snapshot.shard(n, 3).samples] for n in shards}
        assert indices == {0: [0], 1: [3, 5], 2: [], 3: [1, 4], 4: [], 5: [2, 6]}
        for number, works in indices.items():
            assert {snapshot.shard_of(index, 3) for index in works} <= {number}


def test_shards_may_be_let_go_of_in_another_thread(tmp_path: Path) -> None:
    """As the collector does with a run that was stopped."""
    with make_snapshot(tmp_path / "i", items_of("a.jpg", "b.jpg")) as snapshot:
        snapshot.add_retries([0, 1], 1)
        shards = snapshot.shards(1)
        assert [next(shards) for _ in range(3)] == [(0, 1), (1, 1), (2, 1)]
        with ThreadPoolExecutor(1) as other:
            other.submit(shards.close).result()


def test_millions_of_retries_are_searched_and_not_read_through(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "i", items_of("a.jpg")).__exit__(None, None, None)
    with closing(sqlite3.connect(tmp_path / "i")) as rows:
        for where in ("i = 1", "shard = 1", "i = 1 AND shard > 1"):
            plan = rows.execute(f"EXPLAIN QUERY PLAN SELECT i, shard FROM retries WHERE {where}").fetchall()
            assert all(step[-1].startswith("SEARCH") for step in plan), (where, plan)


def test_works_come_back_as_they_were_listed(tmp_path: Path) -> None:
    item = SourceItem("tiefe/ä b\n.jpg", "worker 3", -1, "etag", ("red thing",))
    with make_snapshot(tmp_path / "i", [item, SourceItem("b.jpg", "b", 0, labels=())]) as snapshot:
        first, second = snapshot.shard(0, 2).samples
    assert replace(first.item, labels=("red thing",)) == item
    assert (first.labels, second.labels, second.index) == (("red thing",), (), 1)


THEN = items_of("a.jpg", "b.jpg", "c.jpg", "d.jpg")
NEW = SourceItem("new.jpg", "new.jpg", 5, "v")
OTHER_B = SourceItem("b.jpg", "b.jpg", 11, "later")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (THEN, ""),
        ([*THEN, OtherFiles(1), Skipped("z", "hidden")], ""),
        ([*THEN, NEW], "1 added (new.jpg)"),
        (THEN[1:], "1 removed (a.jpg)"),
        (THEN[:1], "3 removed (b.jpg, c.jpg, d.jpg)"),
        ([THEN[0], OTHER_B, *THEN[2:]], "1 changed (b.jpg)"),
        ([OTHER_B, NEW], "1 added (new.jpg); 3 removed (a.jpg, c.jpg, d.jpg); 1 changed (b.jpg)"),
        (items_of("e.jpg", "f.jpg", "g.jpg", "h.jpg"), "4 added (e.jpg, f.jpg, g.jpg, ...); 4 removed"),
        (THEN[::-1], "another order, or other labels"),
        ([replace(THEN[0], labels=("x",)), *THEN[1:]], "another order, or other labels"),
    ],
)
def test_a_changed_source_is_told(tmp_path: Path, now: list[Listed], said: str) -> None:
    with make_snapshot(tmp_path / "i", THEN) as snapshot:
        difference = snapshot.difference(lambda: now)
    assert difference.startswith(said) and bool(difference) == bool(said)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (THEN, ""),
        ([THEN[0], OTHER_B, *THEN[2:]], ""),
        ([THEN[0], *THEN[2:]], ""),  # it will fail again
        ([THEN[0], THEN[3], THEN[2]], "another order, or other labels"),
        ([replace(THEN[0], labels=("x",)), *THEN[2:]], "another order, or other labels"),
        ([THEN[0], THEN[0], *THEN[2:]], "another order, or other labels"),
        ([replace(THEN[0], size=99), OTHER_B, *THEN[2:]], "1 changed (a.jpg)"),
        ([*THEN, NEW], "1 added (new.jpg)"),
        ([replace(THEN[0], labels=("x",)), OTHER_B, *THEN[2:]], "another order, or other labels"),
        ([OTHER_B, THEN[0], *THEN[2:]], "another order, or other labels"),
    ],
)
def test_only_the_images_that_are_tried_again_may_have_changed(tmp_path: Path, now: list[Listed], said: str) -> None:
    with make_snapshot(tmp_path / "i", THEN) as snapshot:
        assert snapshot.accept_changes(lambda: now, [1]) == said
        b = snapshot.shard(0, 4).samples[1].item
        assert b.version == ("later" if not said and OTHER_B in now else "v")
        if not said:
            assert snapshot.difference(lambda: now) == ""
        else:
            assert snapshot.difference(lambda: THEN) == ""


@pytest.mark.parametrize("content", [b"", b"no database", None])
def test_what_is_not_a_snapshot(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "snapshot.sqlite"
    if content is None:
        sqlite3.connect(path).execute("CREATE TABLE facts (key, value)").connection.close()
    else:
        path.write_bytes(content)
    with pytest.raises(MultisaError, match=r"expected the list of a run's images: start over with --over"):
        Snapshot(path)


def test_a_snapshot_that_was_being_written_is_none(tmp_path: Path) -> None:
    def cut() -> "list[Listed]":
        yield from items_of("a.jpg")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_snapshot(tmp_path / "i", cut(), lambda item: None)
    assert not (tmp_path / "i").exists() and [p.name for p in tmp_path.iterdir()] == ["i.tmp"]
    make_snapshot(tmp_path / "i", items_of("b.jpg")).__exit__(None, None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
