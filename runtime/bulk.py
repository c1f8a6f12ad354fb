"""One run over a corpus: read, annotate, write masks and records; what labelling and segmenting share.

OUT/masks/NAME.png, OUT/labels.jsonl and OUT/failed.jsonl hold the results, the same bytes for any number of
workers and whatever OUT held before. What may differ between runs (times, versions) is under OUT/.multisa/.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import Bundle
from multisa.runtime.corpus import Corpus, CorpusImage, parallel_map
from multisa.runtime.engines.choice import Choice
from multisa.runtime.errors import MultisaError, TooManyFailures, UsageError
from multisa.runtime.files import sha256_of_file, write_bytes_atomically, write_json_atomically
from multisa.runtime.gallery import write_gallery, write_overlay
from multisa.runtime.images import (
    MAX_PIXELS,
    read_image,
    resize_image,
    resize_mask,
    working_size,
    write_mask,
)
from multisa.runtime.manifest import MANIFEST_NAME
from multisa.runtime.progress import Progress, counted, say
from multisa.runtime.results import FAILURES, NAME_ERRORS, RECORDS, begin_results, finish_results, mask_of
from multisa.runtime.versions import installed_versions

UInt8 = npt.NDArray[np.uint8]

DECIMALS = 4  # of every share, score and time in the records

_PACKAGES = ("multisa", "numpy", "onnxruntime", "pillow")
# Of engines that are more than ONNX Runtime.
_ENGINE_PACKAGES = {"tensorrt": ("tensorrt", "pycuda"), "tensorrt-rtx": ("tensorrt-rtx", "pycuda")}
_NAMED = 3  # how many examples a message gives


@dataclass(frozen=True)
class RunOptions:
    """How a run is done; nothing here changes a mask."""

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    max_pixels: int = MAX_PIXELS
    gallery: bool = False
    tell_other_files: bool = True  # say how many files of the folder are no images


@dataclass(frozen=True, eq=False)
class Annotation:
    """What the engines and the post-processing say about one image at its working size."""

    mask: UInt8  # [h, w] class ids
    confidence: float  # mean over the pixels, 0..1
    classes: tuple[str, ...]
    details: Mapping[str, Any]  # further keys of the image's record


@dataclass(frozen=True)
class RunSummary:
    """What a run did and where its time went (stage seconds are summed over the workers)."""

    images: int  # all that were tried
    failures: int  # so many of them are not done
    seconds: float
    stage_seconds: dict[str, float]

    @property
    def done(self) -> int:
        """How many images have a mask."""
        return self.images - self.failures

    @property
    def images_per_second(self) -> float:
        """How many images were done in a second."""
        return self.done / self.seconds


class StageClock:
    """Seconds spent in each stage of one image."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


Annotate = Callable[[CorpusImage, UInt8, StageClock], Annotation]


@dataclass(frozen=True)
class Method:
    """What a run does with an image, and what runs the graphs in it."""

    command: str  # "label"
    annotate: Annotate
    engines: Sequence[Choice]


@dataclass(frozen=True)
class _Done:
    image: str
    name: str
    record: dict[str, Any]
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Failed:
    image: str
    reason: str
    seconds: dict[str, float]


def run_corpus(method: Method, corpus: Corpus, out: Path, bundle: Bundle, options: RunOptions) -> RunSummary:
    """Annotate every image of `corpus` with the worker threads of `options` and write the results to `out`.

    `method.annotate` gets uint8 [h, w, 3] at the bundle's working size. An image that raises MultisaError is
    recorded in failed.jsonl with the reason, and the run goes on, as it does where the name of a result
    cannot be had (too long, or taken by a folder). Anything else ends it, what is done being recorded.
    """
    if options.workers < 1:
        raise UsageError(f"got {options.workers} workers, expected at least 1")
    _tell_skipped(corpus, options)
    started, start = datetime.now(UTC), time.perf_counter()
    private = out / ".multisa"
    begin_results(out, (image.name for image in corpus.images))

    def process(image: CorpusImage) -> _Done | _Failed:
        clock = StageClock()
        try:
            record = _annotate_one(image, out, bundle, method.annotate, options, clock)
        except MultisaError as error:
            return _Failed(image.relative, str(error).removeprefix(f"{image.path}: "), clock.seconds)
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise
            reason = f"its results cannot be written: {os.strerror(error.errno)}: rename the image"
            return _Failed(image.relative, reason, clock.seconds)
        return _Done(image.relative, image.name, record, clock.seconds)

    done: list[_Done] = []
    failed: list[_Failed] = []
    stages: dict[str, float] = {}
    try:
        with (
            (private / "log.jsonl").open("w", encoding="utf-8") as log,
            Progress(len(corpus.images), method.command) as progress,
        ):
            for outcome in parallel_map(process, corpus.images, options.workers):
                if isinstance(outcome, _Done):
                    done.append(outcome)
                else:
                    failed.append(outcome)
                    if len(failed) <= _NAMED:
                        say(f"{outcome.image}: {outcome.reason}")
                for name, seconds in outcome.seconds.items():
                    stages[name] = stages.get(name, 0.0) + seconds
                log.write(_json_line({"image": outcome.image, "seconds": _rounded(outcome.seconds)}))
                progress.advance(note=f"{len(failed)} failed" if failed else "")
    finally:
        _write_records(out, done, failed)
    finish_results(out, (item.name for item in done), pictures=options.gallery)
    if options.gallery:
        write_gallery(out, [item.record for item in done], bundle.manifest, title=f"multisa {method.command}")
    seconds = time.perf_counter() - start
    summary = RunSummary(len(corpus.images), len(failed), seconds, stages)
    record = _run_record(method, summary, corpus, bundle, options)
    started_at = {"started": started.isoformat(timespec="seconds")}
    write_json_atomically(private / "run.json", started_at | record)
    return summary


