"""Data sets: VOC devkit layout, or a plain folder with a label file, read into one description."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.files import read_user_text, sha256_of_bytes, sha256_of_file
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.imaging.decode import UInt8, read_image, resize_image, working_size
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import log
from multisa.runtime.sources.folders import list_images

Element = TypeVar("Element")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
MAX_CLASSES = 255  # ids of one byte, background counted; 255 itself marks pixels to ignore
MAX_ANNOTATION_BYTES = 1_000_000  # VOC's own annotations have a few kilobytes


@dataclass(frozen=True)
class Item:
    """One image of a data set."""

    id: str
    image: Path
    classes: tuple[int, ...]  # foreground class ids of its image-level labels, ascending
    mask: Path | None  # ground-truth mask, only measured against


@dataclass(frozen=True)
class Dataset:
    """A data set with image-level labels, and with masks to measure on where it has any."""

    root: Path
    class_names: tuple[str, ...]  # background first
    train_images: tuple[Item, ...]  # the networks train on these, with image-level labels
    train: tuple[Item, ...]  # VOC's list "train": the train images with masks to measure on; may be empty
    val: tuple[Item, ...]  # images with masks that the segmenter is evaluated on at the end; may be empty

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
        files = [[i.id, sha256_of_file(i.image), i.mask and sha256_of_file(i.mask)] for i in items]
        return _digest([self.class_names, files])


def read_dataset(root: Path, labels: Path | None = None) -> Dataset:
    """Read a data set folder.

    VOC layout: JPEGImages/, ImageSets/Segmentation/{train_aug,train,val}.txt, SegmentationClass/*.png (only
    measured against), and image-level labels from labels.json, labels.csv or Annotations/*.xml, in that
    order. train_aug.txt lists the images to train on; without it train.txt does.

    Otherwise: a plain folder of images with labels.json or labels.csv. All images are trained on and nothing
    is measured.

    `labels` replaces the data set's own label file. Class names come from classes.txt, one per line,
    background first; in VOC layout without that file they are VOC's. Text files are UTF-8. Raises
    DatasetError for anything missing or inconsistent, UsageError for a label file that cannot be used.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: not a folder; expected a data set in VOC layout or a folder of images")
    if (root / "JPEGImages").is_dir():
        return _read_voc(root, labels)
    return _read_folder(root, labels)


def read_working_image(path: Path, long_side: int) -> UInt8:
    """Read an image as the networks see it: uint8 RGB [H, W, 3], long side at most `long_side` pixels.

    Every stage and the exporter read images here, so that maps and masks of one image have one size. Raises
    ImageError.
    """
    rgb = read_image(path).rgb
    return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))


def _read_voc(root: Path, labels: Path | None) -> Dataset:
    names = _class_names(root) or VOC_CLASSES
    train = _read_list(root, "train")
    trained_on = _read_list(root, "train_aug") or train
    if not trained_on:
        raise DatasetError(f"{root}/ImageSets/Segmentation: neither train_aug.txt nor train.txt; one is needed")
    val = _read_list(root, "val")
    _check_lists(root, trained_on, train, val)
    relatives = [f"JPEGImages/{name}.jpg" for name in trained_on]
    table = _label_file(root, labels)
    if table:
        classes = _classes_from_table(table, names, relatives)
    else:
        classes = [_classes_from_xml(root, name, names) for name in trained_on]
    train_images = [_voc_item(root, name, ids) for name, ids in zip(trained_on, classes, strict=True)]
    val_items = [_voc_item(root, name, ()) for name in val]
    in_train = set(train)
    train_items = [item for item in train_images if item.id in in_train]
    measured = _with_masks("train", train_items), _with_masks("val", val_items)
    return Dataset(root, names, tuple(train_images), *measured)


def _check_lists(root: Path, trained_on: list[str], train: list[str], val: list[str]) -> None:
    folder = root / "ImageSets" / "Segmentation"
    beyond = sorted(set(train) - set(trained_on))
    if beyond:
        raise DatasetError(
            f"{folder}/train.txt: {len(beyond)} names are not in train_aug.txt, for example {beyond[0]}; "
            "expected all of them there, because only images with a pseudo-mask can be measured"
        )
    both = sorted(set(trained_on) & set(val))
    if both:
        raise DatasetError(
            f"{folder}/val.txt: {len(both)} names are also trained on, for example {both[0]}; expected none: "
            "remove them from one of the lists"
        )


def _with_masks(name: str, items: list[Item]) -> tuple[Item, ...]:
    found = tuple(item for item in items if item.mask)
    if len(found) < len(items):
        log.info(f"{name}: {len(items) - len(found)} of {len(items)} images have no mask and are not measured on")
    return found


def _voc_item(root: Path, name: str, class_ids: tuple[int, ...]) -> Item:
    image = root / "JPEGImages" / f"{name}.jpg"
    if not image.is_file():
        raise DatasetError(f"{image}: listed in ImageSets/Segmentation but missing")
    mask = root / "SegmentationClass" / f"{name}.png"
    return Item(name, image, class_ids, mask if mask.is_file() else None)


def _read_folder(root: Path, labels: Path | None) -> Dataset:
    table = _label_file(root, labels)
    if table is None:
        raise DatasetError(f"{root}: no labels.csv or labels.json; write one (header image,labels) or give --labels")
    names = _class_names(root)
    if not names:
        raise DatasetError(f"{root}: no classes.txt; write one class per line, 'background' first")
    images = list_images(root).images
    classes = _classes_from_table(table, names, [image.relative for image in images])
    # A stage has one flat folder, so the folders of an image become part of its id.
    ids = [image.name.replace("/", "__") for image in images]
    if len(set(ids)) < len(ids):
        raise DatasetError(f"{root}: two images have the same path once '/' is replaced by '__'; rename one")
    items = tuple(Item(i, image.path, c, None) for i, image, c in zip(ids, images, classes, strict=True))
    return Dataset(root, names, train_images=items, train=(), val=())


def _label_file(root: Path, labels: Path | None) -> Path | None:
    return labels or next((p for p in (root / "labels.json", root / "labels.csv") if p.is_file()), None)


def _classes_from_table(table: Path, names: tuple[str, ...], relatives: list[str]) -> list[tuple[int, ...]]:
    matcher = read_image_labels(table, names[1:]).matcher(relatives)
    labels = {relative: matcher.find(relative) for relative in relatives}
    missing = [relative for relative, found in labels.items() if found is None]
    if missing:
        raise DatasetError(f"{table}: no row for {len(missing)} images, for example {missing[0]}; add them")
    return [_class_ids(found, names) for found in labels.values() if found is not None]


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    names = tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())
    if not 2 <= len(names) <= MAX_CLASSES or names[0] != "background" or len(set(names)) < len(names):
        raise DatasetError(
            f"{path}: expected 'background', then 1 to {MAX_CLASSES - 1} other names, none of them twice"
        )
    return names


def _class_ids(classes: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(names.index(name) for name in classes))


def _read_list(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    names = _read_text(path).split() if path.is_file() else []
    strange = [entry for entry in names if "/" in entry or entry.startswith(".")]
    if strange or len(set(names)) < len(names):
        raise DatasetError(f"{path}: expected one image name per line, without a folder, none of them twice")
    return names


def _classes_from_xml(root: Path, name: str, names: tuple[str, ...]) -> tuple[int, ...]:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise DatasetError(f"{root}: no labels.json, no labels.csv and no {path.relative_to(root)}; one is needed")
    if path.stat().st_size > MAX_ANNOTATION_BYTES:
        raise DatasetError(f"{path}: over {MAX_ANNOTATION_BYTES // 1_000_000} MB, not a VOC annotation")
    try:
        objects = ElementTree.parse(path).getroot().iter("object")
        found = {str(entry.findtext("name")) for entry in objects}
    except ElementTree.ParseError as error:
        raise DatasetError(f"{path}: not valid XML: {error}") from error
    # classes.txt may name some of VOC's classes only; the others are left out.
    return _class_ids(sorted(found & set(names[1:])), names)


def spread(elements: Sequence[Element], count: int) -> tuple[Element, ...]:
    """At most `count` of the elements, evenly spaced: lists are often sorted by year or place."""
    count = min(count, len(elements))
    return tuple(elements[place * len(elements) // count] for place in range(count))


def _read_text(path: Path) -> str:
    try:
        return read_user_text(path)
    except UsageError as error:  # of the data set here, not of an argument
        raise DatasetError(str(error)) from error


def _digest(value: object) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())
