"""Errors of worker processes: what the coordinator raises has their class, text, attributes and exit code."""

import pickle

import pytest

from multisa.benchmarks.compare import RegressionError
from multisa.runtime import errors
from multisa.runtime.errors import BackendUnavailable, ImageError, Interrupted, MultisaError, UsageError
from multisa.runtime.jobs.executors.worker import RemoteError

ARGUMENTS = {
    BackendUnavailable: (("no driver",), {"remedy": "install it"}),
    Interrupted: (("stopped",), {"signal": 15}),
}


CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MultisaError)]


def received(error: BaseException) -> Exception:
    """What the coordinator raises for what a worker raised."""
    remote = RemoteError.of(error)
    answer: RemoteError = pickle.loads(pickle.dumps(remote))
    return answer.exception()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_crosses_processes(kind: type[MultisaError]) -> None:
    positional, named = ARGUMENTS.get(kind, (("a.jpg: got x, expected y",), {}))
    error = kind(*positional, **named)
    again = received(error)
    assert isinstance(again, MultisaError) and type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert again.exit_code == error.exit_code


def test_attributes_cross_processes() -> None:
    unavailable = received(BackendUnavailable("no driver", remedy="install it"))
    assert isinstance(unavailable, BackendUnavailable)
    assert (unavailable.cause, unavailable.remedy) == ("no driver", "install it")
    assert str(unavailable) == "no driver: install it" and unavailable.exit_code == 5
    assert str(BackendUnavailable("no driver")) == "no driver" and BackendUnavailable("no driver").remedy == ""
    interrupted = received(Interrupted("stopped", signal=15))
    assert isinstance(interrupted, Interrupted) and interrupted.exit_code == 143


def test_subclasses_cross_processes() -> None:
    """One of another package as it is; one that others cannot import as its base class, with its exit code."""

    class Local(Interrupted):
        def __init__(self) -> None:
            super().__init__("stopped here", signal=2)

    slower = received(RegressionError("slower"))
    assert type(slower) is RegressionError and (str(slower), slower.exit_code) == ("slower", 3)
    local = received(Local())
    assert type(local) is Interrupted and (str(local), local.exit_code) == ("stopped here", 130)


def test_a_text_of_any_characters_crosses_processes() -> None:
    """File names need not be UTF-8."""
    for text in ("", "b\udcff.jpg: got x\nand y", "\u65e5\u672c"):
        assert str(received(ImageError(text))) == text
    assert received(UsageError()).args == ("",)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "a"),
            FileNotFoundError,
            "[Errno 2] No such file or directory: 'a'",
        ),
        (OSError(28, "No space left on device"), OSError, "[Errno 28] No space left on device"),
        (FileNotFoundError("s3://bucket/a.jpg"), FileNotFoundError, "s3://bucket/a.jpg"),
        (TimeoutError("no answer"), TimeoutError, "no answer"),
    ],
)
def test_errors_of_the_system_keep_their_class(error: OSError, kind: type[OSError], text: str) -> None:
    again = received(error)
    assert type(again) is kind and str(again) == text
    assert isinstance(again, OSError) and (again.errno, again.filename) == (error.errno, error.filename)


@pytest.mark.parametrize("error", [ValueError("got 3"), MemoryError("got 3"), SystemExit("got 3"), KeyError("got 3")])
def test_other_errors_are_a_text_with_the_traceback(error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        again = received(caught)
    assert type(again) is RuntimeError
    first, *lines = str(again).splitlines()
    assert first == f"{type(error).__name__}: {error}, in a worker process:"
    assert lines[0] == "Traceback (most recent call last):" and "raise error" in str(again)
