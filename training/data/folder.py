"""A folder of images: with a label file, with annotations, or in COCO's layout; with masks/ beside images/, or not."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from multisa.runtime.errors import DatasetError
from multisa.runtime.progress import format_examples, pluralize
from multisa.runtime.sources.folders import ListedImages, list_images
from multisa.training.annotations.base import Annotations, Mask
from multisa.training.annotations.masks import read_masks
from multisa.training.annotations.registry import find_annotations
from multisa.training.data.dataset import (
    Dataset,
    Finding,
    Item,
    complete,
    make_finding,
    nfc,
    read_class_names,
    with_masks,
)
from multisa.training.data.labels import Paths, find_masks, held_out, label_file, read_labels

_INSTANCES = "instances_"  # begins the names of COCO's files


def read_folder(root: Path, labels: Path | None, val: Path | None) -> Dataset:
    """Read a folder; see `read_dataset`."""
    table, others = label_file(root, labels)
    instances, coco_val = (None, None) if label_file(root, None)[0] else _find_instances(root)
    source, val = table or instances, val or coco_val
    if source is None:
        raise DatasetError(
            f"{root}: no labels.csv, labels.json or annotations/instances_train*.json; write a label file (header "
            "image,labels) or give --labels"
        )
    names = read_class_names(root)
    listed = find_annotations(instances, names) if instances else None
    names = names or (listed.class_names if listed else ())
    annotations = listed if source == instances else find_annotations(source, names)
    names = names or (annotations.class_names if annotations else ())
    if not names:
        raise DatasetError(f"{root}: no classes.txt; write one class per line, 'background' first")
    found = list_images(root)
    files, masked = _by_id(root, found)
    read = [p.relative_to(root).as_posix() for p in (source, instances, val) if p and p.is_relative_to(root)]
    others_used = {"classes.txt", *others, *read}
    skipped = [f"{entry.id} ({entry.reason})" for entry in found.skipped]
    unread = [name for name in found.others if name not in others_used]
    findings = [
        make_finding("label source", "not read, because another one is used", others),
        make_finding("entry", "of the folder, not read", skipped, plural="entries"),
        make_finding("file", "of another extension than an image's, not used", unread),
    ]
    paths = Paths(root, files)
    below = _below(instances, files)
    held = held_out(val, replace(paths, images=_below(val, files)), names, findings)
    trained_on = _listed(listed, below, paths) if listed else files
    trained_on = {i: relative for i, relative in trained_on.items() if i not in held}
    rest = [relative for i, relative in files.items() if i not in trained_on]
    if listed:
        unlisted = [relative for i, relative in files.items() if i not in trained_on and i not in held]
        findings.append(make_finding("image", "in no file of annotations, not used", unlisted))
    classes = read_labels(source, annotations, names, Paths(root, trained_on, rest), findings)
    drawn = listed or annotations
    masks = find_masks(drawn, replace(paths, images=below), findings) if drawn else {}
    if masked:
        masks |= _own_masks(root, names, files, findings)
    items = tuple(Item(i, root / relative, classes[i], masks.get(i)) for i, relative in trained_on.items())
    on_train = with_masks("train", items, findings) if masks.keys() & trained_on.keys() else ()
    on_val = with_masks("val", (Item(i, root / files[i], (), m or masks.get(i)) for i, m in held.items()), findings)
    return complete(Dataset(root, names, items, on_train, on_val), findings)


def read_val_folder(val: Path, names: tuple[str, ...]) -> tuple[tuple[Item, ...], list[Finding]]:
    """The images of a folder with images/ and masks/ to measure on, and findings. Raises DatasetError without masks."""
    found = list_images(val)
    files, masked = _by_id(val, found)
    findings: list[Finding] = []
    masks = _own_masks(val, names, files, findings) if masked else {}
    # Other ids than those of images to train on.
    items = [Item(f"val__{i}", val / relative, (), masks.get(i)) for i, relative in files.items()]
    measured = with_masks("val", items, findings)
    if not measured:
        raise DatasetError(f"{val}: got no image with a mask, expected images/ and masks/ with the same names in both")
    others = (*found.others, *(f"{entry.id} ({entry.reason})" for entry in found.skipped))
    findings.append(make_finding("entry", f"of {val.name}, not used", others, plural="entries"))
    return measured, findings


def _by_id(root: Path, found: ListedImages) -> tuple[dict[str, str], bool]:
    """The relative paths of the images by id, and whether they have masks in a folder, which are no images then."""
    masked = (root / "images").is_dir() and (root / "masks").is_dir()
    relatives: dict[str, str] = {}
    for image in found.images:
        if masked and image.relative.startswith("masks/"):
            continue
        # A stage has one flat folder, so the folders of an image become part of its id.
        i = nfc(image.name.replace("/", "__"))
        if relatives.setdefault(i, image.relative) != image.relative:
            raise DatasetError(
                f"{root}: {relatives[i]} and {image.relative} are the same once '/' is replaced by '__'; rename one"
            )
    return relatives, masked


def _own_masks(
    root: Path, names: tuple[str, ...], files: Mapping[str, str], findings: list[Finding]
) -> dict[str, Mask]:
    """The masks of masks/, by image id: masks/x/a.png of images/x/a.jpg."""
    masks = read_masks(root / "masks", names)
    relatives = {i: relative.removeprefix("images/") for i, relative in files.items()}
    paths = Paths(root / "masks", relatives)
    unused = masks.match(relatives.values(), paths.name).unused
    findings.append(make_finding("mask", "of masks/ of no image, not used", unused))
    return find_masks(masks, paths, findings)


def _find_instances(root: Path) -> tuple[Path | None, Path | None]:
    """COCO's files of the images to train on and to measure on. Raises DatasetError for several of one kind."""
    folder = root / "annotations"
    found = []
    for kind in ("train", "val"):
        files = sorted(folder.glob(f"{_INSTANCES}{kind}*.json"))
        if kind == "train" and not files:
            files = sorted(folder.glob(f"{_INSTANCES}default.json"))  # of our own writer, and of CVAT
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            raise DatasetError(f"{folder}: got {listed}, expected one of them: move the others elsewhere")
        found.append(files[0] if files else None)
    return found[0], found[1]


def _below(path: Path | None, relatives: Mapping[str, str]) -> Mapping[str, str]:
    """Of COCO's instances_train2014.json, the images in train2014/, if there are any; else all of `relatives`."""
    if path is None or not path.stem.startswith(_INSTANCES):
        return relatives
    folder = f"{path.stem.removeprefix(_INSTANCES)}/"
    return {i: r for i, r in relatives.items() if r.removeprefix("images/").startswith(folder)} or relatives


def _listed(annotations: Annotations, relatives: Mapping[str, str], paths: Paths) -> dict[str, str]:
    """Those of the images that annotations list. Raises DatasetError if one that they list is missing."""
    matches = annotations.match(relatives.values(), paths.name)
    if matches.unused:
        raise DatasetError(
            f"{annotations.path}: {len(matches.unused)} of {pluralize(len(annotations.names), 'image')} are missing "
            f"({format_examples(matches.unused)}), expected all of them below {paths.root}: add them"
        )
    return {i: relative for i, relative in relatives.items() if relative in matches.found}
