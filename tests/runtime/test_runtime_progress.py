"""Progress goes to stderr, as a bar on a terminal and as a line now and then elsewhere."""

import io
import logging
import sys

import pytest

from multisa.runtime import progress as progress_module
from multisa.runtime.progress import Progress, console, log


def test_quiet_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "label") as progress:
        for _ in range(3):
            progress.advance()
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "LINE_INTERVAL", 0.0)
    with Progress(4, "label") as progress:
        progress.advance(2, note="1 failed")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("label: 2/4 images, ") and captured.err.endswith("s left, 1 failed\n")


@pytest.mark.parametrize(
    ("initial", "expected"), [(0, "8/10 images, 0.80/s, 2 s left"), (6, "8/10 images, 0.20/s, 10 s left")]
)
def test_what_was_there_before_has_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], initial: int, expected: str
) -> None:
    timer = iter([100.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(timer))
    with Progress(10, "label", initial=initial) as progress:
        progress.advance(8 - initial)
    assert expected in capsys.readouterr().err


def test_a_bar_that_starts_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "label", initial=3) as progress:
        assert "3/4" in terminal.getvalue()
        progress.advance()
    assert "4/4" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, "label") as progress:
        progress.advance(note="loss 0.1")
        log.info("a remark")
        progress.advance()
    text = terminal.getvalue()
    assert "2/2" in text and "loss 0.1" in text and "a remark\n" in text


def test_a_library_that_configures_the_root_logger_repeats_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with console(quiet=False):
            log.info("one line")
    finally:
        logging.getLogger().removeHandler(handler)
    assert (capsys.readouterr().err.count("one line"), stream.getvalue()) == (1, "")
