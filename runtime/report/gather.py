"""One pass over labels.jsonl: what the page counts, and which images it pictures.

Memory is bounded by the number of images pictured, however long the file is.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BINS = 20  # of the histogram of doubt, each 1 / BINS wide
SAMPLE_PART = 10  # one in so many pictured images is a sample of the others

Record = Mapping[str, Any]


@dataclass
class Gathered:
    """What one pass over a run's records finds; classes in the order of the bundle."""

    images: int = 0
    images_of_class: dict[str, int] = field(default_factory=dict)
    pixel_shares: dict[str, float] = field(default_factory=dict)  # of all pixels; the background, too
    missing_of_class: dict[str, int] = field(default_factory=dict)  # labelled with it, not found
    doubts: list[int] = field(default_factory=lambda: [0] * BINS)
    doubt: float = 0.0  # mean
    confidence: float = 0.0  # mean
    pictured: list[Record] = field(default_factory=list)  # the most doubtful first
    samples: frozenset[int] = frozenset()  # indices of those pictured that only stand for the others


class MostDoubtful:
    """Keeps the most doubtful records and an even spread of all, in one pass and in memory O(most).

    Ties go to the lower index, so the choice is the same in every run over the same images.
    """

    def __init__(self, most: int) -> None:
        if most < 0:
            raise ValueError(f"most: got {most}, expected 0 or more")
        self._most = most
        self._heap: list[tuple[float, int, int, Record]] = []  # the least doubtful on top
        self._spread: list[Record] = []
        self._stride = 1
        self._seen = 0

    def add(self, record: Record) -> None:
        """See the next record."""
        if not self._most:
            return
        # The third keeps records from being compared.
        item = (float(record["doubt"]), -int(record["index"]), -self._seen, record)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, item)
        elif item > self._heap[0]:
            heapq.heapreplace(self._heap, item)
        if self._seen % self._stride == 0:
            self._spread.append(record)
            if len(self._spread) > 2 * self._most:  # so at least `most` are always left
                self._spread = self._spread[::2]
                self._stride *= 2
        self._seen += 1

    def chosen(self) -> tuple[list[Record], frozenset[int]]:
        """The records to picture, the most doubtful first, and the indices of the samples among them."""
        ranked = [item[-1] for item in sorted(self._heap, reverse=True)]
        samples = self._most // SAMPLE_PART if self._seen > self._most else 0
        doubtful = ranked[: len(ranked) - samples]
        taken = {record["index"] for record in doubtful}
        others = [record for record in self._spread if record["index"] not in taken]
        spread = [others[(2 * i + 1) * len(others) // (2 * samples)] for i in range(samples)]
        both = sorted([*doubtful, *spread], key=lambda record: (-float(record["doubt"]), record["index"]))
        return both, frozenset(int(record["index"]) for record in spread)


def gather(records: Iterable[Record], classes: tuple[str, ...], pictured: int) -> Gathered:
    """Count and choose in one pass over the records of a run.

    classes: the bundle's, background first; a class beyond them is not counted. pictured: how many images
    the page pictures at most.
    """
    found = Gathered(
        images_of_class=dict.fromkeys(classes[1:], 0),
        pixel_shares=dict.fromkeys(classes, 0.0),
        missing_of_class=dict.fromkeys(classes[1:], 0),
    )
    chosen = MostDoubtful(pictured)
    pixels = doubt = confidence = 0.0
    for record in records:
        size = int(record["width"]) * int(record["height"])
        pixels += size
        for name, share in record["pixel_shares"].items():
            if name in found.pixel_shares:
                found.pixel_shares[name] += share * size
            if name in found.images_of_class and share > 0:
                found.images_of_class[name] += 1
        for name in record.get("missing", ()):
            if name in found.missing_of_class:
                found.missing_of_class[name] += 1
        found.doubts[min(math.floor(float(record["doubt"]) * BINS), BINS - 1)] += 1
        doubt += float(record["doubt"])
        confidence += float(record["confidence"])
        found.images += 1
        chosen.add(record)
    found.pixel_shares = {name: n / max(pixels, 1) for name, n in found.pixel_shares.items()}
    found.doubt, found.confidence = doubt / max(found.images, 1), confidence / max(found.images, 1)
    found.pictured, found.samples = chosen.chosen()
    return found
