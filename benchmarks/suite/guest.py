"""A contender in a process of its own: its start, its memory and its end are nobody else's.

with Guest(SegmentContender, contender, bundle) as guest:
    guest.call("latencies")

Processes are spawned, never forked: neither CUDA nor threads live through a fork.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from multisa.runtime.errors import MultisaError

INSTALL = 'pip install ".[bench]"'  # what contenders and recipes need
_PATIENCE = 10.0  # seconds for a process to end by itself
_LIMIT = 1800.0  # seconds for one answer: whole lists of photographs, a matrix that is squared


class GuestFailedError(MultisaError):
    """A contender cannot run here; the message is the reason."""


class Guest:
    """An object in another process; `call` runs its methods there, one at a time."""

    def __init__(self, make: Callable[..., object], *arguments: object, cpus: int | None = None) -> None:
        """Start a process that calls make(*arguments); `cpus` limits it to so many processors.

        make and arguments must be importable there, results and arguments of calls be plain values or arrays.
        Raises GuestFailedError where `make` fails.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, cpus), daemon=True)
        start = time.perf_counter()
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    @classmethod
    def started_twice(cls, make: Callable[..., object], *arguments: object) -> Self:
        """The second of two: the first has brought the files into memory, as everyone's then are."""
        cls(make, *arguments).close()
        return cls(make, *arguments)

    def call(self, name: str, *arguments: object) -> Any:
        """Run a method there and wait for what it returns. Raises GuestFailedError where it fails."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._lost() from None
        return self._answer()

    @property
    def peak_mib(self) -> float | None:
        """The most memory that the process has held at once, in MiB; None where the system does not tell."""
        # Not by getrusage: a process inherits the largest memory of the one that has started it.
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        _, found, rest = status.partition("VmHWM:")
        return round(int(rest.split()[0]) / 1024, 1) if found else None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(_LIMIT):
                self._process.kill()
                raise GuestFailedError(f"did not answer within {_LIMIT:.0f} s and was ended")
            done, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if not done:
            raise GuestFailedError(value)
        return value

    def _lost(self) -> GuestFailedError:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        how = (
            f"was ended by signal {-(code or 0)}"
            if code is not None and code < 0
            else f"ended with exit code {code}"
        )
        return GuestFailedError(f"its process {how}")


def _serve(
    pipe: Connection, make: Callable[..., object], arguments: tuple[object, ...], cpus: int | None
) -> None:
    """In the new process: make the object, then answer calls until the pipe is closed."""
    if cpus is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    with suppress(EOFError, OSError, KeyboardInterrupt):
        try:
            served = make(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is this contender's
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
