"""Runs steps one after the other: a log for each, a record after each, and what is done is not done again.

    runner = Runner(output, environment, stamp="commit")
    code = runner.run(steps)

Exit codes, of a step's commands and of a run: 0 done, 3 a gate failed, 5 what is needed is not here, else 1.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from multisa.runtime.errors import BackendUnavailable, ParityError
from multisa.runtime.files import write_json_atomically

DONE, GATE, ABSENT, FAILED, LEFT_OUT = "done", "gate failed", "not here", "failed", "left out"
_OUTCOMES = {0: DONE, ParityError.exit_code: GATE, BackendUnavailable.exit_code: ABSENT}
FAILURE = 1  # exit code
STEPS_FILE, LOGS = "steps.json", "logs"
_FORMAT = 1
_TAIL_BYTES, _REASON_CHARACTERS = 8192, 400
_GRACE = 15  # seconds that an interrupted command has to end by itself


@dataclass(frozen=True)
class Command:
    """One process; its output goes to the step's log, standard output to `output` where that is given."""

    arguments: tuple[str, ...]
    output: Path | None = None


@dataclass(frozen=True)
class LeftOut:
    """Why a step is not for this machine or these options."""

    reason: str


Commands = Sequence[Command] | LeftOut


@dataclass(frozen=True)
class Step:
    """One line of the report. `commands` is called when its turn comes: it may read what others wrote."""

    name: str  # also of the log
    what: str
    commands: Callable[[], Commands]
    is_needed: bool = False  # nothing after it makes sense without it
    is_always_run: bool = False  # cheap, and what it says may change
    leaves: tuple[Path, ...] = ()  # without these it is not done, whatever the record says
    writes: tuple[Path, ...] = ()  # files and folders: removed before it runs, so that what is there is new
    engine: str = ""  # which it shows to be right on the GPU
    depends_on: tuple[Path, ...] = ()  # files: done with others of them is not done


@dataclass(frozen=True)
class Row:
    """What came out of one step."""

    name: str
    what: str
    outcome: str
    reason: str = ""  # of everything but DONE
    exit_code: int = 0
    seconds: float = 0.0
    log: str = ""
    digest: str = ""  # of the commands, the sources and what the step depends on


class Runner:
    """Keeps DIR/steps.json and DIR/logs; a step that is done there with the same digest is skipped."""

    def __init__(self, output: Path, environment: Callable[[], Mapping[str, str]], *, stamp: str) -> None:
        """`environment` gives the variables of the commands; `stamp` tells the state of the sources."""
        self._output, self._environment, self._stamp = output, environment, stamp
        self._before = {row.name: row for row in read_rows(output)}
        self._planned = 0
        self.rows: list[Row] = []
        self.ended_by: Row | None = None  # the needed step that was not done

    def run(self, steps: Sequence[Step]) -> int:
        """Run them, and return the exit code; a needed step that is not done is the last."""
        self._planned = len(steps)
        for place, step in enumerate(steps, 1):
            print(f"[{place:2}/{len(steps)}] {step.name:30} ", end="", flush=True)
            row, is_new = self._run_step(step)
            self.rows.append(row)
            self._save()
            print(_line(row, is_new), flush=True)
            if step.is_needed and row.outcome != DONE:
                self.ended_by = row
                return row.exit_code if row.outcome == ABSENT else FAILURE
        return exit_code(self.rows, [step.name for step in steps if step.engine])

    def outdated(self, steps: Sequence[Step]) -> frozenset[Path]:
        """What steps write that this run did not come to, or left out: it is of an earlier run, if any."""
        shown = {row.name for row in self.rows if row.outcome != LEFT_OUT}
        hidden = [step for step in steps if step.name not in shown]
        return frozenset(path for step in hidden for path in (self._log(step), *step.writes))

    def _run_step(self, step: Step) -> tuple[Row, bool]:
        """The row of a step, and whether it was run now."""
        commands = step.commands()
        if isinstance(commands, LeftOut):
            return Row(step.name, step.what, LEFT_OUT, commands.reason), True
        digest = self._digest(step, commands)
        before = self._before.get(step.name)
        is_done = before and (before.outcome, before.digest) == (DONE, digest)
        if before and is_done and not step.is_always_run and all(path.exists() for path in step.leaves):
            return before, False
        log = self._log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        if before:  # where this is cut off, what it leaves is not taken for what was recorded
            del self._before[step.name]
            self._save()
        with log.open("w", encoding="utf-8") as text:
            code = _remove(step.writes, text)
            for command in commands:
                code = code or run_command(command, text, self._environment())
        missing = [str(path) for path in step.leaves if not path.exists()]
        if missing and not code:
            code = FAILURE
            with log.open("a", encoding="utf-8") as text:
                text.write(f"error: ended without {', '.join(missing)}\n")
        outcome = _OUTCOMES.get(code, FAILED)
        row = Row(
            step.name,
            step.what,
            outcome,
            "" if outcome == DONE else last_line(log),
            code,
            round(time.monotonic() - start, 1),
            f"{LOGS}/{log.name}",
            digest,
        )
        return row, True

    def _log(self, step: Step) -> Path:
        return self._output / LOGS / f"{step.name}.log"

    def _digest(self, step: Step, commands: Sequence[Command]) -> str:
        told = [self._stamp, *(f"{command.arguments} {command.output}" for command in commands)]
        told += [path.read_text(encoding="utf-8") for path in step.depends_on if path.is_file()]
        return hashlib.sha256("\0".join(told).encode()).hexdigest()

    def _save(self) -> None:
        """Write all that is known: the rows of now, then those of before that have not been reached."""
        reached = {row.name for row in self.rows}
        rows = [*self.rows, *(row for name, row in self._before.items() if name not in reached)]
        value = {
            "format": _FORMAT,
            "sources": self._stamp,
            "steps_planned": self._planned,
            "steps_reached": len(self.rows),
            "steps": [asdict(row) for row in rows],
        }
        write_json_atomically(self._output / STEPS_FILE, value)


