"""Data sets: the VOC devkit layout and a plain folder with a label table, read into one description."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import DatasetError
from multisa.runtime.files import sha256_of_bytes, sha256_of_file
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import log
from multisa.runtime.sources.folders import list_images

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One photograph of a data set."""

    id: str
    image: Path
    classes: tuple[int, ...]  # foreground class ids of its image-level label, ascending
    mask: Path | None  # ground truth, for evaluation only


@dataclass(frozen=True)
class DataSet:
    """A weakly labelled data set and what may be used to evaluate on it."""

    root: Path
    class_names: tuple[str, ...]  # background first
    weak: tuple[Item, ...]  # trained on, by image-level labels
    train: tuple[Item, ...]  # the part of `weak` whose masks measure pseudo-masks; empty without masks
    val: tuple[Item, ...]  # photographs with masks, measured once at the end; may be empty

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """A colour for each class: VOC's by class name if VOC has them all, else by index."""
        colours = voc_palette()
        known = set(self.class_names) <= set(VOC_CLASSES)
        indices = [VOC_CLASSES.index(name) if known else i for i, name in enumerate(self.class_names)]
        rows = colours[indices].tolist()
        return tuple((red, green, blue) for red, green, blue in rows)

    @property
    def mask_palette(self) -> npt.NDArray[np.uint8]:
        """Colours for mask files, uint8 [256, 3]."""
        colours = voc_palette()
        colours[: len(self.class_names)] = self.palette
        return colours

    def weak_digest(self) -> str:
        """Digest of what is trained on: classes, photographs and image-level labels."""
        return _digest([self.class_names, [[i.id, i.classes, sha256_of_file(i.image)] for i in self.weak]])

    def masks_digest(self, items: tuple[Item, ...]) -> str:
        """Digest of photographs with their masks: what is measured on."""
        files = [[i.id, sha256_of_file(i.image), i.mask and sha256_of_file(i.mask)] for i in items]
        return _digest([self.class_names, files])


def read_dataset(root: Path, labels: Path | None = None) -> DataSet:
    """Read a data set folder.

    VOC layout: JPEGImages/, ImageSets/Segmentation/{train_aug,train,val}.txt, SegmentationClass/*.png (for
    evaluation), and image-level labels from labels.json, labels.csv or Annotations/*.xml, in that order.
    Otherwise a plain folder of photographs with `labels.csv` or `labels.json` (or the file `labels`); all of
    them are trained on and nothing is evaluated. Class names come from classes.txt (background first), else
    VOC's. Raises DatasetError for anything missing or inconsistent.
    """
    if not root.is_dir():
        raise DatasetError(
            f"{root}: not a folder; expected a data set in VOC layout or a folder of photographs"
        )
    if (root / "JPEGImages").is_dir():
        return _read_voc(root, labels)
    return _read_folder(root, labels)


def _read_voc(root: Path, labels: Path | None) -> DataSet:
    names = _class_names(root) or VOC_CLASSES
    train = _read_list(root, "train")
    weak = _read_list(root, "train_aug") or train
    if not weak:
        raise DatasetError(
            f"{root}/ImageSets/Segmentation: neither train_aug.txt nor train.txt; one is needed"
        )
    val = _read_list(root, "val")
    _check_lists(root, weak, train, val)
    relatives = [f"JPEGImages/{name}.jpg" for name in weak]
    table = _label_file(root, labels)
    if table:
        classes = _classes_from_table(table, names, relatives)
    else:
        classes = [_classes_from_xml(root, name, names) for name in weak]
    weak_items = [_voc_item(root, name, ids) for name, ids in zip(weak, classes, strict=True)]
    val_items = [_voc_item(root, name, ()) for name in val]
    chosen = set(train)
    train_items = [item for item in weak_items if item.id in chosen]
    return DataSet(
        root, names, tuple(weak_items), _with_masks("train", train_items), _with_masks("val", val_items)
    )


