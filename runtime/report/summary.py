"""Figures of a run: rate, busy shares, bottleneck, failures by reason, statistics over its records.

print(describe_run(RunFigures("label", done=980, failed=20, seconds=312.5, stages=stages)))
"""

import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multisa.runtime.progress import pluralize

MAX_GROUPS = 100  # distinct reasons; further ones are counted as OTHER
OTHER = "other reasons"
LIMIT_SHARE = 0.85  # a stage (or all cores) that is busy for this share of the time is the bottleneck
BINS = 20  # of the uncertainty histogram over 0..1
SAMPLE_SHARE = 10  # one in this many pictured images is a sample of all images, not among the most uncertain

Record = Mapping[str, Any]  # a line of labels.jsonl

_REASONS = 5  # shown in the text; failed.jsonl has them all
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MAX_REASON = 300  # characters of a reason that are compared
MIN_SHARE = 0.0005  # of an image's pixels; classes below are neither shown nor counted, they would read 0.0%


@dataclass
class ReasonGroup:
    """Images that failed for the same reason: how many, and the first ids."""

    count: int = 0
    ids: list[str] = field(default_factory=list)


def general_reason(reason: str, image: str = "") -> str:
    """A reason without what is specific to one image: its id, quoted text and numbers.

    >>> general_reason("a/b.jpg: 9000x9000 = 81000000 pixels, expected at most 50000000", "a/b.jpg")
    '…x… = … pixels, expected at most …'
    """
    text = reason[:_MAX_REASON]
    if image and text.startswith(f"{image}: "):
        text = text[len(image) + 2 :]  # ids are listed separately
    return _NUMBER.sub("…", _QUOTED.sub("…", _without(text, image)))


def group_failures(failures: Iterable[Mapping[str, Any]], ids: int) -> dict[str, ReasonGroup]:
    """Group the lines of failed.jsonl by reason in one pass, most frequent first.

    ids: how many image ids each group keeps. Memory is bounded by MAX_GROUPS * ids.
    """
    groups: dict[str, ReasonGroup] = {}
    for failure in failures:
        image = str(failure["image"])
        reason = general_reason(str(failure["reason"]), image)
        if reason not in groups and len(groups) >= MAX_GROUPS:
            reason = OTHER
        group = groups.setdefault(reason, ReasonGroup())
        group.count += 1
        if len(group.ids) < ids:
            group.ids.append(image)
    return dict(sorted(groups.items(), key=lambda item: (-item[1].count, item[0])))


def _without(text: str, image: str) -> str:
    """Replace `image` in `text` by "…", except within longer words: ids may be single letters."""
    pieces: list[str] = []
    end = 0
    while image and (start := text.find(image, end)) >= 0:
        stop = start + len(image)
        inside = text[max(start - 1, 0) : start].isalnum() or text[stop : stop + 1].isalnum()
        pieces += [text[end:start], image if inside else "…"]
        end = stop
    return "".join([*pieces, text[end:]])


@dataclass(frozen=True)
class StageTime:
    """One stage of the pipeline: the seconds its workers were busy, summed."""

    name: str
    busy_seconds: float
    workers: int = 1


