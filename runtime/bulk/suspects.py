"""Shards whose doers were lost again and again: done image by image, to find the one that ends processes."""

import secrets
from collections import Counter, deque
from pathlib import Path

from multisa.runtime.bulk.hand import Order
from multisa.runtime.bulk.inventory import Shard
from multisa.runtime.bulk.shards import TEMPORARY
from multisa.runtime.bulk.stages import Failure
from multisa.runtime.progress import say

MAX_LOSSES_AT_A_SHARD = 3  # until its images are done one by one
MAX_LOSSES_AT_AN_IMAGE = 2  # that was in hand by itself, until it is a failure
MAX_FAILURES_OF_A_SHARD = 3  # so found; with more it is not the images
_REASON = "ends the process that does it, as a decoder that crashes or too little memory do"


class Suspects:
    """What is known of shards that were in hand where a process was lost."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._losses: Counter[int] = Counter()  # by shard
        self._losses_at: Counter[int] = Counter()  # by position of an image
        self._failures: dict[int, list[Failure]] = {}  # by shard that is a suspect
        self._waiting: deque[Shard] = deque()
        self.in_hand: dict[int, str] = {}  # the marker of each suspect that is being done

    def __bool__(self) -> bool:
        """Whether one waits to be done."""
        return bool(self._waiting)

    def __contains__(self, shard: int) -> bool:
        return shard in self._failures

    def next_order(self) -> Order:
        """The next one that waits, for a process that has nothing else in hand."""
        shard = self._waiting.popleft()
        self.in_hand[shard.number] = marker = f"{TEMPORARY}/at-{secrets.token_hex(8)}"
        return Order(shard, marker=marker, failures=tuple(self._failures[shard.number]))

    def done(self, shard: int) -> None:
        """Note a shard that is committed."""
        self.in_hand.pop(shard, None)

    def lost(self, shard: Shard, reason: str) -> bool:
        """Note that a process was lost with a shard in hand; returns whether it explains the loss for now."""
        marker = self.in_hand.pop(shard.number, None)
        if marker is None:
            self._losses[shard.number] += 1
            if self._losses[shard.number] >= MAX_LOSSES_AT_A_SHARD:
                self._failures[shard.number] = []
                self._waiting.append(shard)
            return self._losses[shard.number] > 1
        self._waiting.append(shard)
        return self._blame(shard, self._read(marker), reason)

    def append(self, shard: Shard) -> None:
        """Take back one whose process was left out for another reason."""
        self.in_hand.pop(shard.number, None)
        self._waiting.append(shard)

    def _blame(self, shard: Shard, index: int, reason: str) -> bool:
        found = [work for work in shard.works if work.index == index]
        self._losses_at[index] += 1
        few = len(self._failures[shard.number]) < MAX_FAILURES_OF_A_SHARD
        if not found or not few or self._losses_at[index] < MAX_LOSSES_AT_AN_IMAGE:
            return False
        image = found[0].item.id
        say(f"{image}: ends whoever does it ({reason}): it is left out")
        self._failures[shard.number].append(Failure(index, image, "process", _REASON))
        return True

    def _read(self, marker: str) -> int:
        """The position of the image that was in hand; -1 for none."""
        path = self._out / marker
        try:
            return int(path.read_text())
        except (FileNotFoundError, ValueError):
            return -1
        finally:
            path.unlink(missing_ok=True)
