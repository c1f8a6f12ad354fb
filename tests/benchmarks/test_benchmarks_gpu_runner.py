"""What the runner of benchmarks/gpu.sh keeps and skips, its exit codes, and how it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.gpu.runner import (
    ABSENT,
    DONE,
    FAILED,
    GATE,
    LEFT_OUT,
    Command,
    LeftOut,
    Runner,
    Step,
    exit_code,
    last_line,
    read_rows,
)


def shell(text: str) -> list[Command]:
    return [Command(("sh", "-c", text))]


def step(name: str, text: str, **options: Any) -> Step:
    return Step(name, f"what {name} does", lambda: shell(text), **options)


def runner(output: Path, stamp: str = "commit") -> Runner:
    output.mkdir(exist_ok=True)
    return Runner(output, lambda: os.environ, stamp=stamp)


def outcomes(rows: list[Any]) -> dict[str, str]:
    return {row.name: row.outcome for row in rows}


def test_each_step_has_a_log_and_a_row_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = runner(tmp_path)
    steps = [
        step("first", "echo out; echo err >&2"),
        # What is on the disk while the second runs has the first.
        step("second", f"cp '{tmp_path}/steps.json' '{tmp_path}/seen.json'"),
    ]
    assert ran.run(steps) == 0
    assert (tmp_path / "logs" / "first.log").read_text().splitlines()[1:] == ["out", "err"]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [row["name"] for row in seen["steps"]] == ["first"]
    assert [row["outcome"] for row in json.loads((tmp_path / "steps.json").read_text())["steps"]] == [
        DONE,
        DONE,
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[ 1/2] first") and first.endswith("done")
    assert second.startswith("[ 2/2] second")


def test_output_of_a_command_can_have_a_file_of_its_own(tmp_path: Path) -> None:
    command = Command(("sh", "-c", "echo result; echo told >&2"), tmp_path / "result.json")
    assert runner(tmp_path).run([Step("one", "", lambda: [command])]) == 0
    assert (tmp_path / "result.json").read_text() == "result\n"
    assert "result" not in (tmp_path / "logs" / "one.log").read_text().splitlines()[1:]


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = tmp_path / "count"
    steps = [step("kept", f"echo x >> '{count}'"), step("repaired", f"test -f '{tmp_path}/there'")]
    assert runner(tmp_path).run(steps) == 1
    (tmp_path / "there").touch()
    again = runner(tmp_path)
    assert again.run(steps) == 0
    assert count.read_text() == "x\n"
    assert outcomes(again.rows) == {"kept": DONE, "repaired": DONE}
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["command", "sources", "file left", "driver", "always", "damaged record"])
def test_what_has_changed_is_done_again(tmp_path: Path, change: str) -> None:
    count, left, depends_on = tmp_path / "count", tmp_path / "left", tmp_path / "driver.json"
    depends_on.write_text("{}")
    text = f"echo x >> '{count}'; touch '{left}'"
    options = {"leaves": (left,), "depends_on": (depends_on,), "is_always_run": change == "always"}
    assert runner(tmp_path).run([step("one", text, **options)]) == 0
    if change == "file left":
        left.unlink()
    if change == "driver":
        depends_on.write_text('{"gpu": "another"}')
    if change == "damaged record":
        (tmp_path / "steps.json").write_text('{"format": 1, "steps": [{"name": 3')
    text += "; true" if change == "command" else ""
    stamp = "another" if change == "sources" else "commit"
    assert runner(tmp_path, stamp).run([step("one", text, **options)]) == 0
    assert count.read_text() == "x\nx\n"


@pytest.mark.parametrize(
    ("code", "outcome", "whole"), [(0, DONE, 0), (3, GATE, 3), (5, ABSENT, 0), (1, FAILED, 1), (2, FAILED, 1)]
)
def test_after_the_driver_a_step_does_not_end_the_run(
    tmp_path: Path, code: int, outcome: str, whole: int
) -> None:
    ran = runner(tmp_path)
    assert ran.run([step("one", f"exit {code}"), step("next", "true")]) == whole
    assert outcomes(ran.rows) == {"one": outcome, "next": DONE}
    assert ran.ended_by is None


@pytest.mark.parametrize(("code", "whole"), [(5, 5), (1, 1), (3, 1), (127, 1)])
def test_a_needed_step_ends_the_run(tmp_path: Path, code: int, whole: int) -> None:
    ran = runner(tmp_path)
    steps = [
        step("one", f"echo 'error: no driver here' >&2; exit {code}", is_needed=True),
        step("next", "true"),
    ]
    assert ran.run(steps) == whole
    assert ran.ended_by is not None and ran.ended_by.reason == "no driver here"
    assert outcomes(read_rows(tmp_path)) == outcomes(ran.rows)
    assert len(ran.rows) == 1


def test_a_wrong_answer_is_the_gravest_and_no_engine_is_not_success(tmp_path: Path) -> None:
    ran = runner(tmp_path)
    ran.run([step("bad", "exit 1"), step("wrong", "exit 3"), step("gone", "exit 5", backend="gone")])
    by_name = {row.name: row for row in ran.rows}
    assert exit_code(ran.rows, ["gone"]) == 3
    assert exit_code([by_name["bad"], by_name["gone"]], ["gone"]) == 1
    assert exit_code([by_name["gone"]], ["gone"]) == 5
    left_out = runner(tmp_path / "other")
    steps = [
        Step("out", "", lambda: LeftOut("no plans"), backend="rtx"),
        step("gone", "exit 5", backend="gone"),
    ]
    assert left_out.run(steps) == 5
    assert outcomes(left_out.rows) == {"out": LEFT_OUT, "gone": ABSENT}
    assert runner(tmp_path / "third").run([*steps, step("ran", "true", backend="ran")]) == 0


def test_a_step_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    ran = runner(tmp_path)
    assert ran.run([step("one", "true", leaves=(tmp_path / "made",))]) == 1
    assert str(tmp_path / "made") in ran.rows[0].reason


def test_what_a_step_writes_is_removed_before_it_runs(tmp_path: Path) -> None:
    """Of a link the link alone: what it leads to is not the step's."""
    folder, file, link, mine = (tmp_path / name for name in ("folder", "file", "link", "mine"))
    for path in (folder, mine):
        path.mkdir()
        (path / "old").touch()
    file.touch()
    link.symlink_to(mine)
    text = f"! test -e '{folder}' && ! test -e '{file}' && ! test -L '{link}'"
    assert runner(tmp_path).run([step("one", text, writes=(folder, file, link, tmp_path / "absent"))]) == 0
    assert (mine / "old").exists()


