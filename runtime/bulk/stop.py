"""Ctrl-C and SIGTERM: the first lets the shards in hand be finished, the second stops at once."""

import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from multisa.runtime.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAID = "stopping: the shards in hand are finished first; once more to stop at once, nothing is lost"


class StopRequest:
    """Whether, and why, no further shard shall be begun."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.too_many_failures = False

    def __bool__(self) -> bool:
        return self.signal is not None or self.too_many_failures


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first signal into a request, a second one into KeyboardInterrupt; a third ends the process.

    Only a program's main thread can handle signals; elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = 0
    # A handler interrupts whoever may hold the lock of the log: what it has to say is said by a thread.
    to_say: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    speaker = threading.Thread(target=_say_all, args=(to_say,), name="signals", daemon=True)

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard > 2:  # something hangs that was to be waited for; as after any kill, nothing is lost
            os._exit(128 + number)
        if heard == 2:
            raise KeyboardInterrupt
        request.signal = number
        to_say.put(_SAID)

    speaker.start()
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        to_say.put(None)
        speaker.join()


def _say_all(messages: "queue.SimpleQueue[str | None]") -> None:
    while (message := messages.get()) is not None:
        say(message)
