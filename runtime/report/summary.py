"""A run in a few lines of text: rate, busy shares, which stage is the limit, failures.

print(describe_run(RunFigures("label", done=980, failed=20, seconds=312.5, stages=stages)))
"""

import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multisa.runtime.progress import pluralize

MOST_GROUPS = 100  # kept apart; what comes later under another reason is OTHER
OTHER = "other reasons"

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LONGEST = 300  # characters of a reason


@dataclass
class ReasonGroup:
    """How many images failed for one reason, and the first of them."""

    count: int = 0
    ids: list[str] = field(default_factory=list)


def general_reason(reason: str, image: str = "") -> str:
    """A reason without what belongs to one image: its id, what is quoted, every number.

    >>> general_reason("a/b.jpg: 9000x9000 = 81000000 pixels, expected at most 50000000", "a/b.jpg")
    '…x… = … pixels, expected at most …'
    """
    text = reason[:_LONGEST]
    if image and text.startswith(f"{image}: "):
        text = text[len(image) + 2 :]  # the ids are listed beside the reason
    return _NUMBER.sub("…", _QUOTED.sub("…", _without(text, image)))


def group_failures(failures: Iterable[Mapping[str, Any]], ids: int) -> dict[str, ReasonGroup]:
    """Group the lines of failed.jsonl by reason in one pass, the most frequent first.

    ids: how many of each group are named. Memory is bounded by MOST_GROUPS * ids.
    """
    groups: dict[str, ReasonGroup] = {}
    for failure in failures:
        image = str(failure["image"])
        reason = general_reason(str(failure["reason"]), image)
        if reason not in groups and len(groups) >= MOST_GROUPS:
            reason = OTHER
        group = groups.setdefault(reason, ReasonGroup())
        group.count += 1
        if len(group.ids) < ids:
            group.ids.append(image)
    return dict(sorted(groups.items(), key=lambda item: (-item[1].count, item[0])))


def _without(text: str, image: str) -> str:
    """`text` without `image`, where that is no part of a longer word: ids may be single letters."""
    pieces, end = [], 0
    while image and (start := text.find(image, end)) >= 0:
        stop = start + len(image)
        inside = text[max(start - 1, 0) : start].isalnum() or text[stop : stop + 1].isalnum()
        pieces += [text[end:start], image if inside else "…"]
        end = stop
    return "".join([*pieces, text[end:]])


LIMIT_SHARE = 0.85  # busy for so much of the time, a stage (or all cores) holds up the rest
_REASONS = 5  # named in the text; failed.jsonl has them all


@dataclass(frozen=True)
class StageTime:
    """One stage of the pipeline: the seconds its workers were busy, added up."""

    name: str
    busy_seconds: float
    workers: int = 1