def _check_lists(root: Path, weak: list[str], train: list[str], val: list[str]) -> None:
    folder = root / "ImageSets" / "Segmentation"
    beyond = sorted(set(train) - set(weak))
    if beyond:
        raise DatasetError(
            f"{folder}/train.txt: {len(beyond)} names are not in train_aug.txt, among them {beyond[0]}; "
            "expected all of them there: only what has a pseudo-mask can be measured"
        )
    both = sorted(set(weak) & set(val))
    if both:
        raise DatasetError(
            f"{folder}/val.txt: {len(both)} names are trained on, too, among them {both[0]}; expected none: "
            "take them out of one list"
        )


def _with_masks(name: str, items: list[Item]) -> tuple[Item, ...]:
    found = tuple(item for item in items if item.mask)
    if len(found) < len(items):
        log.info(
            f"{name}: {len(items) - len(found)} of {len(items)} photographs have no mask and measure nothing"
        )
    return found


def _voc_item(root: Path, name: str, class_ids: tuple[int, ...]) -> Item:
    image = root / "JPEGImages" / f"{name}.jpg"
    if not image.is_file():
        raise DatasetError(f"{image}: listed in ImageSets/Segmentation but missing")
    mask = root / "SegmentationClass" / f"{name}.png"
    return Item(name, image, class_ids, mask if mask.is_file() else None)


def _read_folder(root: Path, labels: Path | None) -> DataSet:
    table = _label_file(root, labels)
    if table is None:
        raise DatasetError(
            f"{root}: no labels.csv or labels.json; write one (header image,labels) or give --labels"
        )
    names = _class_names(root)
    if not names:
        raise DatasetError(f"{root}: no classes.txt; write one class a line, 'background' first")
    images = list_images(root).images
    classes = _classes_from_table(table, names, [image.relative for image in images])
    # One flat folder a stage: the photographs' folders become part of the names.
    ids = [image.name.replace("/", "__") for image in images]
    if len(set(ids)) < len(ids):
        raise DatasetError(f"{root}: two photographs would share a name once '/' is written '__'; rename one")
    items = zip(ids, images, classes, strict=True)
    return DataSet(root, names, tuple(Item(i, image.path, c, None) for i, image, c in items), (), ())


def _label_file(root: Path, labels: Path | None) -> Path | None:
    if labels is not None:
        return labels
    return next((p for p in (root / "labels.json", root / "labels.csv") if p.is_file()), None)


def _classes_from_table(table: Path, names: tuple[str, ...], relatives: list[str]) -> list[tuple[int, ...]]:
    rows = read_image_labels(table, names[1:])
    matched = rows.match(relatives)
    missing = [relative for relative in relatives if relative not in matched]
    if missing:
        raise DatasetError(f"{table}: no row for {len(missing)} photographs, among them {missing[0]}")
    return [_class_ids(matched[relative], names) for relative in relatives]


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = tuple(line.strip() for line in lines if line.strip())
    if path.is_file() and (
        len(names) < 2 or names[0] != "background" or len(set(names)) < len(names) or len(names) > 255
    ):
        raise DatasetError(f"{path}: expected 'background', then 1 to 254 other names, none twice")
    return names


def _class_ids(classes: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(names.index(name) for name in classes))


def _read_list(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    strange = [entry for entry in names if "/" in entry or entry.startswith(".")]
    if strange or len(set(names)) < len(names):
        raise DatasetError(f"{path}: expected one plain image name a line, none twice")
    return names


def _classes_from_xml(root: Path, name: str, names: tuple[str, ...]) -> tuple[int, ...]:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise DatasetError(
            f"{root}: no labels.json, no labels.csv and no {path.relative_to(root)}; one is needed"
        )
    if path.stat().st_size > 1_000_000:
        raise DatasetError(f"{path}: over 1 MB, not a VOC annotation")
    try:
        objects = ElementTree.parse(path).getroot().iter("object")
        found = {str(entry.findtext("name")) for entry in objects}
    except ElementTree.ParseError as error:
        raise DatasetError(f"{path}: not valid XML: {error}") from error
    # A data set cut to some classes leaves the others out of its names.
    return _class_ids(sorted(found & set(names[1:])), names)


def _digest(value: object) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())
