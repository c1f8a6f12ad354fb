"""Runs that are cut, by whatever, and gone on with: the same bytes as those of a run that was not."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import cut_at, public_bytes, reasons, records, run_label, run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import MultisaError, TooManyFailures, UsageError
from multisa.runtime.jobs.output import JOURNAL, SNAPSHOT
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.sources.folders import FolderSource

Run = Callable[..., RunSummary]
WRITERS = ("masks", "tar", "coco", "cvat", "label-studio", "datumaro")
SOON = 60.0  # seconds


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB of which no more is left than is asked for."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no small disk can be made here: root mounts one")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "batch", "before", "writers"),
    [
        (run_segment, 1, True, WRITERS),
        (run_segment, 3, False, ("masks", "tar")),
        (run_label, 3, True, ("masks", "coco")),
    ],
)
def test_runs_that_are_cut_again_and_again(
    many: Path, bundle: Bundle, tmp_path: Path, run: Run, batch: int, before: bool, writers: tuple[str, ...]
) -> None:
    """With other numbers of threads each time."""
    options = {"shard_size": 4, "writers": writers, "batch": batch}
    run(many, tmp_path / "whole", bundle, workers=1, **options)
    out = tmp_path / "cut"
    for session in itertools.count():
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_at(monkeypatch, session % 3, before=before)
            try:
                run(many, out, bundle, workers=1 + session % 3, readers=1 + session % 4, **options)
            except InterruptedError:
                assert session < 20
            else:
                break
    assert session >= 2
    assert public_bytes(out) == public_bytes(tmp_path / "whole")
    shards = [line.split(b",")[0] for line in (out / JOURNAL).read_bytes().splitlines()]
    assert len(shards) == len(set(shards)) == 8
    assert not list((out / ".multisa/tmp").glob("*"))


@pytest.mark.parametrize("tail", [b'{"shard":', b"garbage\n", b"\0" * 20])
def test_a_torn_journal(
    many: Path, bundle: Bundle, tmp_path: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_segment(many, out, bundle, shard_size=4)
    before = public_bytes(out)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(b"".join(lines[:5]) + tail)
    summary = run_segment(many, out, bundle, shard_size=4)
    assert "the last line of the journal is incomplete: its shard is processed again" in capsys.readouterr().err
    assert 5 <= summary.done_now < 20 and public_bytes(out) == before


def test_a_lost_snapshot_and_a_lost_journal(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(many, out, bundle, shard_size=4)
    before = public_bytes(out)
    (out / JOURNAL).unlink()
    assert run_segment(many, out, bundle, shard_size=4).done_now == 27
    (out / SNAPSHOT).unlink()
    with pytest.raises(MultisaError, match="start over with --overwrite"):
        run_segment(many, out, bundle, shard_size=4)
    assert public_bytes(out) == before


def test_an_image_that_has_vanished(
    many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cut_at(monkeypatch, 1, before=False)
    with pytest.raises(InterruptedError):
        run_segment(many, out, bundle, shard_size=4, workers=1)
    monkeypatch.undo()
    (many / "29.png").unlink()
    with pytest.raises(UsageError, match=r"has changed since the run .* began: 1 removed \(29\.png\)"):
        run_segment(many, out, bundle, shard_size=4)
    assert run_segment(many, out, bundle, shard_size=4, skip_source_check=True).failures == 4
    last = records(out, "failed.jsonl")[-1]
    assert (last["image"], last["kind"]) == ("29.png", "read") and str(tmp_path) not in last["reason"]


@pytest.mark.slow
def test_a_disk_that_has_vanished_fails_no_image(
    many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_segment(many, tmp_path / "whole", bundle, shard_size=4)
    out, reads, read = tmp_path / "out", itertools.count(), FolderSource.read

    def pull_the_plug(source: FolderSource, item: Any) -> bytes:
        if next(reads) == 14:
            many.rename(tmp_path / "unplugged")
            many.mkdir()  # as the place where a disk was mounted is
        return read(source, item)

    monkeypatch.setattr(FolderSource, "read", pull_the_plug)
    with pytest.raises(MultisaError, match=r"folder .*many: .*can no longer be reached .*make it available"):
        run_segment(many, out, bundle, shard_size=4)
    monkeypatch.undo()
    many.rmdir()
    (tmp_path / "unplugged").rename(many)
    run_segment(many, out, bundle, shard_size=4)
    assert public_bytes(out) == public_bytes(tmp_path / "whole")


@pytest.mark.parametrize("room", [0, 48, 96, 160])
def test_a_full_disk(many: Path, bundle: Bundle, tmp_path: Path, small_disk: Path, room: int) -> None:
    """`room` KiB: it is full while images are listed, while shards are written, or at the end."""
    options = {"shard_size": 4, "writers": ("masks", "coco")}
    run_segment(many, tmp_path / "whole", bundle, **options)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(2048 * 1024 - room * 1024 - 8192))
    with pytest.raises(MultisaError, match=r"(No space left on device: free some space|full: check free space)"):
        run_segment(many, small_disk / "out", bundle, **options)
    filler.unlink()
    run_segment(many, small_disk / "out", bundle, **options)
    assert public_bytes(small_disk / "out") == public_bytes(tmp_path / "whole")


def test_a_write_that_fails(many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk that is full in the middle of a line of the journal."""
    out, write = tmp_path / "out", os.write
    run_segment(many, tmp_path / "whole", bundle, shard_size=4)
    calls, rest = itertools.count(), []

    def short(descriptor: int, data: bytes) -> int:
        if data in rest:
            raise OSError(errno.ENOSPC, "No space left on device")
        if data.startswith(b'{"shard"') and next(calls) == 3:
            rest.append(data[30:])
            return write(descriptor, data[:30])
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(
        MultisaError, match=r"journal\.jsonl: No space left on device: free some space, then run the same"
    ):
        run_segment(many, out, bundle, shard_size=4)
    monkeypatch.undo()
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len({len(line) for line in lines}) == 1 and len(lines) >= 3
    run_segment(many, out, bundle, shard_size=4)
    assert public_bytes(out) == public_bytes(tmp_path / "whole")


