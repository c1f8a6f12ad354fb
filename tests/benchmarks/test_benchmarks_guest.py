"""A contender in a process of its own: answers, errors, limits, and what is left when it dies."""

import os
import signal
import time

import pytest

from multisa.benchmarks.suite.guest import Guest, GuestFailedError
from multisa.runtime.errors import BackendUnavailable


class Subject:
    """What a guest serves here."""

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

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_calls_run_there_one_after_the_other() -> None:
    with Guest(Subject, 5) as guest:
        assert guest.pid != os.getpid()
        assert (guest.call("add", 2), guest.call("add", 3)) == (7, 10)
        assert guest.start_seconds > 0


def test_an_error_is_said_and_the_guest_lives_on(capfd: pytest.CaptureFixture[str]) -> None:
    with Guest(Subject) as guest:
        with pytest.raises(GuestFailedError, match=r"^ValueError: as asked$"):
            guest.call("fail")
        assert guest.call("add", 1) == 1
    assert "Traceback" in capfd.readouterr().err  # what is nobody's fault but ours is shown whole


@pytest.mark.parametrize(
    ("start", "reason"),
    [(-1, "nothing is there"), (101, "a_package_that_does_not_exist is not installed")],
)
def test_one_that_cannot_start_says_why(start: int, reason: str) -> None:
    with pytest.raises(GuestFailedError, match=reason):
        Guest(Subject, start)


def test_one_that_dies_is_an_error_and_no_hang() -> None:
    with Guest(Subject) as guest:
        with pytest.raises(GuestFailedError, match="its process was ended by signal 9"):
            guest.call("die")
        with pytest.raises(GuestFailedError, match="signal 9"):
            guest.call("add", 1)


def test_peak_memory_is_its_own() -> None:
    with Guest(Subject) as guest:
        before = guest.peak_mib
        guest.call("hold", 64)
        assert before is not None and guest.peak_mib is not None
        assert 60 < guest.peak_mib - before < 90


def test_cpus_limit_it() -> None:
    with Guest(Subject, cpus=1) as guest:
        assert guest.call("cpus") == 1
    assert len(os.sched_getaffinity(0)) >= 1


def test_the_end_does_not_wait_for_a_guest_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multisa.benchmarks.suite.guest._PATIENCE", 0.2)
    start = time.monotonic()
    with Guest(Subject) as guest:
        assert guest.pid
        os.kill(guest.pid, signal.SIGSTOP)
    assert time.monotonic() - start < 20
