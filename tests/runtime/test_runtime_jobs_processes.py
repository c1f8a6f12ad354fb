"""Runs on several processes: the bytes of one process, whatever dies."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from executor_runs import (
    IMAGES,
    SHARD,
    SHARDS,
    descendants,
    disturbed,
    journalled,
    results,
    segment,
    title,
    write_corpus,
)

from multisa.runtime.backends.gpus import Gpu, GpuProbe
from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendUnavailable, BundleError, Interrupted, MultisaError, UsageError
from multisa.runtime.jobs.executors import processes
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.executors.processes import ProcessExecutor
from multisa.runtime.jobs.executors.remote import Message, RemoteExecutor, WorkerHandle
from multisa.runtime.jobs.executors.worker import RemoteError, ShardReport, ShardTask, ShardWorker, WorkerInfo
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.stages import PipelineConfig
from multisa.runtime.progress import log

TWO = partial(ProcessExecutor, processes=2)


def kill_one() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_two_processes_write_what_one_writes(
    corpus: Path, bundle: Bundle, tmp_path: Path, alone: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    summary = segment(corpus, tmp_path / "two", bundle, TWO)
    assert results(tmp_path / "two") == alone
    assert sorted(journalled(tmp_path / "two")) == list(range(SHARDS))
    assert (summary.done_now, summary.failures, summary.failure_kinds) == (IMAGES - 3, 3, {"decode": 3})
    assert {"read", "decode", "encode", "commit"} <= set(summary.stage_seconds)
    said = capfd.readouterr().err
    assert said.count("segmenter: onnxruntime-cpu") == 1
    assert said.count("0007.png: not an image") == 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing(
    corpus: Path, bundle: Bundle, tmp_path: Path, alone: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    summary = segment(corpus, tmp_path / "two", bundle, disturbed(TWO, 3, kill_one))
    assert results(tmp_path / "two") == alone
    assert sorted(journalled(tmp_path / "two")) == list(range(SHARDS))
    assert summary.done_now == IMAGES - 3
    assert "died at shard" in capfd.readouterr().err
    assert not list((tmp_path / "two/.multisa/tmp").glob("*"))


@pytest.mark.slow
def test_processes_that_are_killed_before_the_first_shard_lose_nothing(
    corpus: Path, bundle: Bundle, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    def kill_all() -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    segment(corpus, tmp_path / "two", bundle, disturbed(TWO, 0, kill_all))
    assert results(tmp_path / "two") == alone


def test_processes_that_would_not_write_the_same_are_refused() -> None:
    numpy = {"version of numpy": "2.0", "machine": "x86_64"}
    executor = Two({"process 1": numpy, "process 2": {**numpy, "version of numpy": "2.1"}})
    with pytest.raises(UsageError, match=r"process 1 and process 2 .*\(version of numpy: 2\.0 and 2\.1\)"):
        executor._handle_messages()


def test_the_threads_of_all_are_added_up_and_the_cores_of_a_machine_count_once() -> None:
    executor = Two({"process 1": {}, "process 2": {}})
    executor._handle_messages()
    width = executor.concurrency()
    assert [width.threads_of(stage) for stage in ("read", "decode", "commit")] == [4, 6, 2]
    assert (width.workers, width.cores) == (6, 8)


class Two(RemoteExecutor[WorkerHandle]):
    """Those who only say what they are."""

    def __init__(self, identities: Mapping[str, Mapping[str, str]]) -> None:
        job = make_job("segment", "photos", Path("out"), Path("bundle"), BackendRequest(), RunOptions())
        super().__init__(job, RunMonitor("segment"))
        self._are = [
            (WorkerHandle(name), WorkerInfo(identity, {}, "", (), PipelineConfig(2, 3), "host", 8))
            for name, identity in identities.items()
        ]

    def _open(self) -> None:
        """They are there."""

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def _workers(self) -> list[WorkerHandle]:
        return [worker for worker, _ in self._are]

    def _send(self, worker: WorkerHandle, task: ShardTask) -> None:
        raise AssertionError(f"{worker.name} was given {task}")

    def _drop(self, worker: WorkerHandle) -> None:
        raise AssertionError(f"{worker.name} was dropped")

    def _receive(self) -> list[tuple[WorkerHandle, Message]]:
        return list(self._are)


def test_processes_that_die_again_and_again_end_the_run(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.wait(0.02):
            for child in multiprocessing.active_children():
                child.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(MultisaError, match=r"process . died \(killed by signal 9.*3 times in a row"):
            segment(corpus, tmp_path / "out", bundle, TWO)
    finally:
        stop.set()
        killer.join()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_where_a_shard_is_done_is_the_error_of_the_run(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    for name, executor in (("one", LocalExecutor), ("two", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "masks").write_text("a file where a folder is to be")
        with pytest.raises(FileExistsError) as raised:
            segment(corpus, tmp_path / name, bundle, executor)
        assert raised.value.filename == str(tmp_path / name / "masks")
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        segment(corpus, tmp_path / "three", bundle, TWO, backend="onnxruntime-cuda")
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_no_process_outlives_the_one_that_leads(bundle: Bundle, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "photos", 600)
    segment(corpus, tmp_path / "alone", bundle, LocalExecutor)
    out, journal = tmp_path / "out", tmp_path / "out/.multisa/journal.jsonl"
    options = ["--shard-size", str(SHARD), "--writer", "masks,coco", "--report-images", "0", "--num-processes", "2"]
    command = [sys.executable, "-m", "multisa.runtime.cli.main", "segment", corpus, "-o", out, "--bundle", bundle.path]
    leader = subprocess.Popen([*map(str, command), *options], stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        while not journal.exists() or not journal.stat().st_size:
            assert leader.poll() is None
            time.sleep(0.002)
        others = descendants(leader.pid)
    finally:
        leader.kill()
        leader.wait()
    assert len(others) >= 2
    end = time.monotonic() + 10
    while alive := [process for process in others if title(process)]:
        assert time.monotonic() < end, alive
        time.sleep(0.02)
    before = journalled(out)
    assert 0 < len(before) < 600 // SHARD
    segment(corpus, out, bundle, TWO)
    assert journalled(out)[: len(before)] == before
    assert sorted(journalled(out)) == list(range(600 // SHARD))
    assert results(out) == results(tmp_path / "alone")


@pytest.mark.slow
def test_ctrl_c_lets_the_shards_in_hand_be_finished(
    corpus: Path, bundle: Bundle, tmp_path: Path, alone: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:  # as a terminal does: all its processes
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(MultisaError, match=r"interrupted: [1-9]") as raised:
        segment(corpus, tmp_path / "out", bundle, disturbed(TWO, 3, interrupt))
    assert raised.value.exit_code == 130
    assert " died" not in capfd.readouterr().err
    # Three, what was under way in both, and one that was handed out before the signal was heard.
    assert 3 <= len(journalled(tmp_path / "out")) <= 8
    segment(corpus, tmp_path / "out", bundle, TWO)
    assert sorted(journalled(tmp_path / "out")) == list(range(SHARDS))
    assert results(tmp_path / "out") == alone


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1"]), ("", []), ("3,1", ["3", "1"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_each_process_gets_one_of_the_gpus_that_are_seen(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    gpus = () if visible == "" else (Gpu("NVIDIA Test", "sm89"),) * 2
    monkeypatch.setattr(processes, "probe_gpus", lambda: GpuProbe("13.2", gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.visible_gpus() == expected


class OwnError(BundleError):
    """A subclass that other processes cannot import."""

    exit_code = 9


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a wrong value"),
        BundleError("altered"),
        BackendUnavailable("no driver", remedy="install it"),
        Interrupted("stopped", signal=15),
        OSError(28, "No space left on device", "/full/disk"),
        PermissionError(13, "Permission denied", "/closed"),
    ],
)
def test_an_error_crosses_processes_as_it_is(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(RemoteError.of(error))).exception()
    assert type(again) is type(error)
    assert str(again) == str(error) and vars(again) == vars(error)
    if isinstance(error, OSError) and isinstance(again, OSError):
        assert (again.errno, again.filename) == (error.errno, error.filename)
    if isinstance(error, MultisaError) and isinstance(again, MultisaError):
        assert again.exit_code == error.exit_code


def test_an_error_that_cannot_cross_becomes_its_nearest_base_class() -> None:
    unpicklable = BackendUnavailable("lost", remedy="check it")
    unpicklable.lock = threading.Lock()  # type: ignore[attr-defined]
    for error, kind in ((OwnError("altered"), BundleError), (unpicklable, BackendUnavailable)):
        again = pickle.loads(pickle.dumps(RemoteError.of(error))).exception()
        assert type(again) is kind and str(again) == str(error)
        assert isinstance(again, MultisaError) and again.exit_code == error.exit_code
    assert again.cause == "lost"  # type: ignore[union-attr]


def test_an_error_of_ours_keeps_its_traceback() -> None:
    try:
        int("x")
    except ValueError as error:
        again = RemoteError.of(error).exception()
    assert isinstance(again, RuntimeError)
    assert 'int("x")' in str(again)


def test_an_out_that_is_not_shared_is_refused(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    worker = ShardWorker(job)
    worker.open()
    answer = worker.run(ShardTask(Shard(0, ()), shared_file=".multisa/tmp/shared-somewhere-else"))
    worker.close()
    assert isinstance(answer, RemoteError)
    with pytest.raises(UsageError, match="expected a folder that all machines share"):
        raise answer.exception()


def test_what_a_worker_logs_while_it_opens_is_reported_and_not_shown(
    corpus: Path, bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    before = log.handlers[:], log.level
    worker = ShardWorker(job)
    info = worker.open()
    worker.close()
    assert isinstance(info, WorkerInfo)
    ((level, text),) = info.messages
    assert level == logging.INFO and text.startswith("segmenter: onnxruntime-cpu")
    assert capfd.readouterr().err == "" and (log.handlers, log.level) == before


def test_what_a_worker_logs_at_a_shard_is_logged_by_the_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    executor = Two({"process 1": {}})
    executor._handle_messages()
    (worker,) = executor._workers()
    shard = Shard(0, ())
    worker.shards[0] = shard
    messages = [(logging.WARNING, "a.png: trying a second time"), (logging.DEBUG, "not shown")]
    report = ShardReport(ShardResult(0, 0, 0, 0, ""), (), messages=messages)
    executor._are = [(worker, report)]
    executor._handle_messages(lambda result: None)
    assert capsys.readouterr().err == "a.png: trying a second time\n"


def test_nothing_is_opened_before_an_executor_is_entered(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    before = resources()
    executors = [LocalExecutor(job, RunMonitor("segment")), TWO(job, RunMonitor("segment"))]
    assert resources() == before and not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="in a with statement"):
        executors[0].fingerprint()
    with executors[0] as executor:
        assert executor.fingerprint()
    assert resources() == before
