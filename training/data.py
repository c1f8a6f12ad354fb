"""Data sets: VOC devkit layout, or a plain folder with a label file, read into one description."""

import contextlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.files import read_user_text, sha256_of_bytes, sha256_of_file
from multisa.runtime.image_labels import ClassNames, normal_name, read_image_labels
from multisa.runtime.imaging.decode import EXTENSIONS, UInt8, read_image, resize_image, working_size
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.progress import format_examples, log, pluralize
from multisa.runtime.sources.folders import list_images
from multisa.runtime.sources.storage import is_image, printable

Element = TypeVar("Element")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
MAX_CLASSES = 255  # ids of one byte, background counted; 255 itself marks pixels to ignore
MAX_ANNOTATION_BYTES = 1_000_000  # VOC's own annotations have a few kilobytes
VOC_ENTRIES = (
    "JPEGImages", "SegmentationClass", "ImageSets", "Annotations", "classes.txt", "labels.json", "labels.csv",
)  # fmt: skip
NO_CLASS = "object names that are no class"  # begins the finding about them


@dataclass(frozen=True)
class Item:
    """One image of a data set."""

    id: str
    image: Path
    classes: tuple[int, ...]  # foreground class ids of its image-level labels, ascending
    mask: Path | None  # ground-truth mask, only measured against


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


