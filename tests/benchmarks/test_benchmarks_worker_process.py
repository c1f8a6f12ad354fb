"""WorkerProcess: answers, errors, limits, and what happens when the process dies."""

import os
import signal
import time

import pytest

from multisa.benchmarks.worker_process import WorkerFailedError, WorkerProcess
from multisa.runtime.errors import BackendUnavailable


class Subject:
    """Served by the worker process."""

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise BackendUnavailable("nothing is there", remedy="install it")
        if start > 100:
            import a_package_that_does_not_exist  # noqa: F401
        self.total, self.held = start, b""

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def fail(self) -> None:
        raise ValueError("as asked\nwith more")

    def hold(self, mib: int) -> None:
        self.held = b"x" * (mib << 20)

    def cpus(self) -> int:
        return len(os.sched_getaffinity(0))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_calls_run_there_one_after_the_other() -> None:
    with WorkerProcess(Subject, 5) as worker:
        assert worker.pid != os.getpid()
        assert (worker.call("add", 2), worker.call("add", 3)) == (7, 10)
        assert worker.start_seconds > 0


def test_an_error_is_raised_and_the_worker_survives(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerProcess(Subject) as worker:
        with pytest.raises(WorkerFailedError, match=r"^ValueError: as asked$"):
            worker.call("fail")
        assert worker.call("add", 1) == 1
    assert "Traceback" in capfd.readouterr().err  # an unexpected error shows its traceback


@pytest.mark.parametrize(
    ("start", "reason"), [(-1, "nothing is there"), (101, "a_package_that_does_not_exist is not installed")]
)
def test_one_that_cannot_start_says_why(start: int, reason: str) -> None:
    with pytest.raises(WorkerFailedError, match=reason):
        WorkerProcess(Subject, start)


def test_a_dead_worker_is_an_error_and_no_hang() -> None:
    with WorkerProcess(Subject) as worker:
        with pytest.raises(WorkerFailedError, match="its process was killed by signal 9"):
            worker.call("die")
        with pytest.raises(WorkerFailedError, match="signal 9"):
            worker.call("add", 1)


def test_peak_memory_is_its_own() -> None:
    with WorkerProcess(Subject) as worker:
        before = worker.peak_mib
        worker.call("hold", 64)
        assert before is not None and worker.peak_mib is not None
        assert 60 < worker.peak_mib - before < 90


def test_cpus_limit_it() -> None:
    with WorkerProcess(Subject, cpus=1) as worker:
        assert worker.call("cpus") == 1
    assert len(os.sched_getaffinity(0)) >= 1


def test_closing_does_not_wait_for_a_hanging_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multisa.benchmarks.worker_process._EXIT_SECONDS", 0.2)
    start = time.monotonic()
    with WorkerProcess(Subject) as worker:
        assert worker.pid
        os.kill(worker.pid, signal.SIGSTOP)
    assert time.monotonic() - start < 20


def test_no_answer_in_time_kills_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerProcess(Subject) as worker:
        monkeypatch.setattr("multisa.benchmarks.worker_process._ANSWER_SECONDS", 0.2)
        with pytest.raises(WorkerFailedError, match=r"no answer within 0 s; the process was killed"):
            worker.call("sleep", 60.0)
        with pytest.raises(WorkerFailedError, match="signal 9"):
            worker.call("add", 1)
