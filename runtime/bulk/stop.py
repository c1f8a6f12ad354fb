"""Ctrl-C and SIGTERM: the first lets the shards in hand be finished, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from multisa.runtime.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether, and why, no further shard shall be begun."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.too_many_failures = False

    def __bool__(self) -> bool:
        return self.signal is not None or self.too_many_failures


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request, and a second one into KeyboardInterrupt.

    Only a program's main thread can handle signals; elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number
        say("stopping: the shards in hand are finished first; once more to stop at once, nothing is lost")

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
