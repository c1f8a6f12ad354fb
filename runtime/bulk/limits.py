"""What a pipeline holds itself to: bytes that wait to be decoded, and images that an engine may refuse."""

import threading

from multisa.runtime.errors import EngineError, EngineUnavailable

# Images in a row that an engine refuses, each of them twice, until it is taken for broken.
MAX_REFUSED = 8
_PATIENCE = 0.2  # seconds between looks at whether the run was stopped


class ByteBudget:
    """Bounds the bytes of files that were read and are not decoded yet; for several threads.

    Whoever decodes needs nothing of it, so what is held is always given back.
    """

    def __init__(self, most: int, stopped: threading.Event) -> None:
        self._most, self._stopped = most, stopped
        self._held = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait for room, or for the end of the run; what is larger than all there is goes alone."""
        with self._changed:
            while self._held and self._held + size > self._most and not self._stopped.is_set():
                self._changed.wait(_PATIENCE)
            self._held += size

    def change(self, difference: int) -> None:
        """Give back (below 0), or note that a file was larger than its source has said."""
        with self._changed:
            self._held += difference
            self._changed.notify_all()


class EngineHealth:
    """Tells images that an engine cannot take from an engine that cannot be used any more."""

    def __init__(self) -> None:
        self._refused = 0
        self._lock = threading.Lock()

    def works(self) -> None:
        """Note that an image has passed."""
        with self._lock:
            self._refused = 0

    def refuses(self, image: str, error: EngineError) -> None:
        """Note that an image was refused twice. Raises EngineUnavailable where that is not due to images.

        A device that is lost refuses all that is left, which must not become a failure of each image.
        """
        with self._lock:
            self._refused += 1
            broken = self._refused >= MAX_REFUSED
        if broken:
            raise EngineUnavailable(
                f"{error} ({image}, and the {MAX_REFUSED - 1} images tried before it)",
                remedy="see to the device and its memory, or take another --engine: the same command goes on",
            ) from error
