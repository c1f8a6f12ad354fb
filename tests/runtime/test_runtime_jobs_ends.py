"""How runs end, and what they leave where they do not begin."""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import cut_at, public_bytes, records, run_segment

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.monitor import stop_on_signals
from multisa.runtime.jobs.output import JOURNAL, LOCK
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.progress import log


def test_the_executor_ends_before_the_lock_and_the_journal_are_let_go(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C in the middle of a commit: it is ended, and counted, by the run that holds OUT."""
    out, seen = tmp_path / "out", []
    leave, append, begun = LocalExecutor.__exit__, Journal.append, threading.Event()

    def note(executor: LocalExecutor, *arguments: Any) -> None:
        leave(executor, *arguments)
        with (out / LOCK).open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append((out / JOURNAL).read_bytes().count(b"\n"))

    def slow(journal: Journal, result: ShardResult) -> None:
        begun.set()
        time.sleep(0.1)
        append(journal, result)

    def interrupt(executor: LocalExecutor, shards: Iterator[Shard], committed: Callable[[ShardResult], None]) -> None:
        executor.worker.start(next(shards), committed)
        assert begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalExecutor, "__exit__", note)
    monkeypatch.setattr(LocalExecutor, "run", interrupt)
    monkeypatch.setattr(Journal, "append", slow)
    with pytest.raises(KeyboardInterrupt):
        run_segment(photos, out, bundle, shard_size=2)
    assert seen == [1]


def test_what_cannot_be_used_makes_no_folder(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got the backend 'abacus'"):
        run_segment(photos, tmp_path / "out", bundle, request=BackendRequest("abacus"))
    assert not (tmp_path / "out").exists()


def test_shards_that_are_left_undone_are_not_taken_for_done(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalExecutor, "run", lambda *_: None)
    with pytest.raises(MultisaError, match=r"ended early: 0 of 3 shards are done, run the same comm"):
        run_segment(photos, tmp_path / "out", bundle, shard_size=2)
    assert not (tmp_path / "out/labels.jsonl").exists()


def test_a_signal_says_nothing_where_it_interrupts_who_holds_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, said = threading.Lock(), list[tuple[str, bool]]()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            free = lock.acquire(timeout=2)
            said.append((record.getMessage(), free))
            if free:
                lock.release()

    monkeypatch.setattr(log, "handlers", [Listener()])
    with stop_on_signals() as stop:
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    ((message, free),) = said
    assert message.startswith("stopping after the shards in flight") and free


def test_a_third_signal_ends_what_hangs() -> None:
    program = """if True:
    import os, signal, time
    from multisa.runtime.jobs.monitor import stop_on_signals
    with stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=15, check=False)
    assert ended.returncode == 130


def test_a_closed_stderr_fails_no_run(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    program = '"$0" -m multisa.runtime.cli.main segment "$1" -o "$2" --bundle "$3" --max-failures 1 2>&-'
    command = ["sh", "-c", program, sys.executable, str(photos), str(tmp_path / "out"), str(bundle.path)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "out/masks/a.png").is_file()
    assert ended.stdout.startswith("5 images in ")  # nothing of stderr is mixed into it


def test_what_a_commit_that_was_cut_has_left_goes_when_it_is_done_again(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image was done, its shard not counted, and then it cannot be read any more."""
    out = tmp_path / "out"
    cut_at(monkeypatch, 0, before=True)
    with pytest.raises(InterruptedError):
        run_segment(photos, out, bundle)
    monkeypatch.undo()
    assert (out / "masks/a.png").is_file()
    (photos / "a.jpg").unlink()
    assert run_segment(photos, out, bundle, skip_source_check=True).failures == 2
    masks = {path for path in public_bytes(out) if path.startswith("masks/")}
    assert masks == {row["mask"] for row in records(out)} and "masks/a.png" not in masks