def check_failures(summary: RunSummary, allowed: str, out: Path) -> None:
    """Raise TooManyFailures when more images failed than `allowed`: a number, or a share such as "2%".

    Raises UsageError when `allowed` is neither.
    """
    limit = failure_limit(allowed, summary.images)
    if summary.failures > limit:
        raise TooManyFailures(
            f"{summary.failures} of {counted(summary.images, 'image')} failed, allowed were {allowed}: "
            f"the reasons are in {out / 'failed.jsonl'}"
        )


def failure_limit(allowed: str, images: int) -> float:
    """How many of `images` may fail: "3" is 3, "2%" is 2 in a hundred. Raises UsageError for other text."""
    number, percent = allowed.removesuffix("%"), allowed.endswith("%")
    if not number.isascii() or not number.replace(".", "", 1 if percent else 0).isdigit():
        raise UsageError(
            f"got {allowed!r} as the number of failures allowed, expected N or P%, as in 3 or 2%"
        )
    return float(number) / 100 * images if percent else float(number)


def describe_summary(summary: RunSummary) -> str:
    """The run in two lines: images, rate and the share of each stage, the slowest first."""
    total = sum(summary.stage_seconds.values()) or 1.0
    stages = sorted(summary.stage_seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages)
    return (
        f"{counted(summary.done, 'image')} in {summary.seconds:.1f} s "
        f"({summary.images_per_second:.2f}/s), {summary.failures} failed\ntime by stage: {shares}"
    )


def name_some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


def _annotate_one(
    image: CorpusImage, out: Path, bundle: Bundle, annotate: Annotate, options: RunOptions, clock: StageClock
) -> dict[str, Any]:
    manifest = bundle.manifest
    with clock.stage("read"):
        photograph = read_image(image.path, max_pixels=options.max_pixels)
        height, width = photograph.rgb.shape[:2]
        rgb = resize_image(photograph.rgb, working_size(height, width, manifest.parameters.long_side))
    annotation = annotate(image, rgb, clock)
    with clock.stage("write"):
        mask = resize_mask(annotation.mask, (height, width))
        write_mask(out / mask_of(image.name), mask, manifest.mask_palette())
    if options.gallery:
        with clock.stage("gallery"):
            write_overlay(out, image.name, photograph.rgb, mask, manifest)
    counts = np.bincount(mask.ravel(), minlength=len(manifest.classes))
    shares = {manifest.classes[i]: round(int(n) / mask.size, DECIMALS) for i, n in enumerate(counts) if n}
    record = {
        "image": image.relative,
        "mask": mask_of(image.name),
        "width": width,
        "height": height,
        "orientation": photograph.orientation,
        "classes": annotation.classes,
        "pixel_shares": shares,
        "confidence": round(annotation.confidence, DECIMALS),
        **annotation.details,
    }
    return {**record, "notes": photograph.notes} if photograph.notes else record


def _write_records(out: Path, done: list[_Done], failed: list[_Failed]) -> None:
    write_bytes_atomically(out / RECORDS, "".join(_json_line(item.record) for item in done).encode())
    failures = "".join(_json_line({"image": item.image, "reason": item.reason}) for item in failed)
    if failures:
        write_bytes_atomically(out / FAILURES, failures.encode())


def _run_record(
    method: Method, summary: RunSummary, corpus: Corpus, bundle: Bundle, options: RunOptions
) -> dict[str, Any]:
    engines = dict.fromkeys(choice.engine.name for choice in method.engines)
    packages = [*_PACKAGES, *(package for name in engines for package in _ENGINE_PACKAGES.get(name, ()))]
    return {
        "command": method.command,
        "images": summary.done,
        "failures": summary.failures,
        "skipped": corpus.skipped,
        "seconds": round(summary.seconds, 3),
        "images_per_second": round(summary.images_per_second, 3),
        "stage_seconds": _rounded(summary.stage_seconds),
        "workers": options.workers,
        "bundle": {"name": bundle.manifest.name, "sha256": sha256_of_file(bundle.path / MANIFEST_NAME)},
        "engines": {choice.graph: choice.to_json() for choice in method.engines},
        "versions": {"python": platform.python_version(), **installed_versions(dict.fromkeys(packages))},
    }


def _tell_skipped(corpus: Corpus, options: RunOptions) -> None:
    if corpus.skipped:
        say(f"passed over {len(corpus.skipped)}: {name_some(corpus.skipped)}")
    if corpus.other_files and options.tell_other_files:
        say(f"left out, no image by extension: {counted(corpus.other_files, 'file')}")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DECIMALS) for name, value in seconds.items()}


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n"
