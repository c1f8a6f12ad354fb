"""Corrected masks: what people drew for images to train on, used instead of what the stages would make.

    dataset = add_corrections(read_dataset(Path("VOC2012")), Path("corrections"))

Affinity labels, pseudo-masks and soft targets of a corrected image come from its mask (stage_functions.py). Ground
truth of the lists train and val is never read for that, and a correction of a val image is never used.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from multisa.runtime.errors import DatasetError, ImageError, UsageError
from multisa.runtime.image_labels import without_suffix
from multisa.runtime.imaging.decode import MINIMUM_SIDE, load_image, read_mask, working_size
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.jobs.finalize import LABELS_FILE
from multisa.runtime.progress import format_examples, pluralize
from multisa.runtime.sources.storage import printable
from multisa.runtime.system import usable_cpus
from multisa.training.annotations.base import Mask, MaskFile
from multisa.training.annotations.registry import read_annotations
from multisa.training.data import Dataset, Finding, Item, log_findings, read_class_names
from multisa.training.data.dataset import make_finding
from multisa.training.data.labels import notes_of

MOST_LISTED = 20  # corrections that cannot be used, in an error message
CLASS_FILE = "classes.txt"  # in a folder of masks: the names of its ids, where they differ from the data set's


@dataclass(frozen=True)
class _Found:
    """What a source of corrections holds, before it is matched with images."""

    masks: dict[str, Mask]  # by path of the image without extension
    findings: tuple[Finding, ...]
    names: tuple[str, ...] = ()  # what the values of the files in a folder mean; empty for an export


def add_corrections(dataset: Dataset, *paths: Path, quiet: bool = False) -> Dataset:
    """Return the data set with the corrections in each of `paths`; unchanged without any.

    A path is a folder of masks, named like the images (ID.png) or lying below it as the images lie below the data set:
    palette or 8-bit grey PNGs of class ids, 255 where the class is unknown. With classes.txt in the folder, ids are
    those of its lines, else the data set's. Or a file of annotations (`multisa.training.annotations`): COCO JSON, an
    export of CVAT or Label Studio, whose classes are found by name; an image without any shape is not corrected there
    if its labels name a class. A mask has the size of its upright image, or that of the image resized to some long
    side, such as a mask of a stage.

    A class that the labels of an image lack is added to them. Every correction is used, or is in `findings`, which
    are logged unless `quiet`. Raises UsageError for a file of annotations that is damaged or of no known kind, and
    DatasetError for corrections that cannot be read, of another size, with unknown class ids, or twice for one image,
    and where none is of an image to train on.
    """
    for path in paths:
        dataset = _add(dataset, path, quiet=quiet)
    return dataset


def _add(dataset: Dataset, path: Path, *, quiet: bool) -> Dataset:
    if not path.exists():
        raise DatasetError(f"{path}: not found, expected a folder of masks named like the images, ID.png, or an export")
    found = (_read_folder if path.is_dir() else _read_export)(path, dataset)
    matched, findings = _match(dataset, path, found)
    classes = _inspect_all(dataset, path, found, matched)
    # Nobody may have looked at an image without a shape.
    blank = [item.id for item, _ in matched if not found.names and item.classes and not classes[item.id]]
    corrections = {item.id: found.masks[name] for item, name in matched if item.id not in blank}
    if not corrections:
        raise DatasetError(f"{path}: got no shape in any image to train on, expected some: annotate them")
    if twice := sorted(corrections.keys() & dataset.corrections.keys()):
        raise DatasetError(
            f"{path}: got {pluralize(len(twice), 'correction')} of images that another source corrects too "
            f"({format_examples(twice)}), expected one for each image: remove the others"
        )
    dataset, label_findings = _with_classes(dataset, {item_id: classes[item_id] for item_id in corrections})
    total = pluralize(len(dataset.train_images), "image")
    findings = [
        Finding(f"{len(corrections)} of {total} to train on corrected by {path.name}", tuple(corrections)),
        *findings,
        make_finding(
            "correction", "without any shape though the labels name a class, not used", blank, is_warning=True
        ),
        *found.findings,
        *label_findings,
    ]
    used = tuple(finding for finding in findings if finding.names)
    if not quiet:
        log_findings(used)
    both = {**dataset.corrections, **corrections}
    return replace(dataset, corrections=both, findings=(*dataset.findings, *used))


def _read_folder(path: Path, dataset: Dataset) -> _Found:
    """The masks of a folder and its folders, by path without extension."""
    if (path / LABELS_FILE).is_file():
        raise UsageError(
            f"{path}: is the output of a job, whose masks nobody has accepted yet; decide on them in its report.html "
            "and give the corrections that `multisa review` writes"
        )
    names = read_class_names(path) or dataset.class_names
    ids = [dataset.class_names.index(name) if name in dataset.class_names else 0 for name in names]
    table = b"" if names == dataset.class_names else bytes(ids).ljust(256, bytes([IGNORE_INDEX]))
    masks: dict[str, Mask] = {}
    others = []
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix.lower() == ".png" and file.is_file() and not is_hidden:
            name = relative.with_suffix("").as_posix()
            if name in masks:
                raise DatasetError(f"{file}: got another mask {name} beside it, expected one: remove one of them")
            masks[name] = MaskFile(file, table)
        elif not file.is_dir() and relative.as_posix() != CLASS_FILE:
            others.append(printable(relative.as_posix()))
    count = pluralize(len(others), "file")
    unused = Finding(f"{count} of {path.name} other than masks (PNG), not used", tuple(others))
    return _Found(masks, (unused,), names)


def _read_export(path: Path, dataset: Dataset) -> _Found:
    """The masks of a file of annotations, by the names of the images."""
    annotations = read_annotations(path, dataset.class_names)
    masks: dict[str, Mask] = {}
    without = []
    for name, image in annotations.images.items():
        key = without_suffix(name)
        if image.mask is None:
            without.append(name)
        elif key in masks:
            raise DatasetError(f"{path}: got two masks of {key}, expected one: remove one of them")
        else:
            masks[key] = image.mask
    notes = (replace(note, is_warning=True) for note in notes_of(annotations))
    return _Found(masks, (make_finding("correction", "without a mask, not used", without), *notes))


def _match(dataset: Dataset, path: Path, found: _Found) -> tuple[list[tuple[Item, str]], list[Finding]]:
    """The image to train on of each correction, and findings about the others.

    A correction belongs to the image with its path as id; otherwise to the only one with its file name.
    """
    by_id = {item.id: item for item in dataset.train_images}
    by_name = _unique_names([*dataset.train_images, *dataset.val])
    val = {item.id for item in dataset.val}
    val_names = val | {item.image.stem for item in dataset.val}
    matched: dict[str, str] = {}
    moved: list[str] = []
    measured: list[str] = []
    unused: list[str] = []
    for name in found.masks:
        last = name.rpartition("/")[2]
        key = name.replace("/", "__")
        item = by_id.get(key) or (None if key in val else by_name.get(last))
        if item is None or item.id not in by_id:
            (measured if key in val or last in val_names else unused).append(name)
            continue
        if item.id in matched:
            raise DatasetError(
                f"{path}: got the corrections {matched[item.id]} and {name} of the image {item.id}, expected one: "
                "remove one of them"
            )
        matched[item.id] = name
        moved += [f"{name} for {item.id}"] if item.id not in (name, key) else []
    if not matched:
        raise DatasetError(
            f"{path}: none of the {pluralize(len(found.masks), 'correction')} is of an image to train on, expected "
            f"names such as {dataset.train_images[0].id}.png (got {format_examples([*measured, *unused]) or 'nothing'})"
        )
    findings = [
        make_finding("correction", "matched by file name", moved),
        make_finding("correction", "of val images, not used: val only measures", measured, is_warning=True),
        make_finding("correction", "of no image to train on, not used", unused, is_warning=True),
    ]
    return [(by_id[item_id], name) for item_id, name in sorted(matched.items())], findings


def _unique_names(items: Iterable[Item]) -> dict[str, Item]:
    """The items by the file name of their image without extension, where only one has it."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.image.stem, []).append(item)
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def _inspect_all(
    dataset: Dataset, path: Path, found: _Found, matched: list[tuple[Item, str]]
) -> dict[str, tuple[int, ...]]:
    """The foreground classes in the correction of each image, by its id. Raises DatasetError."""

    def inspect(pair: tuple[Item, str]) -> tuple[int, ...] | str:
        try:
            return _inspect(dataset, pair[0], found.masks[pair[1]], found.names)
        except (DatasetError, ImageError) as error:
            return str(error)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        results = list(pool.map(inspect, matched))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        more = len(problems) - MOST_LISTED
        listed = [*problems[:MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
        raise DatasetError(
            f"{path}: got {pluralize(len(problems), 'correction')} that cannot be used, expected none; mend or remove "
            "them:\n  " + "\n  ".join(listed)
        )
    return {item.id: each for (item, _), each in zip(matched, results, strict=True) if not isinstance(each, str)}


def _inspect(dataset: Dataset, item: Item, mask: Mask, names: tuple[str, ...]) -> tuple[int, ...]:
    """The foreground classes in the correction of an image. Raises DatasetError and ImageError."""
    if isinstance(mask, MaskFile):
        values = [int(value) for value in np.unique(read_mask(mask.path)) if value != IGNORE_INDEX]
        unknown = [v for v in values if v >= len(names) or names[v] not in dataset.class_names]
        if unknown:
            got = [f"{value} ({names[value]})" if value < len(names) else str(value) for value in unknown]
            raise DatasetError(
                f"{mask}: got class id {format_examples(got)}, which is no class of the data set, expected "
                f"0..{len(names) - 1} of {CLASS_FILE}, or {IGNORE_INDEX} where the class is unknown"
            )
    ids = mask.read()
    size = load_image(item.image, long_side=MINIMUM_SIDE).size
    longest = max(ids.shape)
    if ids.shape != size and (longest < MINIMUM_SIDE or ids.shape != working_size(*size, longest)):
        raise DatasetError(
            f"{mask}: got a mask of {ids.shape[1]} x {ids.shape[0]} pixels, expected {size[1]} x {size[0]} as its "
            f"upright image {item.image.name}, or these sides resized by one factor, as the masks of stages are"
        )
    return tuple(int(class_id) for class_id in np.unique(ids) if class_id not in (0, IGNORE_INDEX))


def _with_classes(dataset: Dataset, classes: dict[str, tuple[int, ...]]) -> tuple[Dataset, list[Finding]]:
    """Add the classes of the corrections, by image id, to the labels of the images."""
    added, absent = [], []

    def named(item: Item, class_ids: Iterable[int]) -> str:
        return f"{item.id} ({', '.join(dataset.class_names[class_id] for class_id in sorted(class_ids))})"

    def corrected(item: Item) -> Item:
        return replace(item, classes=tuple(sorted({*item.classes, *classes.get(item.id, ())})))

    for item in dataset.train_images:
        if item.id in classes:
            new, gone = set(classes[item.id]) - set(item.classes), set(item.classes) - set(classes[item.id])
            added += [named(item, new)] if new else []
            absent += [named(item, gone)] if gone else []
    findings = [
        Finding(f"{pluralize(len(added), 'image')} given a class of the correction that the labels lack", tuple(added)),
        make_finding("correction", "without a class that the labels name", absent),
    ]
    images, train = (tuple(map(corrected, items)) for items in (dataset.train_images, dataset.train))
    return replace(dataset, train_images=images, train=train), findings
