"""Data sets: what is trained on and what is measured on, whatever layout they were read from."""

import json
import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.files import read_user_text, sha256_of_bytes, sha256_of_file
from multisa.runtime.image_labels import normal_name
from multisa.runtime.imaging.decode import MAX_ENLARGEMENT, UInt8, read_image, resize_image, resize_mask, working_size
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import format_examples, log, pluralize
from multisa.training.annotations.base import MAX_CLASSES, Mask

Element = TypeVar("Element")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
NO_CLASS = "names that are no class"  # part of the findings about them


@dataclass(frozen=True)
class Item:
    """One image of a data set."""

    id: str
    image: Path
    classes: tuple[int, ...]  # foreground class ids of its image-level labels, ascending
    mask: Mask | None  # ground truth, only measured against


@dataclass(frozen=True)
class Finding:
    """Something to know about a data set before training: what is not used of it, and what it lacks."""

    text: str  # what and how many
    names: tuple[str, ...]  # all of them, each with its reason or count where these differ
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {format_examples(self.names)}"


@dataclass(frozen=True)
class Dataset:
    """A data set with image-level labels, and with masks to measure on where it has any."""

    root: Path
    class_names: tuple[str, ...]  # background first
    train_images: tuple[Item, ...]  # the networks train on these, with image-level labels
    train: tuple[Item, ...]  # VOC's list "train": the train images with masks to measure on; may be empty
    val: tuple[Item, ...]  # images with masks that the segmenter is evaluated on at the end; may be empty
    findings: tuple[Finding, ...] = ()
    corrections: Mapping[str, Mask] = field(default_factory=dict)  # by id of an image to train on (corrections.py)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """A colour (red, green, blue) for each class: VOC's by name if VOC has all of them, else by index."""
        colours = voc_palette()
        known = set(self.class_names) <= set(VOC_CLASSES)
        indices = [VOC_CLASSES.index(name) if known else i for i, name in enumerate(self.class_names)]
        rows = colours[indices].tolist()
        return tuple((red, green, blue) for red, green, blue in rows)

    @property
    def mask_palette(self) -> UInt8:
        """Colours of mask files, uint8 [256, 3]."""
        colours = voc_palette()
        colours[: len(self.class_names)] = self.palette
        return colours

    def train_images_digest(self) -> str:
        """Digest of what the networks train on: classes, images and image-level labels."""
        images = [[i.id, i.classes, sha256_of_file(i.image)] for i in self.train_images]
        return _digest([self.class_names, images])

    def masks_digest(self, items: tuple[Item, ...]) -> str:
        """Digest of `items`, images and masks: what a stage measures on."""
        files = [[i.id, sha256_of_file(i.image), i.mask and i.mask.digest()] for i in items]
        return _digest([self.class_names, files])

    def corrections_input(self, items: tuple[Item, ...]) -> dict[str, str]:
        """The input of a stage that uses the corrections of `items`; empty without any."""
        used = [[item.id, self.corrections[item.id].digest()] for item in items if item.id in self.corrections]
        return {"corrections": _digest(used)} if used else {}

    def corrected_mask(self, item: Item, size: tuple[int, int]) -> UInt8 | None:
        """The correction of an image as class ids uint8 [*size], 255 where they are unknown; None without one."""
        found = self.corrections.get(item.id)
        return None if found is None else resize_mask(found.read(), size)


def log_findings(findings: Iterable[Finding]) -> None:
    """Log each finding in one line."""
    for finding in findings:
        log.log(logging.WARNING if finding.is_warning else logging.INFO, str(finding))


def read_working_image(path: Path, long_side: int, *, enlarge: float = MAX_ENLARGEMENT) -> UInt8:
    """Read an image as the networks see it: uint8 RGB [H, W, 3] at its working size.

    Every stage and the exporter read images here, so that maps and masks of one image have one size; samples are not
    enlarged (`enlarge` = 1), because augmentation resizes them. Raises ImageError.
    """
    rgb = read_image(path).rgb
    return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side, enlarge=enlarge))


def with_masks(name: str, items: Iterable[Item], findings: list[Finding]) -> tuple[Item, ...]:
    """The items of the list `name` that have a mask; the others become a finding."""
    items = tuple(items)
    without = tuple(item.id for item in items if not item.mask)
    if without:
        text = f"{name}: {len(without)} of {len(items)} images have no mask and are not measured on"
        findings.append(Finding(text, without))
    return tuple(item for item in items if item.mask)


def complete(dataset: Dataset, findings: list[Finding]) -> Dataset:
    """Add the findings about labels. Raises DatasetError when no image has one."""
    names = dataset.class_names[1:]
    shown = {class_id for item in dataset.train_images for class_id in item.classes}
    if not shown:
        raise DatasetError(
            f"{dataset.root}: none of the {pluralize(len(dataset.train_images), 'image')} to train on has a label, "
            f"expected some of {', '.join(names)}: correct the labels, or name their classes in classes.txt"
            + "".join(f" ({finding})" for finding in findings if finding.names and NO_CLASS in finding.text)
        )
    without = [item.id for item in dataset.train_images if not item.classes]
    unseen = [name for class_id, name in enumerate(names, 1) if class_id not in shown]
    findings += [
        make_finding("image", "to train on without any class", without),
        make_finding("class", "that no image to train on shows", unseen, plural="classes", is_warning=True),
    ]
    return replace(dataset, findings=tuple(finding for finding in findings if finding.names))


def make_finding(noun: str, rest: str, names: Iterable[str], plural: str = "", *, is_warning: bool = False) -> Finding:
    """A finding that begins with the number of `names`."""
    entries = tuple(names)
    count = f"{len(entries)} {plural}" if plural and len(entries) != 1 else pluralize(len(entries), noun)
    return Finding(f"{count} {rest}", entries, is_warning)


def read_class_names(root: Path) -> tuple[str, ...]:
    """The names in classes.txt, background first; empty without that file. Raises DatasetError."""
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    names = tuple(normal_name(line) for _, line in read_lines(path))
    if not 2 <= len(names) <= MAX_CLASSES or names[0] != "background" or len(set(names)) < len(names):
        raise DatasetError(
            f"{path}: got {pluralize(len(names), 'name')} ({format_examples(names)}), expected 'background', then 1 to "
            f"{MAX_CLASSES - 1} other names, none of them twice"
        )
    return names


def class_ids(classes: Iterable[str], names: tuple[str, ...]) -> tuple[int, ...]:
    """The ids of classes, ascending."""
    return tuple(sorted(names.index(name) for name in classes))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers; Unicode NFC, without blanks at both ends."""
    try:
        text = read_user_text(path)
    except UsageError as error:  # of the data set here, not of an argument
        raise DatasetError(str(error)) from error
    # A file that was joined from others has several byte order marks.
    stripped = ((number, nfc(line).strip("\ufeff \t")) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if line]


def nfc(text: str) -> str:
    """Compose accents, as names are compared."""
    return unicodedata.normalize("NFC", text)


def spread(elements: Sequence[Element], count: int) -> tuple[Element, ...]:
    """At most `count` of the elements, evenly spaced: lists are often sorted by year or place."""
    count = min(count, len(elements))
    return tuple(elements[place * len(elements) // count] for place in range(count))


def _digest(value: object) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())