def read_dataset(root: Path, labels: Path | None = None, *, quiet: bool = False) -> Dataset:
    """Read a data set folder.

    VOC layout: JPEGImages/ (one image per name, of any extension), ImageSets/Segmentation/{train_aug,train,val}.txt,
    SegmentationClass/*.png (only measured against), and image-level labels from labels.json, labels.csv or
    Annotations/*.xml, in that order. train_aug.txt lists the images to train on; without it train.txt does.

    Otherwise: a plain folder of images with labels.json or labels.csv. All images are trained on and nothing
    is measured.

    `labels` replaces the data set's own label file. Class names come from classes.txt, one per line,
    background first; in VOC layout without that file they are VOC's. Text files are UTF-8. Every label, row and
    image is used, or is in `findings`, which are logged unless `quiet`. Raises DatasetError for anything missing
    or inconsistent and where no image has a label, UsageError for a label file that cannot be used.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: not a folder; expected a data set in VOC layout or a folder of images")
    dataset = (_read_voc if (root / "JPEGImages").is_dir() else _read_folder)(root, labels)
    if not quiet:
        log_findings(dataset.findings)
    return dataset


def log_findings(findings: Iterable[Finding]) -> None:
    """Log each finding in one line."""
    for finding in findings:
        log.log(logging.WARNING if finding.is_warning else logging.INFO, str(finding))


def read_working_image(path: Path, long_side: int) -> UInt8:
    """Read an image as the networks see it: uint8 RGB [H, W, 3], long side at most `long_side` pixels.

    Every stage and the exporter read images here, so that maps and masks of one image have one size. Raises
    ImageError.
    """
    rgb = read_image(path).rgb
    return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))


def _read_voc(root: Path, labels: Path | None) -> Dataset:
    findings: list[Finding] = []
    table, others = _label_file(root, labels)
    if table is None and not (root / "Annotations").is_dir():
        raise DatasetError(f"{root}: no labels.json, no labels.csv and no Annotations/*.xml; one is needed")
    names = _class_names(root) or VOC_CLASSES
    images = _files_by_stem(root / "JPEGImages", EXTENSIONS, findings)
    masks = _files_by_stem(root / "SegmentationClass", {".png"}, findings)
    train, train_aug, val = (_read_list(root, name, images, findings) for name in ("train", "train_aug", "val"))
    trained_on = train_aug or train
    if not trained_on:
        folder = root / "ImageSets" / "Segmentation"
        raise DatasetError(f"{folder}: got no image name in train_aug.txt or train.txt, expected one in either: add it")
    _check_lists(root, trained_on, train, val)
    if table is None:
        classes = _classes_from_xml(root, trained_on, names, images, findings)
    else:
        relatives = {name: f"JPEGImages/{_one_file(images[name]).name}" for name in trained_on}
        unused = [f"JPEGImages/{name}" for name in _names(images, relatives)]
        classes = _classes_from_table(table, names, _Paths(root, relatives, unused), findings)
    stages = "train_aug.txt" if train_aug else "train.txt"
    unread = [printable(path.name) for path in sorted(root.iterdir()) if path.name not in VOC_ENTRIES and path != table]
    respelt = [name for name in unread if name.lower() in VOC_ENTRIES]
    lists = sorted((root / "ImageSets" / "Segmentation").iterdir())
    other_lists = [printable(p.name) for p in lists if p.name not in ("train.txt", "train_aug.txt", "val.txt")]
    listed, measured = {*trained_on, *val}, {*train, *val}
    findings += [
        _finding("label source", "not read, because another one is used", others),
        replace(_finding("entry", "not read, because of its capitals", respelt, plural="entries"), is_warning=True),
        _finding("entry", "beside JPEGImages, not read", [n for n in unread if n not in respelt], plural="entries"),
        _finding("entry", "of ImageSets/Segmentation, not read", other_lists, plural="entries"),
        _finding("image", f"in neither {stages} nor val.txt, not used", _names(images, listed)),
        _finding("mask", "besides those of train.txt and val.txt, not used", _names(masks, measured)),
    ]

    def items(of: Iterable[str]) -> list[Item]:
        return [
            Item(n, _one_file(images[n]), classes.get(n, ()), _one_file(masks[n]) if n in masks else None) for n in of
        ]

    on_train, on_val = (_with_masks(*group, findings) for group in (("train", items(train)), ("val", items(val))))
    return _complete(Dataset(root, names, tuple(items(trained_on)), on_train, on_val), findings)


def _files_by_stem(folder: Path, extensions: Collection[str], findings: list[Finding]) -> dict[str, list[Path]]:
    """The files of a folder by stem (Unicode NFC), sorted; entries of other kinds become a finding."""
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = printable(path.name)
        if name.startswith("."):
            others.append(f"{name} (hidden)")
        elif not path.is_file():
            others.append(f"{name} ({'folder' if path.is_dir() else 'broken link or no regular file'})")
        elif path.suffix.lower() not in extensions:
            others.append(name)
        else:
            found.setdefault(_nfc(path.stem), []).append(path)
    kind = {".png": "masks (PNG)", ".xml": "annotations (XML)"}.get("".join(extensions), "images")
    findings.append(_finding("entry", f"of {folder.name} other than {kind}, not used", others, plural="entries"))
    return found


def _one_file(paths: list[Path]) -> Path:
    if len(paths) > 1:
        others = ", ".join(path.name for path in paths[1:])
        raise DatasetError(
            f"{paths[0]}: got {others} beside it, expected one file of this name: remove or rename others"
        )
    return paths[0]


def _names(files: dict[str, list[Path]], used: Collection[str]) -> list[str]:
    return [printable(path.name) for name, paths in files.items() if name not in used for path in paths]


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


def _with_masks(name: str, items: list[Item], findings: list[Finding]) -> tuple[Item, ...]:
    without = tuple(item.id for item in items if not item.mask)
    if without:
        text = f"{name}: {len(without)} of {len(items)} images have no mask and are not measured on"
        findings.append(Finding(text, without))
    return tuple(item for item in items if item.mask)


def _read_folder(root: Path, labels: Path | None) -> Dataset:
    table, others = _label_file(root, labels)
    if table is None:
        raise DatasetError(f"{root}: no labels.csv or labels.json; write one (header image,labels) or give --labels")
    names = _class_names(root)
    if not names:
        raise DatasetError(f"{root}: no classes.txt; write one class per line, 'background' first")
    found = list_images(root)
    # A stage has one flat folder, so the folders of an image become part of its id.
    ids = [_nfc(image.name.replace("/", "__")) for image in found.images]
    relatives: dict[str, str] = {}
    for i, image in zip(ids, found.images, strict=True):
        if relatives.setdefault(i, image.relative) != image.relative:
            raise DatasetError(
                f"{root}: {relatives[i]} and {image.relative} are the same once '/' is replaced by '__'; rename one"
            )
    skipped = [f"{entry.id} ({entry.reason})" for entry in found.skipped]
    known = {"classes.txt", *others, *((table.name,) if table.parent == root else ())}
    findings = [
        _finding("label source", "not read, because another one is used", others),
        _finding("entry", "of the folder, not read", skipped, plural="entries"),
        _finding("file", "of another extension than an image's, not used", [n for n in found.others if n not in known]),
    ]
    classes = _classes_from_table(table, names, _Paths(root, relatives), findings)
    items = tuple(Item(i, image.path, classes[i], None) for i, image in zip(ids, found.images, strict=True))
    return _complete(Dataset(root, names, train_images=items, train=(), val=()), findings)


def _complete(dataset: Dataset, findings: list[Finding]) -> Dataset:
    """Add the findings about labels. Raises DatasetError when no image has one."""
    names = dataset.class_names[1:]
    shown = {class_id for item in dataset.train_images for class_id in item.classes}
    if not shown:
        raise DatasetError(
            f"{dataset.root}: none of the {pluralize(len(dataset.train_images), 'image')} to train on has a label, "
            f"expected some of {', '.join(names)}: correct the labels, or name their classes in classes.txt"
            + "".join(f" ({finding})" for finding in findings if finding.names and finding.text.startswith(NO_CLASS))
        )
    without = [item.id for item in dataset.train_images if not item.classes]
    unseen = [name for class_id, name in enumerate(names, 1) if class_id not in shown]
    nowhere = _finding("class", "that no image to train on shows", unseen, plural="classes")
    findings += [_finding("image", "to train on without any class", without), replace(nowhere, is_warning=True)]
    return replace(dataset, findings=tuple(finding for finding in findings if finding.names))


def _finding(noun: str, rest: str, names: Iterable[str], plural: str = "") -> Finding:
    entries = tuple(names)
    count = f"{len(entries)} {plural}" if plural and len(entries) != 1 else pluralize(len(entries), noun)
    return Finding(f"{count} {rest}", entries)


def _label_file(root: Path, labels: Path | None) -> tuple[Path | None, list[str]]:
    """The label file to read, if there is one, and the names of the data set's other sources of labels."""
    names = ("labels.json", "labels.csv", "Annotations")
    own = [root / name for name in names if (root / name).is_file() or (name == names[-1] and (root / name).is_dir())]
    used = labels or next(iter(own), None)
    others = [path.name for path in own if path != used]
    return (used if labels or (used and used.is_file()) else None), others