def read_rows(output: Path) -> list[Row]:
    """The rows of DIR/steps.json; none where it is not there, or not one that this version wrote."""
    try:
        value: Any = json.loads((output / STEPS_FILE).read_text(encoding="utf-8"))
        return [Row(**row) for row in value["steps"]] if value["format"] == _FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):  # then everything is done again
        return []


def exit_code(rows: Sequence[Row], engines: Sequence[str]) -> int:
    """Of a whole run: 3 where a gate failed, 1 where a step did, 5 where none of the `engines` steps ran.

    In this order: a wrong answer is the gravest, and not to be hidden by what else there is.
    """
    outcomes = {row.name: row.outcome for row in rows}
    if GATE in outcomes.values():
        return ParityError.exit_code
    if FAILED in outcomes.values():
        return FAILURE
    if engines and not any(outcomes.get(name) == DONE for name in engines):
        return BackendUnavailable.exit_code
    return 0


def _remove(paths: Sequence[Path], log: TextIO) -> int:
    """Remove files and folders, of a link the link alone; the exit code, 1 where one cannot be removed."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.write(f"error: {error.filename or path}: cannot be removed: {error.strerror}; remove it\n")
            return FAILURE
    return 0


def run_command(command: Command, log: TextIO, environment: Mapping[str, str]) -> int:
    """Run one command to its end and return its exit code, 127 where it cannot be started.

    An exception that comes meanwhile, such as Ctrl-C's, ends the command and all that it has started first.
    """
    log.write(f"$ {' '.join(command.arguments)}\n")
    log.flush()
    with command.output.open("w") if command.output else nullcontext(log) as output:
        try:
            process = subprocess.Popen(
                command.arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=dict(environment),
                start_new_session=True,  # so that its children can be ended with it
            )
        except OSError as error:
            log.write(f"error: {command.arguments[0]}: cannot be started: {error.strerror}\n")
            return 127
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code < 0:
        log.write(f"error: ended by {signal.Signals(-code).name}\n")
    return code


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and its children, by force where they take too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def last_line(log: Path) -> str:
    """What a log ends with: its last line that says something, printable and of bounded length."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    text = said[-1].removeprefix("error: ").removeprefix("ERROR: ") if said else "nothing was said"
    return "".join(c if c.isprintable() else " " for c in text)[:_REASON_CHARACTERS]


def _line(row: Row, is_new: bool) -> str:
    """The end of a step's line on the terminal: seconds, outcome, reason."""
    outcome = row.outcome if is_new else f"{row.outcome} before"
    reason = f": {row.reason}" if row.reason else ""
    place = f" ({row.log})" if row.outcome in (FAILED, GATE, ABSENT) else ""
    return f"{row.seconds:8.1f} s  {outcome}{reason}{place}"
