"""Processes that are measured: an object served by a process of its own, and a `multisa` command.

    with WorkerProcess(SegmentCandidate, bundle, candidate) as worker:
        worker.call("latencies")

Start-up, memory and crashes of a candidate are its own. Processes are spawned, never forked: neither CUDA nor
threads survive a fork.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from multisa.benchmarks.harness import peak_memory_mib
from multisa.runtime.errors import MultisaError

INSTALL = 'pip install ".[bench]"'  # what candidates and baselines need
_EXIT_SECONDS = 10.0  # for a process to end by itself
_ANSWER_SECONDS = 1800.0  # for one answer: a call may run a whole list of images or square a large matrix
_COMMAND = """
import sys
from multisa.runtime.cli.main import main
try:
    main()
finally:
    from multisa.benchmarks.harness import peak_memory_mib
    print("peak", peak_memory_mib(), file=sys.stderr)
"""


class WorkerFailedError(MultisaError):
    """A candidate cannot run here; the message is the reason."""


class WorkerProcess:
    """An object in another process; `call` runs its methods there, one at a time."""

    def __init__(self, make: Callable[..., object], *arguments: object, cpus: int | None = None) -> None:
        """Start a process that calls make(*arguments); `cpus` limits the number of processors it may use.

        make and arguments must be picklable; arguments and results of calls are plain values or arrays.
        Raises WorkerFailedError where `make` fails.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, cpus), daemon=True)
        start = time.perf_counter()
        self._process.start()
        self.pid = self._process.pid
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    @classmethod
    def started_twice(cls, make: Callable[..., object], *arguments: object) -> Self:
        """Start a process, end it, and start another: all candidates then start from cached files."""
        cls(make, *arguments).close()
        return cls(make, *arguments)

    def call(self, name: str, *arguments: object) -> Any:
        """Run a method there and return its result. Raises WorkerFailedError where it fails."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._died() from None
        return self._answer()

    @property
    def peak_mib(self) -> float | None:
        """Peak resident memory of the process in MiB; None where the system does not have it."""
        return peak_memory_mib(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(_ANSWER_SECONDS):
                self._process.kill()
                raise WorkerFailedError(f"no answer within {_ANSWER_SECONDS:.0f} s; the process was killed")
            done, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not done:
            raise WorkerFailedError(value)
        return value

    def _died(self) -> WorkerFailedError:
        self._process.join(_EXIT_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            return WorkerFailedError(f"its process was killed by signal {-code}")
        return WorkerFailedError(f"its process ended with exit code {code}")


def _serve(pipe: Connection, make: Callable[..., object], arguments: tuple[object, ...], cpus: int | None) -> None:
    """In the new process: make the object, then answer calls until the pipe is closed."""
    if cpus is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    with suppress(EOFError, OSError, KeyboardInterrupt):
        try:
            served = make(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any failure is this candidate's result
            pipe.send((False, _reason(error)))
            return
        pipe.send((True, None))
        while True:
            name, given = pipe.recv()
            try:
                answer = (True, getattr(served, name)(*given))
            except Exception as error:  # noqa: BLE001
                answer = (False, _reason(error))
            pipe.send(answer)


def _reason(error: BaseException) -> str:
    if isinstance(error, MultisaError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: {INSTALL}"
    print("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def run_command(command: str, source: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run `multisa COMMAND SOURCE -o OUT ARGUMENTS` from scratch, without its report page.

    Returns its record (`OUT/.multisa/run.json`) and "peak_mib", None where the system does not have it.
    Raises WorkerFailedError with the command's last line of stderr where it fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    words = [command, str(source), "-o", str(out), "--report-images", "0", *arguments]
    program = [sys.executable, "-c", _COMMAND, *words]
    try:
        done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise WorkerFailedError(f"multisa {command}: killed after {_ANSWER_SECONDS:.0f} s") from None
    lines = done.stderr.splitlines()
    if done.returncode != 0:
        last = next((line for line in reversed(lines) if line.startswith("error:")), "".join(lines[-1:]))
        raise WorkerFailedError(f"multisa {command}: exit code {done.returncode}: {last}")
    record: dict[str, Any] = json.loads((out / ".multisa" / "run.json").read_text(encoding="utf-8"))
    peak = next((line.split()[1] for line in reversed(lines) if line.startswith("peak ")), "None")
    return record | {"peak_mib": None if peak == "None" else float(peak)}
