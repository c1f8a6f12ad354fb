"""Check a data set before training: decode every image and mask once, and count what the networks will see."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from multisa.runtime.errors import DatasetError, ImageError
from multisa.runtime.files import read_json_object, sha256_of_bytes, sha256_of_file, write_json_atomically
from multisa.runtime.imaging.decode import read_image
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import Progress, pluralize
from multisa.runtime.system import usable_cpus
from multisa.training.annotations.base import Mask
from multisa.training.data import Dataset, Finding, Item

CACHE = "data-check.json"  # in the run folder: what the last check of this data set found
FORMAT = 2  # part of the digest in it; raise it when the check becomes stricter
MOST_LISTED = 20  # unusable files in an error message
SHORTEST = 180.0  # seconds; shorter estimates are not told
PAGE_WIDTH = 100  # columns of the table for people

Element = TypeVar("Element")
Result = TypeVar("Result")
Size = tuple[int, int]  # (H, W) of the upright image


@dataclass(frozen=True)
class Estimate:
    """What a training takes: about this time on this machine, and this much space in the run folder."""

    seconds: float
    disk_bytes: int
    machine: str
    stages: Mapping[str, float] = field(default_factory=dict)  # seconds of each stage, by its name

    def __str__(self) -> str:
        megabytes = self.disk_bytes / 1e6
        space = f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{max(megabytes, 1):.0f} MB"
        # Starting processes and reading networks, which is not measured, takes a minute or two.
        time = rough_duration(self.seconds) if self.seconds >= SHORTEST else "less than 5 min"
        return f"{time} on this machine ({self.machine}), and {space} in the run folder"


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found."""

    root: str
    images: Mapping[str, int]  # in each list: trained on, train (those of them with masks), val
    classes: Mapping[str, int]  # images to train on that show each foreground class
    labels: Mapping[str, int]  # images to train on by their number of labels: "0", "1", "2", "3+"
    sizes: Mapping[str, Size]  # of each image, by id
    unusable: tuple[str, ...]  # "path: reason" of each file that no training can use
    findings: tuple[Finding, ...]  # those of the data set, then images that occur more than once
    estimate: Estimate | None = None

    def require_usable(self) -> None:
        """Raise DatasetError, naming up to 20 of them, if there are files that cannot be used."""
        if len(self.unusable) == 1:
            raise DatasetError(self.unusable[0])
        if self.unusable:
            more = len(self.unusable) - MOST_LISTED
            listed = [*self.unusable[:MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise DatasetError(
                f"{self.root}: got {len(self.unusable)} files that cannot be used, expected none; replace them, or "
                "take their images out of the data set:\n  " + "\n  ".join(listed)
            )

    def size_range(self) -> dict[str, Size]:
        """(H, W) of the images with the fewest, the median and the most pixels; empty without any image."""
        ordered = sorted(self.sizes.values(), key=lambda size: (size[0] * size[1], size))
        places = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
        return {name: ordered[place] for name, place in places.items()} if ordered else {}

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; every finding has all of its names."""
        return {**asdict(self), "sizes": {name: list(size) for name, size in self.size_range().items()}}

    def table(self) -> str:
        """Return the report as text, at most about 100 columns wide."""
        lists = f"{self.images['trained_on']} to train on ({self.images['train']} with masks to measure on), "
        sizes = (f"{name} {width} x {height}" for name, (height, width) in self.size_range().items())
        labels = (f"{name.replace('+', ' or more')}: {count}" for name, count in self.labels.items())
        lines = [
            f"data set  {self.root}",
            f"images    {lists}{self.images['val']} to evaluate on",
            f"sizes     {', '.join(sizes) or 'none'}",
            f"labels    images by their number of labels: {', '.join(labels)}",
            f"classes   {len(self.classes)}, each with the number of images to train on that show it:",
            *_grid(self.classes),
        ]
        if self.findings:
            lines += ["notes", *(f"  {finding}" for finding in self.findings)]
        if self.unusable:
            lines += [f"cannot be used: {pluralize(len(self.unusable), 'file')}", *(f"  {p}" for p in self.unusable)]
        return "\n".join([*lines, *([f"training  {self.estimate}"] if self.estimate else [])])


def check_dataset(dataset: Dataset, output: Path | None = None) -> DatasetReport:
    """Decode every image and mask of a data set on all CPU cores, and report what is there.

    Masks must be readable, as large as their upright images, and hold no id without a class. With `output`, a
    run folder, a check without bad files is stored there, and the same files are not decoded again. Raises
    nothing for bad files: see `DatasetReport.require_usable`.
    """
    # Masks of other train images are never read.
    measured = {item.id for item in dataset.train}
    pairs = [(item, item.mask if item.id in measured else None) for item in dataset.train_images]
    pairs += [(item, item.mask) for item in dataset.val]
    digests = _on_all_cores(lambda pair: (_digest(pair[0].image), _digest(pair[1])), pairs, "reading")
    identity = [FORMAT, len(dataset.class_names), [(i.id, *d) for (i, _), d in zip(pairs, digests, strict=True)]]
    digest = sha256_of_bytes(json.dumps(identity).encode())
    stored = read_json_object(output / CACHE) if output else {}
    unusable: list[str] = []
    remarks: dict[str, list[str]] = {}  # ids by what is worth knowing of images and masks that can be used
    if stored.get("digest") == digest:
        sizes = {name: (height, width) for name, (height, width) in stored["sizes"].items()}
        remarks = stored["remarks"]
    else:
        n_classes = len(dataset.class_names)
        found = _on_all_cores(lambda pair: _inspect(*pair, n_classes), pairs, "checking")
        sizes = {}
        for (item, _), (size, notes, problems) in zip(pairs, found, strict=True):
            unusable += problems
            sizes.update({item.id: size} if size else {})
            for note in notes:
                remarks.setdefault(note, []).append(item.id)
        if output and not unusable:
            write_json_atomically(output / CACHE, {"digest": digest, "sizes": sizes, "remarks": remarks})
    counts = [len(item.classes) for item in dataset.train_images]
    names = enumerate(dataset.class_names[1:], 1)
    return DatasetReport(
        root=str(dataset.root),
        images={"trained_on": len(dataset.train_images), "train": len(dataset.train), "val": len(dataset.val)},
        classes={name: sum(class_id in item.classes for item in dataset.train_images) for class_id, name in names},
        labels={**{str(n): counts.count(n) for n in range(3)}, "3+": sum(count > 2 for count in counts)},
        sizes=sizes,
        unusable=tuple(unusable),
        findings=(
            *dataset.findings,
            *(Finding(f"{pluralize(len(ids), 'image')}: {note}", tuple(ids)) for note, ids in remarks.items()),
            *_copies(dataset, [image for image, _ in digests]),
        ),
    )


def _inspect(item: Item, mask: Mask | None, n_classes: int) -> tuple[Size | None, list[str], list[str]]:
    """The size of an image, if it can be read, notes, and what is wrong with it and its mask."""
    size, notes, problems = None, [], []
    try:
        image = read_image(item.image)
        size, notes = image.size, list(image.notes)
    except ImageError as error:
        problems.append(str(error))
    if mask is None:
        return size, notes, problems
    try:
        ids = mask.read()
    except ImageError as error:
        return size, notes, [*problems, str(error)]
    if (ids == IGNORE_INDEX).any() and not ((ids > 0) & (ids < n_classes)).any():
        notes.append("its mask holds no class, only 255 (ignored) and perhaps 0; write ids 0, 1, .. if 255 is a class")
    highest = int(ids[ids != IGNORE_INDEX].max(initial=0))
    if highest >= n_classes:
        problems.append(
            f"{mask}: got class id {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}; name "
            f"every class in classes.txt, or write {IGNORE_INDEX} (ignored) for the others"
        )
    if size and ids.shape != size:
        problems.append(
            f"{mask}: got a mask of {ids.shape[1]} x {ids.shape[0]} pixels, expected {size[1]} x {size[0]} as its "
            f"upright image {item.image.name}; replace one of them, they do not belong together"
        )
    return size, notes, problems


def _copies(dataset: Dataset, digests: Sequence[str]) -> list[Finding]:
    """Images with the same bytes: several times among those to train on, or there and in val."""
    train: dict[str, list[str]] = {}
    val: dict[str, list[str]] = {}
    lists = [train] * len(dataset.train_images) + [val] * len(dataset.val)
    for item, digest, group in zip((*dataset.train_images, *dataset.val), digests, lists, strict=True):
        if digest:
            group.setdefault(digest, []).append(item.id)
    twice = tuple(" = ".join(ids) for ids in train.values() if len(ids) > 1)
    leaked = tuple(" = ".join([*train[digest], *ids]) for digest, ids in val.items() if digest in train)
    return [
        Finding(text, groups, is_warning=True)
        for text, groups in (
            (f"{pluralize(len(twice), 'image')} several times in the train list (same bytes)", twice),
            (f"{pluralize(len(leaked), 'image')} trained on and in val (same bytes), so val scores too high", leaked),
        )
        if groups
    ]


def _digest(file: Path | Mask | None) -> str:
    try:
        return sha256_of_file(file) if isinstance(file, Path) else file.digest() if file else ""
    except OSError:  # reported with its reason when it is decoded
        return ""


def _on_all_cores(work: Callable[[Element], Result], elements: Sequence[Element], title: str) -> list[Result]:
    results = []
    with ThreadPoolExecutor(usable_cpus()) as pool, Progress(len(elements), f"{title} the data set") as bar:
        for result in pool.map(work, elements):
            results.append(result)
            bar.advance()
    return results


def _grid(counts: Mapping[str, int]) -> list[str]:
    """Names and counts in columns of one width, read downwards."""
    name_width, digits = max(map(len, counts)), max(len(str(count)) for count in counts.values())
    texts = [f"  {name:<{name_width}} {count:>{digits}}" for name, count in counts.items()]
    rows = -(-len(texts) // max(PAGE_WIDTH // len(texts[0]), 1))
    return ["".join(texts[row::rows]) for row in range(rows)]


def rough_duration(seconds: float) -> str:
    """A duration in minutes: "less than 1 min", "about 12 min", "about 3 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than 1 min"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