def test_errors_of_the_source_are_not_taken_for_those_of_the_results(
    many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: FolderSource, item: Any) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(many / "x.png"))

    monkeypatch.setattr(FolderSource, "read", fail)
    with pytest.raises(PermissionError):
        run_segment(many, tmp_path / "out", bundle)


def test_too_many_failures_stop_a_run_which_can_be_gone_on_with(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    for i in range(8, 16):
        (many / f"{i:02d}.png").write_bytes(b"no image")
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_segment(many, whole, bundle, shard_size=2)
    with pytest.raises(TooManyFailures, match=r"of 30 images failed, allowed were 10%: the reasons are in"):
        run_segment(many, out, bundle, shard_size=2, workers=1, readers=1, max_failures="10%")
    done = len((out / JOURNAL).read_bytes().splitlines())
    assert 5 < done < 15
    assert 3 < len(reasons(out)) <= 10 and not (out / "labels.jsonl").exists()
    with pytest.raises(TooManyFailures):  # a limit holds in every session
        run_segment(many, out, bundle, shard_size=2, max_failures="3")
    run_segment(many, out, bundle, shard_size=2, max_failures="50%")
    assert public_bytes(out) == public_bytes(whole)


def test_too_many_failures_at_the_end_leave_a_whole_run(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    summary = run_segment(many, tmp_path / "out", bundle, max_failures="0")  # one shard
    assert summary.failures == 3 and len(records(tmp_path / "out")) == 27


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        ([signal.SIGINT], 130, "interrupted: "),
        ([signal.SIGTERM], 143, "interrupted: "),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted"),
    ],
)
def test_signals(
    many: Path, bundle: Bundle, tmp_path: Path, signals: list[signal.Signals], code: int, said: str
) -> None:
    for i in range(30, 230):
        os.link(many / f"{i % 10 + 10}.png", many / f"{i}.png")
    (many / "14.png").unlink()
    out, size = tmp_path / "out", 3 if len(signals) == 1 else 75  # the shards in hand are to take a while
    command = [sys.executable, "-m", "multisa.runtime.cli.main", "segment", str(many), "-o", str(out)]
    command += ["--bundle", str(bundle.path), "--shard-size", str(size), "--report-images", "0", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        end = time.monotonic() + SOON
        while not (out / JOURNAL).exists() or not (out / JOURNAL).stat().st_size:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        assert process.stderr
        process.send_signal(signals[0])
        heard = "stopping after the shards in flight; interrupt again to stop at once"
        assert any(line.startswith(heard) for line in process.stderr)
        for number in signals[1:]:
            process.send_signal(number)
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(SOON) == code
    assert last.startswith(said)
    done, shards = len((out / JOURNAL).read_bytes().splitlines()), -(-229 // size)
    if len(signals) == 1:
        assert f"{done} of {shards} shards are done, run the same command again to resume" in last
    assert 0 < done < shards and not (out / "labels.jsonl").exists()
    run_segment(many, out, bundle, shard_size=size)
    run_segment(many, tmp_path / "whole", bundle, shard_size=size)
    assert public_bytes(out) == public_bytes(tmp_path / "whole")