@dataclass(frozen=True)
class _Paths:
    """Posix paths of the images below the data set's folder."""

    root: Path
    trained_on: dict[str, str]  # by image id
    others: Sequence[str] = ()


def _classes_from_table(
    table: Path, names: tuple[str, ...], paths: _Paths, findings: list[Finding]
) -> dict[str, tuple[int, ...]]:
    """Class ids by image id, from a label file."""
    every = (*paths.trained_on.values(), *paths.others)
    matcher = read_image_labels(table, names[1:]).matcher(every, root=paths.root.resolve().name)
    labels = {name: matcher.find(relative) for name, relative in paths.trained_on.items()}
    missing = [paths.trained_on[name] for name, found in labels.items() if found is None]
    if missing:
        unused = matcher.unused()
        rows = f" (rows about no image: {format_examples(unused)})" if unused else ""
        raise DatasetError(
            f"{table}: no row for {pluralize(len(missing), 'image')}, for example {missing[0]}{rows}; expected paths "
            "below the data set's folder, or file names: add or correct the rows"
        )
    moved = [f"{key} for {relative}" for key, relative in matcher.moved.items()]
    not_trained_on = []
    for relative in paths.others:
        with contextlib.suppress(UsageError):  # rows about images that are not used may contradict each other
            if matcher.find(relative) is not None:
                not_trained_on.append(relative)
    findings += [
        _finding("row", f"of {table.name} with another folder, matched by file name", moved),
        _finding("image", f"labelled in {table.name} but not trained on", not_trained_on),
        _finding("row", f"of {table.name} about no image, not used", matcher.unused()),
    ]
    return {name: _class_ids(found, names) for name, found in labels.items() if found is not None}


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    names = tuple(normal_name(line) for _, line in _lines(path))
    if not 2 <= len(names) <= MAX_CLASSES or names[0] != "background" or len(set(names)) < len(names):
        raise DatasetError(
            f"{path}: got {pluralize(len(names), 'name')} ({format_examples(names)}), expected 'background', then 1 to "
            f"{MAX_CLASSES - 1} other names, none of them twice"
        )
    return names


def _class_ids(classes: Iterable[str], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(names.index(name) for name in classes))


