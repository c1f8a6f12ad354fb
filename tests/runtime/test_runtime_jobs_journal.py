"""The journal: what is a line, what is torn, what was altered, and how fast millions of lines are read."""

import errno
import os
import time
from pathlib import Path

import pytest

from multisa.runtime.errors import MultisaError
from multisa.runtime.jobs.journal import Journal, ShardResult


def result(shard: int, images: int = 5, failed: int = 1) -> ShardResult:
    return ShardResult(shard, images, failed, 1000, f"{shard:064x}")


def lines(*shards: int) -> bytes:
    return b"".join(result(shard).line() for shard in shards)


def test_append_and_open_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        assert 0 not in journal and 7 not in journal
        for shard in (7, 0):
            journal.append(result(shard))
        assert 7 in journal and 0 in journal and 3 not in journal
    assert path.read_bytes() == lines(7, 0)
    with Journal(path) as journal:
        assert [shard in journal for shard in (0, 1, 7, 8, 10**9)] == [True, False, True, False, False]
        assert (journal.shards, journal.images, journal.failed, journal.torn) == (2, 10, 2, False)
        assert dict(journal.digests()) == {7: f"{7:064x}", 0: f"{0:064x}"}


def test_a_shard_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(lines(1, 2, 1))
    with Journal(tmp_path / "j") as journal:
        assert (journal.shards, journal.images) == (2, 10)


@pytest.mark.parametrize("cut", range(1, len(lines(3))))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    path.write_bytes(lines(1, 2) + lines(3)[:cut])
    with Journal(path) as journal:
        assert journal.torn and 2 in journal and 3 not in journal
        assert path.read_bytes() == lines(1, 2)
        journal.append(result(3))
    assert path.read_bytes() == lines(1, 2, 3)


@pytest.mark.parametrize(
    "garbage", [b"\0" * len(lines(3)), b"garbage\n", b"\n", b'{"shard": 3}\n', lines(3)[:-2] + b"\n", b"\xff" * 100]
)
def test_garbage_at_the_end_is_cut_off(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(lines(1, 2) + garbage)
    with Journal(path) as journal:
        assert journal.torn and journal.shards == 2
    assert path.read_bytes() == lines(1, 2)


@pytest.mark.parametrize("garbage", [b"garbage\n", b"\n", b'{"shard": 3}\n', lines(3)[:50], lines(3)[1:]])
def test_garbage_in_the_middle_is_told_and_left(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "j"
    content = lines(1, 2) + garbage + lines(4, 5)
    path.write_bytes(content)
    with pytest.raises(MultisaError, match=rf"at byte {len(lines(1, 2))}, expected a line.*--overwrite"):
        Journal(path)
    assert path.read_bytes() == content


def test_garbage_after_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(lines(*range(4000)) + b"torn")
    with Journal(path) as journal:
        assert journal.shards == 4000 and journal.images == 20_000 and journal.torn
    path.write_bytes(lines(*range(2000)) + b"torn\n" + lines(*range(2000, 4000)))
    with pytest.raises(MultisaError, match=f"at byte {len(lines(*range(2000)))}"):
        Journal(path)


def test_a_digest_that_was_altered_is_told(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(lines(1) + lines(2).replace(b"0000002", b'"00\xff"02') + lines(3))
    with pytest.raises(MultisaError, match=r"at byte \d+, expected a line of a journal.*--overwrite"):
        Journal(path)


@pytest.mark.parametrize("taken", [1, 30])
def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:taken]))
    with Journal(tmp_path / "j") as journal:
        journal.append(result(3))
    assert (tmp_path / "j").read_bytes() == lines(3)


def test_a_write_that_fails_raises_its_own_reason_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.write, iter(range(9))

    def broken(descriptor: int, data: bytes) -> int:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, data[:30])

    with Journal(tmp_path / "j") as journal:
        journal.append(result(1))
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(OSError, match="Input/output error") as raised:
            journal.append(result(2))
        monkeypatch.undo()
        assert raised.value.errno == errno.EIO and raised.value.filename == str(tmp_path / "j")
        assert 2 not in journal
        journal.append(result(3))
    assert (tmp_path / "j").read_bytes() == lines(1, 3)


@pytest.mark.slow
def test_two_hundred_thousand_lines_are_read_in_a_moment(tmp_path: Path) -> None:
    """51 million images at the default shard size."""
    path = tmp_path / "j"
    path.write_bytes(lines(*range(200_000)))
    start = time.perf_counter()
    with Journal(path) as journal:
        assert journal.shards == 200_000 and 199_999 in journal
    assert time.perf_counter() - start < 8  # about 0.8 s where nothing else runs
