"""VOC's layout: JPEGImages/, ImageSets/Segmentation/, SegmentationClass/, Annotations/."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from multisa.runtime.errors import DatasetError
from multisa.runtime.image_labels import ClassNames, normal_name
from multisa.runtime.imaging.decode import EXTENSIONS
from multisa.runtime.progress import pluralize
from multisa.runtime.sources.storage import is_image, printable
from multisa.training.annotations.base import Mask, MaskFile
from multisa.training.annotations.registry import find_annotations
from multisa.training.data.dataset import (
    NO_CLASS,
    VOC_CLASSES,
    Dataset,
    Finding,
    Item,
    class_ids,
    complete,
    make_finding,
    nfc,
    read_class_names,
    read_lines,
    with_masks,
)
from multisa.training.data.labels import Paths, find_masks, held_out, label_file, read_labels

MAX_ANNOTATION_BYTES = 1_000_000  # VOC's own annotations have a few kilobytes
SBD_MASKS = "SegmentationClassAug"  # where the masks of SBD are usually put
VOC_ENTRIES = (
    "JPEGImages", "SegmentationClass", SBD_MASKS, "ImageSets", "Annotations", "classes.txt", "labels.json",
    "labels.csv",
)  # fmt: skip
SBD_LISTS = ("train_aug", "trainaug")  # the usual names of the list of VOC's and SBD's images

# A line of DeepLab's lists: "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png".
_PAIR = re.compile(rf"/?JPEGImages/([^/\s]+) /?(?:SegmentationClass|{SBD_MASKS})/[^/\s]+\.png")


def read_voc(root: Path, labels: Path | None, val: Path | None) -> Dataset:
    """Read VOC's layout; see `read_dataset`."""
    findings: list[Finding] = []
    table, others = label_file(root, labels)
    if table is None and not (root / "Annotations").is_dir():
        raise DatasetError(f"{root}: no labels.json, no labels.csv and no Annotations/*.xml; one is needed")
    names = read_class_names(root) or VOC_CLASSES
    images = _files_by_stem(root / "JPEGImages", EXTENSIONS, findings)
    relatives = {name: f"JPEGImages/{paths[0].name}" for name, paths in images.items()}
    held = held_out(val, Paths(root, relatives), names, findings)
    on_val = list(held) if val else _read_list(root, "val", images, findings)
    lists = root / "ImageSets" / "Segmentation"
    sbd = next((name for name in SBD_LISTS if (lists / f"{name}.txt").is_file()), SBD_LISTS[0])
    train, train_aug = (
        [n for n in _read_list(root, name, images, findings) if n not in held] for name in ("train", sbd)
    )
    trained_on = train_aug or train
    if not trained_on:
        raise DatasetError(f"{lists}: got no image name in train_aug.txt or train.txt, expected one in either: add it")
    _check_lists(root, trained_on, train, on_val)
    own_masks, sbd_masks = (
        _files_by_stem(root / folder, {".png"}, findings) for folder in ("SegmentationClass", SBD_MASKS)
    )
    masks = {**sbd_masks, **own_masks}
    if not (lists / "train.txt").is_file() and sbd_masks:
        train = trained_on
    drawn: Mapping[str, Mask] = {}
    if table is None:
        classes = _classes_from_xml(root, trained_on, names, images, findings)
    else:
        annotations = find_annotations(table, names)
        paths = Paths(root, {n: f"JPEGImages/{_one_file(images[n]).name}" for n in trained_on})
        unused = [f"JPEGImages/{name}" for name in _names(images, paths.images)]
        classes = read_labels(table, annotations, names, replace(paths, others=unused), findings)
        drawn = find_masks(annotations, Paths(root, relatives), findings) if annotations else {}
    listed, measured = {*trained_on, *on_val}, {*train, *on_val}
    stages = f"{sbd}.txt" if train_aug else "train.txt"
    read = {lists / f"{sbd}.txt", lists / "train.txt", val or lists / "val.txt", table}
    besides = [*_names(own_masks, measured), *_names(sbd_masks, measured - own_masks.keys())]
    findings += [
        make_finding("label source", "not read, because another one is used", others),
        *_unread(root, read),
        make_finding(
            "image", f"in neither {stages} nor {val.name if val else 'val.txt'}, not used", _names(images, listed)
        ),
        make_finding("mask", "besides those of train.txt and val.txt, not used", besides),
    ]

    def items(of: Sequence[str]) -> list[Item]:
        own: dict[str, Mask] = {n: MaskFile(_one_file(masks[n])) for n in of if n in masks}
        found = ((n, held.get(n) or own.get(n) or drawn.get(n)) for n in of)
        return [Item(n, _one_file(images[n]), classes.get(n, ()), mask) for n, mask in found]

    measured_train, measured_val = (
        with_masks(*group, findings) for group in (("train", items(train)), ("val", items(on_val)))
    )
    return complete(Dataset(root, names, tuple(items(trained_on)), measured_train, measured_val), findings)


def _unread(root: Path, read: Collection[Path | None]) -> list[Finding]:
    """What lies beside the entries, and the files in `read`."""
    others = [path for path in sorted(root.iterdir()) if path.name not in VOC_ENTRIES and path not in read]
    unread = [printable(path.name) for path in others]
    respelt = [name for name in unread if name.lower() in VOC_ENTRIES]
    in_lists = sorted((root / "ImageSets" / "Segmentation").iterdir())
    other_lists = [printable(path.name) for path in in_lists if path not in read]
    return [
        make_finding("entry", "not read, because of its capitals", respelt, plural="entries", is_warning=True),
        make_finding("entry", "beside JPEGImages, not read", [n for n in unread if n not in respelt], plural="entries"),
        make_finding("entry", "of ImageSets/Segmentation, not read", other_lists, plural="entries"),
    ]


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
            found.setdefault(nfc(path.stem), []).append(path)
    kind = {".png": "masks (PNG)", ".xml": "annotations (XML)"}.get("".join(extensions), "images")
    findings.append(make_finding("entry", f"of {folder.name} other than {kind}, not used", others, plural="entries"))
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


def _read_list(root: Path, name: str, images: dict[str, list[Path]], findings: list[Finding]) -> list[str]:
    """The images of a list, by stem. Each line names one, with its extension or without.

    The second column of VOC's lists per class (1, 0 or -1) and comments (# ..) become findings.
    """
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    names: list[str] = []
    flagged, comments = [], []
    lines = read_lines(path) if path.is_file() else []
    for number, line in lines:
        *before, last = line.rsplit(maxsplit=1)
        pair = _PAIR.fullmatch(line)
        entry = pair[1] if pair else line
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
        make_finding("line", f"of {path.name} with a second column, which is not used", flagged),
        make_finding("comment", f"in {path.name}", comments),
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
        ids[name] = class_ids({class_name for class_name in found.values() if class_name}, names)
    source = "classes.txt" if (root / "classes.txt").is_file() else "VOC"
    findings += [
        Finding(f"object {NO_CLASS} of {source} are left out", _with_counts(unknown)),
        Finding("object names are read as classes of another spelling", _with_counts(respelt)),
        make_finding("annotation", "without an object", without),
        make_finding("annotation", "about no image, not used", _names(files, images)),
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