def _read_list(root: Path, name: str, images: dict[str, list[Path]], findings: list[Finding]) -> list[str]:
    """The images of a list, by stem. Each line names one, with its extension or without.

    The second column of VOC's lists per class (1, 0 or -1) and comments (# ..) become findings.
    """
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    names: list[str] = []
    flagged, comments = [], []
    lines = _lines(path) if path.is_file() else []
    for number, line in lines:
        *before, last = line.rsplit(maxsplit=1)
        entry = line
        if before and last in ("1", "0", "-1") and line not in images:
            entry = before[0]
            flagged.append(line)
        stem = entry.rpartition(".")[0]
        if entry not in images and stem in images and is_image(entry):
            entry = stem
        if entry.startswith("#") and entry not in images:
            comments.append(line)
            continue
        if entry not in images and (entry.startswith(".") or set(entry) & set("/\\ \t")):
            raise DatasetError(
                f"{path}, line {number}: got {line!r}, expected the name of one image in JPEGImages, without folder "
                "and extension: write one name per line"
            )
        names.append(entry)
    if len(set(names)) < len(names):
        twice = next(entry for entry, count in Counter(names).items() if count > 1)
        raise DatasetError(f"{path}: got {twice} more than once, expected each image once: remove the other lines")
    missing = [entry for entry in names if entry not in images]
    if missing:
        raise DatasetError(
            f"{root / 'JPEGImages' / missing[0]}.jpg: listed in {path.name} but missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; expected a file of that name, "
            "with any extension of an image: add it, or remove the name from the list"
        )
    findings += [
        _finding("line", f"of {path.name} with a second column, which is not used", flagged),
        _finding("comment", f"in {path.name}", comments),
        Finding(f"{path.name} names no image", (path.name,) if path.is_file() and not names else ()),
    ]
    return names


def _classes_from_xml(
    root: Path, trained_on: list[str], names: tuple[str, ...], images: Collection[str], findings: list[Finding]
) -> dict[str, tuple[int, ...]]:
    """Class ids by image id, from Annotations/*.xml."""
    files = _files_by_stem(root / "Annotations", {".xml"}, findings)
    classes = ClassNames(names[1:])
    respelt: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    without, ids = [], {}
    missing = [name for name in trained_on if name not in files]
    if missing:
        raise DatasetError(
            f"{root / 'Annotations'}: {len(missing)} of {pluralize(len(trained_on), 'annotation')} are missing, for "
            f"example {missing[0]}.xml; expected one for each image to train on: add them, labels.csv or labels.json"
        )
    for name in trained_on:
        objects = _object_names(_one_file(files[name]))
        without += [] if objects else [name]
        found = {entry: classes.find(entry) for entry in objects}
        # classes.txt may name some of VOC's classes only.
        unknown.update(entry for entry, class_name in found.items() if class_name is None)
        respelt.update(f"{entry} for {known}" for entry, known in found.items() if known and known != entry)
        ids[name] = _class_ids({class_name for class_name in found.values() if class_name}, names)
    source = "classes.txt" if (root / "classes.txt").is_file() else "VOC"
    findings += [
        Finding(f"{NO_CLASS} of {source} are left out", _with_counts(unknown)),
        Finding("object names are read as classes of another spelling", _with_counts(respelt)),
        _finding("annotation", "without an object", without),
        _finding("annotation", "about no image, not used", _names(files, images)),
    ]
    return ids


def _with_counts(entries: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{entry} in {pluralize(count, 'image')}" for entry, count in entries.most_common())


def _object_names(path: Path) -> set[str]:
    """The names of the objects of a VOC annotation, with or without XML namespaces, blanks collapsed."""
    if path.stat().st_size > MAX_ANNOTATION_BYTES:
        raise DatasetError(f"{path}: over {MAX_ANNOTATION_BYTES // 1_000_000} MB, not a VOC annotation")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter for its encoding
        raise DatasetError(f"{path}: not valid XML: {error}") from error
    objects = [entry.findall("{*}name") for entry in root.iterfind(".//{*}object")]
    texts = [name.text or "" for names in objects for name in names] + [""] * objects.count([])
    return {normal_name(text) or "(no name)" for text in texts}


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers; Unicode NFC, without blanks at both ends."""
    try:
        text = read_user_text(path)
    except UsageError as error:  # of the data set here, not of an argument
        raise DatasetError(str(error)) from error
    # A file that was joined from others has several byte order marks.
    stripped = ((number, _nfc(line).strip("\ufeff \t")) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if line]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def spread(elements: Sequence[Element], count: int) -> tuple[Element, ...]:
    """At most `count` of the elements, evenly spaced: lists are often sorted by year or place."""
    count = min(count, len(elements))
    return tuple(elements[place * len(elements) // count] for place in range(count))


def _digest(value: object) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())
