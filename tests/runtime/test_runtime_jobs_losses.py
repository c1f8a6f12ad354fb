"""Executors whose workers die: what is due to a worker, what to an image, and what ends the run."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from executor_runs import SHARD, journalled, results, segment, write_corpus

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendUnavailable, MultisaError
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.executors.processes import ProcessExecutor
from multisa.runtime.jobs.executors.remote import Message, RemoteExecutor, WorkerDied, WorkerHandle
from multisa.runtime.jobs.executors.worker import RemoteError, ShardReport, ShardTask, WorkerInfo
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.shards import ShardFolder
from multisa.runtime.jobs.snapshot import Sample, Shard
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.stages import PipelineConfig
from multisa.runtime.sources.base import SourceItem

Doing = Callable[[WorkerHandle, ShardTask], ShardReport | RemoteError | WorkerDied]
READY = WorkerInfo({}, {}, "", (), PipelineConfig(1, 1), "host", 2)
BROKEN = RemoteError.of(BackendUnavailable("the device is lost"))


class Scripted(RemoteExecutor[WorkerHandle]):
    """Members that do what the test says; one that is lost is started again."""

    def __init__(self, out: Path, doing: Doing, names: Iterable[str] = ("a", "b")) -> None:
        super().__init__(
            make_job("segment", "photos", out, Path("bundle"), BackendRequest(), RunOptions()), RunMonitor("segment")
        )
        self._doing_it = doing
        self.workers = {name: WorkerHandle(name) for name in names}
        self._next: list[tuple[WorkerHandle, Message]] = [(worker, READY) for worker in self.workers.values()]

    def _open(self) -> None:
        """They are there."""

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def _workers(self) -> list[WorkerHandle]:
        return list(self.workers.values())

    def _send(self, worker: WorkerHandle, task: ShardTask) -> None:
        answer = self._doing_it(worker, task)
        self._next.append((worker, answer))

    def _drop(self, worker: WorkerHandle) -> None:
        del self.workers[worker.name]

    def _receive(self) -> Iterable[tuple[WorkerHandle, Message]]:
        answers, self._next = self._next, []
        for worker, answer in answers:
            if self.workers.get(worker.name) is not worker:
                continue
            if isinstance(answer, WorkerDied):
                self.workers[worker.name] = WorkerHandle(worker.name)
                self._next.append((self.workers[worker.name], READY))
            yield worker, answer


def shards(count: int) -> list[Shard]:
    def work(index: int) -> Sample:
        return Sample(index, SourceItem(f"{index}.png", str(index), -1), str(index), None)

    return [Shard(n, tuple(map(work, range(n * SHARD, n * SHARD + SHARD)))) for n in range(count)]


def done(task: ShardTask) -> ShardReport:
    failed = len(task.failures)
    result = ShardResult(task.shard.number, len(task.shard.samples) - failed, failed, 0, "0" * 64)
    return ShardReport(result, task.failures)


def committed_by(executor: RemoteExecutor[WorkerHandle], count: int = 8) -> list[int]:
    found: list[int] = []
    executor.run(iter(shards(count)), lambda result: found.append(result.shard))
    return sorted(found)


def test_a_member_whose_engine_is_broken_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executor = Scripted(tmp_path, lambda worker, task: BROKEN if worker.name == "a" else done(task))
    assert committed_by(executor) == list(range(8))
    assert list(executor.workers) == ["b"]
    assert capsys.readouterr().err == "a is left out: the device is lost\n"


def test_the_last_member_whose_engine_is_broken_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="the device is lost"):
        committed_by(Scripted(tmp_path, lambda *_: BROKEN))


def test_what_is_no_fault_of_a_member_ends_the_run(tmp_path: Path) -> None:
    full = RemoteError.of(OSError(28, "No space left on device", "/out"))
    executor = Scripted(tmp_path, lambda worker, task: full if worker.name == "a" else done(task))
    with pytest.raises(OSError, match="No space left"):
        committed_by(executor)


@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_an_image_that_ends_whoever_does_it_is_found(tmp_path: Path, names: str) -> None:
    poison = {12, 14, 33}
    deaths: list[int] = []

    def do(worker: WorkerHandle, task: ShardTask) -> ShardReport | WorkerDied:
        left_out = {failure.index for failure in task.failures}
        for work in task.shard.samples:
            if task.progress_file and work.index not in left_out:
                (tmp_path / task.progress_file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / task.progress_file).write_text(str(work.index))
            if work.index in poison - left_out:
                deaths.append(work.index)
                return WorkerDied("killed by signal 11")
        return done(task)

    executor = Scripted(tmp_path, do, names)
    assert committed_by(executor) == list(range(8))
    assert len(deaths) <= 3 * 2 + 2 * 3 and set(deaths) == poison
    assert executor._monitor.failed == 3 and executor._monitor.done == 8 * SHARD - 3
    assert executor._monitor.failure_kinds == {"process": 3}


def test_members_that_are_lost_at_any_image_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(MultisaError, match="3 times in a row without a shard done"):
        committed_by(Scripted(tmp_path, lambda *_: WorkerDied("killed by signal 9")))


def test_a_shard_of_which_any_image_ends_processes_ends_the_run(tmp_path: Path) -> None:
    def do(worker: WorkerHandle, task: ShardTask) -> ShardReport | WorkerDied:
        left_out = {failure.index for failure in task.failures}
        if task.progress_file:
            first = next(work.index for work in task.shard.samples if work.index not in left_out)
            (tmp_path / task.progress_file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / task.progress_file).write_text(str(first))
        return WorkerDied("killed by signal 9")

    with pytest.raises(MultisaError, match="3 times in a row without a shard done"):
        committed_by(Scripted(tmp_path, do), 1)


@pytest.mark.slow
def test_an_image_that_crashes_processes_fails_and_the_run_ends(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "photos", 30)
    segment(corpus, tmp_path / "alone", bundle, LocalExecutor)
    # Python runs this at its start: whoever opens the image is ended, as by a decoder that crashes.
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(
        "import os, sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('0012.png'):\n"
        "        os.kill(os.getpid(), 11)\n"
        "sys.addaudithook(hook)\n"
    )
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "hook"), path])))
    summary = segment(corpus, tmp_path / "two", bundle, partial(ProcessExecutor, processes=2))
    assert (summary.done, summary.failures) == (28, 2)  # the other one is no image
    (failure,) = (
        row
        for row in map(json.loads, (tmp_path / "two/failed.jsonl").read_text().splitlines())
        if row["kind"] == "process"
    )
    assert failure["image"] == "0012.png"
    assert sorted(journalled(tmp_path / "two")) == list(range(6))
    ours, theirs = results(tmp_path / "two"), results(tmp_path / "alone")
    assert set(theirs) - set(ours) == {"masks/0012.png"}
    differ = {name for name in ours if ours[name] != theirs.get(name)}
    assert not [name for name in differ if name.startswith("masks/")]
    shutil.rmtree(tmp_path / "hook")
    segment(corpus, tmp_path / "two", bundle, partial(ProcessExecutor, processes=2))  # nothing is left to be done


def test_nothing_takes_its_name_once_the_run_is_over(tmp_path: Path) -> None:
    guard = ".multisa/tmp/shared-1"
    with ShardFolder(tmp_path, 0, guard) as files:
        (tmp_path / guard).write_bytes(b"")
        files.write("masks/a.png", b"new")
        (tmp_path / guard).unlink()
        with pytest.raises(MultisaError, match="the run that shard 0 belongs to has ended"):
            files.commit()
    assert not (tmp_path / "masks/a.png").exists() and not (tmp_path / ".multisa/parts/files/000000").exists()
    with ShardFolder(tmp_path, 0, guard) as files:
        (tmp_path / guard).write_bytes(b"")
        files.write("masks/a.png", b"new")
        files.commit()
    assert (tmp_path / "masks/a.png").read_bytes() == b"new"
