"""Data sets: the VOC devkit layout and a plain folder with a label table, read into one description."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from multisa.runtime.errors import DatasetError
from multisa.runtime.image_labels import read_image_labels
from multisa.runtime.palette import voc_palette

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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
    table = _label_file(root, labels)
    known = read_image_labels(table, names) if table else None

    def item(name: str) -> Item:
        image = root / "JPEGImages" / f"{name}.jpg"
        if not image.is_file():
            raise DatasetError(f"{image}: listed in ImageSets/Segmentation but missing")
        relative = f"JPEGImages/{name}.jpg"
        classes = known.for_image(relative) if known else _classes_from_xml(root, name, names)
        if classes is None:
            raise DatasetError(f"{table}: no row for {relative}")
        mask = root / "SegmentationClass" / f"{name}.png"
        return Item(name, image, _class_ids(classes, names), mask if mask.is_file() else None)

    weak_items, val_items = [item(n) for n in weak], [item(n) for n in val]
    chosen = set(train)
    measured = tuple(entry for entry in weak_items if entry.id in chosen and entry.mask)
    return DataSet(root, names, tuple(weak_items), measured, tuple(i for i in val_items if i.mask))


def _read_folder(root: Path, labels: Path | None) -> DataSet:
    table = _label_file(root, labels)
    if table is None:
        raise DatasetError(
            f"{root}: no labels.csv or labels.json; write one (header image,labels) or give --labels"
        )
    names = _class_names(root)
    if not names:
        raise DatasetError(f"{root}: no classes.txt; write one class a line, 'background' first")
    known = read_image_labels(table, names)
    items = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        relative = path.relative_to(root).as_posix()
        classes = known.for_image(relative)
        if classes is None:
            raise DatasetError(f"{table}: no row for {relative}; add one, or move the photograph elsewhere")
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", "__")
        items.append(Item(name, path, _class_ids(classes, names), None))
    if not items:
        raise DatasetError(f"{root}: no photographs ({', '.join(IMAGE_SUFFIXES)})")
    if len({item.id for item in items}) < len(items):
        raise DatasetError(f"{root}: two photographs differ only in their suffix; rename one")
    return DataSet(root, names, tuple(items), (), ())


def _label_file(root: Path, labels: Path | None) -> Path | None:
    if labels is not None:
        return labels
    return next((p for p in (root / "labels.json", root / "labels.csv") if p.is_file()), None)


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    names = tuple(path.read_text(encoding="utf-8").split("\n")) if path.is_file() else ()
    names = tuple(name.strip() for name in names if name.strip())
    if names and (names[0] != "background" or len(set(names)) < len(names) or len(names) > 255):
        raise DatasetError(f"{path}: expected 'background' first, no name twice and at most 255 names")
    return names


def _class_ids(classes: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(names.index(name) for name in classes))


def _read_list(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def _classes_from_xml(root: Path, name: str, names: tuple[str, ...]) -> tuple[str, ...]:
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
    return tuple(sorted(found & set(names)))