@dataclass(frozen=True)
class RunFigures:
    """All that the text needs; counts are of this run, `kept` is what earlier runs had committed."""

    command: str
    done: int
    failed: int
    seconds: float
    stages: tuple[StageTime, ...] = ()
    kept: int = 0
    skipped: int = 0  # entries of the source that are no images or cannot be had
    cores: int = 0  # of the machine; 0 when not known
    reasons: Mapping[str, int] = field(default_factory=dict)  # images by general reason, see reasons.py
    look_at: tuple[str, ...] = ()  # "out/report.html: the uncertain ones first"

    @property
    def images_per_second(self) -> float:
        """Images done in a second of this run; 0 for a run of no time."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


def figures_from_run(run: Mapping[str, Any]) -> RunFigures:
    """The figures that .multisa/run.json has: stages may have `stage_workers`, else all have `workers`."""
    workers = run.get("stage_workers", {})
    stages = tuple(
        StageTime(str(name), float(seconds), int(workers.get(name, run.get("workers", 1))))
        for name, seconds in run.get("stage_seconds", {}).items()
    )
    return RunFigures(
        command=str(run.get("command", "run")),
        done=int(run.get("images", 0)),
        failed=int(run.get("failures", 0)),
        seconds=float(run.get("seconds", 0.0)),
        stages=stages,
        kept=int(run.get("kept", 0)),
        skipped=int(run.get("skipped", 0)),
        cores=int(run.get("cores", 0)),
    )


def busy_shares(figures: RunFigures) -> dict[str, float]:
    """For each stage its busy seconds over what its workers had, the busiest first; 0..1 but for rounding."""
    if figures.seconds <= 0:
        return {}
    shares = {s.name: s.busy_seconds / (max(s.workers, 1) * figures.seconds) for s in figures.stages}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def describe_limit(figures: RunFigures) -> str:
    """Which stage holds the others up, and why that is said; empty for a run without stages or time."""
    shares = busy_shares(figures)
    if not shares:
        return ""
    name, share = next(iter(shares.items()))
    workers = next(stage.workers for stage in figures.stages if stage.name == name)
    busy = f"its {pluralize(workers, 'worker')} had work for {share:.0%} of the time"
    together = sum(stage.busy_seconds for stage in figures.stages)
    used = together / (figures.cores * figures.seconds) if figures.cores else 0.0
    if used >= LIMIT_SHARE:
        cores = f"the stages together had work for all of {pluralize(figures.cores, 'core')}"
        return f"the limit is the processor, in {name} most ({busy}): {cores}, more workers gain nothing"
    if share >= LIMIT_SHARE:
        return f"the limit is {name}: {busy}; more workers for it, or a faster engine, would be felt"
    return f"no stage is the limit: {name} is the busiest, {busy}; the rest is waiting for source or disk"


def describe_run(figures: RunFigures) -> str:
    """The run in lines: what was done, where the time went, what failed, where to look."""
    lines = [_done(figures)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in busy_shares(figures).items())
    if shares:
        lines += [f"busy: {shares}", describe_limit(figures)]
    reasons = sorted(figures.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"failed, {pluralize(count, 'image')}: {reason}" for reason, count in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        rest = sum(count for _, count in reasons[_REASONS:])
        lines.append(f"failed, {pluralize(rest, 'image')}: {len(reasons) - _REASONS} further reasons")
    lines += [f"look at {place}" for place in figures.look_at]
    return "\n".join(lines)


def describe_duration(seconds: float) -> str:
    """Seconds as people read them: "0.8 s", "4 min 10 s", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(math.floor(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _done(figures: RunFigures) -> str:
    parts = [
        f"{pluralize(figures.done, 'image')} in {describe_duration(figures.seconds)} "
        f"({figures.images_per_second:.2f}/s), {figures.failed} failed"
    ]
    if figures.kept:
        parts.append(f"{figures.kept} kept from before")
    if figures.skipped:
        parts.append(f"{figures.skipped} passed over")
    return ", ".join(parts)


BINS = 20  # of the histogram of uncertainty, each 1 / BINS wide
SAMPLE_PART = 10  # one in so many report_images images is a sample of the others

Record = Mapping[str, Any]


@dataclass
class Gathered:
    """What one pass over a run's records finds; classes in the order of the bundle."""

    images: int = 0
    images_of_class: dict[str, int] = field(default_factory=dict)
    pixel_shares: dict[str, float] = field(default_factory=dict)  # of all pixels; the background, too
    missing_of_class: dict[str, int] = field(default_factory=dict)  # labelled with it, not found
    uncertainties: list[int] = field(default_factory=lambda: [0] * BINS)
    uncertainty: float = 0.0  # mean
    confidence: float = 0.0  # mean
    report_images: list[Record] = field(default_factory=list)  # the most uncertain first
    samples: frozenset[int] = frozenset()  # indices of those report_images that only stand for the others


class MostUncertaintyful:
    """Keeps the most uncertain records and an even spread of all, in one pass and in memory O(most).

    Ties go to the lower index, so the choice is the same in every run over the same images.
    """

    def __init__(self, most: int) -> None:
        if most < 0:
            raise ValueError(f"most: got {most}, expected 0 or more")
        self._most = most
        self._heap: list[tuple[float, int, int, Record]] = []  # the least uncertain on top
        self._spread: list[Record] = []
        self._stride = 1
        self._seen = 0

    def add(self, record: Record) -> None:
        """See the next record."""
        if not self._most:
            return
        # The third keeps records from being compared.
        item = (float(record["uncertainty"]), -int(record["index"]), -self._seen, record)
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
        """The records to picture, the most uncertain first, and the indices of the samples among them."""
        ranked = [item[-1] for item in sorted(self._heap, reverse=True)]
        samples = self._most // SAMPLE_PART if self._seen > self._most else 0
        uncertain = ranked[: len(ranked) - samples]
        taken = {record["index"] for record in uncertain}
        others = [record for record in self._spread if record["index"] not in taken]
        spread = [others[(2 * i + 1) * len(others) // (2 * samples)] for i in range(samples)]
        both = sorted(
            [*uncertain, *spread], key=lambda record: (-float(record["uncertainty"]), record["index"])
        )
        return both, frozenset(int(record["index"]) for record in spread)


def gather(records: Iterable[Record], classes: tuple[str, ...], report_images: int) -> Gathered:
    """Count and choose in one pass over the records of a run.

    classes: the bundle's, background first; a class beyond them is not counted. report_images: how many images
    the page pictures at most.
    """
    found = Gathered(
        images_of_class=dict.fromkeys(classes[1:], 0),
        pixel_shares=dict.fromkeys(classes, 0.0),
        missing_of_class=dict.fromkeys(classes[1:], 0),
    )
    chosen = MostUncertaintyful(report_images)
    pixels = uncertainty = confidence = 0.0
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
        found.uncertainties[min(math.floor(float(record["uncertainty"]) * BINS), BINS - 1)] += 1
        uncertainty += float(record["uncertainty"])
        confidence += float(record["confidence"])
        found.images += 1
        chosen.add(record)
    found.pixel_shares = {name: n / max(pixels, 1) for name, n in found.pixel_shares.items()}
    found.uncertainty, found.confidence = (
        uncertainty / max(found.images, 1),
        confidence / max(found.images, 1),
    )
    found.report_images, found.samples = chosen.chosen()
    return found
