"""How runs end, and what they leave where they do not begin."""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_runs import run_segment

from multisa.runtime.bulk.crew import LocalCrew
from multisa.runtime.bulk.folder import JOURNAL, LOCK
from multisa.runtime.bulk.inventory import Shard
from multisa.runtime.bulk.journal import Journal, ShardResult
from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.choice import EngineRequest
from multisa.runtime.errors import UsageError


def test_the_crew_ends_before_the_lock_and_the_journal_are_let_go(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C in the middle of a commit: it is ended, and counted, by the run that holds OUT."""
    out, seen = tmp_path / "out", []
    leave, append, begun = LocalCrew.__exit__, Journal.append, threading.Event()

    def note(crew: LocalCrew, *arguments: Any) -> None:
        leave(crew, *arguments)
        with (out / LOCK).open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append((out / JOURNAL).read_bytes().count(b"\n"))

    def slow(journal: Journal, result: ShardResult) -> None:
        begun.set()
        time.sleep(0.1)
        append(journal, result)

    def interrupt(crew: LocalCrew, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        crew._worker.start(next(shards), committed)
        assert begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalCrew, "__exit__", note)
    monkeypatch.setattr(LocalCrew, "do", interrupt)
    monkeypatch.setattr(Journal, "append", slow)
    with pytest.raises(KeyboardInterrupt):
        run_segment(photos, out, bundle, shard_size=2)
    assert seen == [1]


def test_what_cannot_be_used_makes_no_folder(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got the engine 'abacus'"):
        run_segment(photos, tmp_path / "out", bundle, request=EngineRequest("abacus"))
    assert not (tmp_path / "out").exists()