@dataclass(frozen=True)
class RunFigures:
    """Counts and times of a run, without the images that earlier, interrupted runs finished (`kept`)."""

    command: str
    done: int
    failed: int
    seconds: float
    stages: tuple[StageTime, ...] = ()
    kept: int = 0
    skipped: int = 0  # entries of the source that are not images or cannot be read
    cores: int = 0  # of the machine; 0 if unknown
    reasons: Mapping[str, int] = field(default_factory=dict)  # images by `general_reason`

    @property
    def images_per_second(self) -> float:
        """Throughput; 0 for a run that took no time."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


def figures_from_run(run: Mapping[str, Any]) -> RunFigures:
    """The figures in .multisa/run.json. Stages without an entry in `stage_workers` have `workers`."""
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
    """Each stage's busy seconds divided by its workers' time, busiest first; 0..1 except for rounding."""
    if figures.seconds <= 0:
        return {}
    shares = {s.name: s.busy_seconds / (max(s.workers, 1) * figures.seconds) for s in figures.stages}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def describe_limit(figures: RunFigures) -> str:
    """Which stage is the bottleneck, and how one can tell; empty for a run without stages or time."""
    shares = busy_shares(figures)
    if not shares:
        return ""
    name, share = next(iter(shares.items()))
    workers = next(stage.workers for stage in figures.stages if stage.name == name)
    who = "its worker was" if workers == 1 else f"its {workers} workers were"
    busy = f"{who} busy {share:.0%} of the time"
    together = sum(stage.busy_seconds for stage in figures.stages)
    used = together / (figures.cores * figures.seconds) if figures.cores else 0.0
    if used >= LIMIT_SHARE:
        cores = f"all stages together kept {pluralize(figures.cores, 'core')} busy"
        return f"the bottleneck is the CPU, mostly in {name} ({busy}): {cores}, so more workers do not help"
    if share >= LIMIT_SHARE:
        return f"the bottleneck is {name}: {busy}; more workers or a faster backend would help"
    return f"no stage is the bottleneck: {name} is the busiest, {busy}; the rest is waiting for input or disk"


def describe_run(figures: RunFigures) -> str:
    """The run as text: what was done, where the time went, what failed."""
    lines = [_done(figures)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in busy_shares(figures).items())
    if shares:
        lines += [f"busy: {shares}", describe_limit(figures)]
    reasons = sorted(figures.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"failed, {pluralize(count, 'image')}: {reason}" for reason, count in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        rest = sum(count for _, count in reasons[_REASONS:])
        lines.append(f"failed, {pluralize(rest, 'image')}: {len(reasons) - _REASONS} other reasons")
    return "\n".join(lines)


def describe_duration(seconds: float) -> str:
    """A duration for people: "0.8 s", "4 min 10 s", "3 h 05 min"."""
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
        parts.append(f"{figures.kept} done earlier")
    if figures.skipped:
        parts.append(f"{figures.skipped} skipped")
    return ", ".join(parts)


@dataclass
class RunStatistics:
    """Statistics from one pass over a run's records; classes in the order of the bundle."""

    images: int = 0
    images_of_class: dict[str, int] = field(default_factory=dict)
    pixel_shares: dict[str, float] = field(default_factory=dict)  # of all pixels, the background included
    missing_of_class: dict[str, int] = field(default_factory=dict)  # images labelled with it, mask without it
    uncertainties: list[int] = field(default_factory=lambda: [0] * BINS)  # histogram
    uncertainty: float = 0.0  # mean
    confidence: float = 0.0  # mean
    report_images: list[Record] = field(default_factory=list)  # records to picture, most uncertain first
    samples: frozenset[int] = frozenset()  # indices of those among them that are a sample of all images


class ReportImageSelector:
    """Selects the most uncertain records and an even sample of all, in one pass and in memory O(count).

    Ties go to the lower index, so runs over the same images select the same.
    """

    def __init__(self, count: int) -> None:
        """Select `count` records. Raises ValueError below 0."""
        if count < 0:
            raise ValueError(f"count: got {count}, expected 0 or more")
        self._count = count
        self._heap: list[tuple[float, int, int, Record]] = []  # the least uncertain on top
        self._sample: list[Record] = []  # every `_stride`-th record
        self._stride = 1
        self._seen = 0

    def add(self, record: Record) -> None:
        """Consider the next record."""
        if not self._count:
            return
        # The third item is unique, so that records are never compared.
        item = (float(record["uncertainty"]), -int(record["index"]), -self._seen, record)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, item)
        elif item > self._heap[0]:
            heapq.heapreplace(self._heap, item)
        if self._seen % self._stride == 0:
            self._sample.append(record)
            if len(self._sample) > 2 * self._count:  # so that at least `count` are always left
                self._sample = self._sample[::2]
                self._stride *= 2
        self._seen += 1

    def selected(self) -> tuple[list[Record], frozenset[int]]:
        """The selected records, most uncertain first, and the indices of the samples among them."""
        ranked = [item[-1] for item in sorted(self._heap, reverse=True)]
        samples = self._count // SAMPLE_SHARE if self._seen > self._count else 0
        uncertain = ranked[: len(ranked) - samples]
        taken = {record["index"] for record in uncertain}
        others = [record for record in self._sample if record["index"] not in taken]
        spread = [others[(2 * i + 1) * len(others) // (2 * samples)] for i in range(samples)]
        both = sorted([*uncertain, *spread], key=lambda record: (-float(record["uncertainty"]), record["index"]))
        return both, frozenset(int(record["index"]) for record in spread)


def collect_statistics(records: Iterable[Record], classes: tuple[str, ...], report_images: int) -> RunStatistics:
    """Collect statistics in one pass over the records of a run, and select the images to picture.

    classes: the bundle's, background first; other classes are not counted. report_images: how many images to
    picture at most.
    """
    found = RunStatistics(
        images_of_class=dict.fromkeys(classes[1:], 0),
        pixel_shares=dict.fromkeys(classes, 0.0),
        missing_of_class=dict.fromkeys(classes[1:], 0),
    )
    selector = ReportImageSelector(report_images)
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
        selector.add(record)
    found.pixel_shares = {name: n / max(pixels, 1) for name, n in found.pixel_shares.items()}
    found.uncertainty = uncertainty / max(found.images, 1)
    found.confidence = confidence / max(found.images, 1)
    found.report_images, found.samples = selector.selected()
    return found