def test_what_cannot_be_removed_is_told_and_the_step_not_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = runner(tmp_path)
    assert ran.run([step("one", f"touch '{tmp_path}/begun'", writes=(tmp_path / "file" / "inside",))]) == 1
    assert "inside: cannot be removed: Not a directory" in ran.rows[0].reason
    assert not (tmp_path / "begun").exists()


def test_a_step_that_was_cut_off_is_not_taken_for_what_it_did_before(tmp_path: Path) -> None:
    made = tmp_path / "made"
    whole = step("one", f"echo whole > '{made}'", writes=(made,), leaves=(made,))
    assert runner(tmp_path).run([whole]) == 0

    class Cut(RuntimeError):
        pass

    def cut() -> dict[str, str]:
        made.write_text("half")
        raise Cut

    with pytest.raises(Cut):
        Runner(tmp_path, cut, stamp="other sources").run([whole])
    assert runner(tmp_path).run([whole]) == 0
    assert made.read_text() == "whole\n"


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    ran = runner(tmp_path)
    assert ran.run([Step("one", "", lambda: [Command((str(tmp_path / "absent"),))])]) == 1
    assert "cannot be started: No such file" in ran.rows[0].reason


def test_a_command_that_crashes_is_told(tmp_path: Path) -> None:
    ran = runner(tmp_path)
    assert ran.run([step("one", "echo before; kill -SEGV $$")]) == 1
    assert ran.rows[0].reason == "ended by SIGSEGV"


def test_a_reason_is_one_bounded_printable_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\nerror: \x1b[31mred \xff" + b"y" * 1000 + b"\n\n")
    reason = last_line(log)
    assert reason.isprintable() and reason.startswith(" [31mred") and len(reason) == 400
    log.write_bytes(b"")
    assert last_line(log) == "nothing was said"


def test_a_signal_ends_the_command_with_its_children(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom pathlib import Path\n"
        "from multisa.benchmarks.gpu import main\n"
        "from multisa.benchmarks.gpu.runner import Command, Runner, Step\n"
        "signal.signal(signal.SIGTERM, main._on_signal)\n"
        f"output = Path({str(tmp_path)!r})\n"
        "text = f'sleep 60 & echo $! > {output}/child; touch {output}/begun; wait'\n"
        "steps = [Step('done', '', lambda: [Command(('true',))]),\n"
        "         Step('long', '', lambda: [Command(('sh', '-c', text))])]\n"
        "Runner(output, lambda: os.environ, stamp='').run(steps)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "begun").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_running(child))
    assert outcomes(read_rows(tmp_path)) == {"done": DONE}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
