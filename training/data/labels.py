"""Where the labels and masks of a data set's images come from, and which of the images are held out to measure on."""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.image_labels import ImageLabels, image_key, read_image_labels
from multisa.runtime.progress import format_examples, pluralize
from multisa.training.annotations.base import AnnotatedImage, Annotations, Mask
from multisa.training.annotations.registry import find_annotations
from multisa.training.data.dataset import Finding, class_ids, make_finding, read_lines


def label_file(root: Path, labels: Path | None) -> tuple[Path | None, list[str]]:
    """The label file to read, if there is one, and the names of the data set's other sources of labels."""
    names = ("labels.json", "labels.csv", "Annotations")
    own = [root / name for name in names if (root / name).is_file() or (name == names[-1] and (root / name).is_dir())]
    used = labels or next(iter(own), None)
    others = [path.name for path in own if path != used]
    return (used if labels or (used and used.is_file()) else None), others


@dataclass(frozen=True)
class Paths:
    """Posix paths of the images below the data set's folder."""

    root: Path
    images: Mapping[str, str]  # to read, by image id
    others: Collection[str] = ()

    @property
    def name(self) -> str:
        """Name of the folder, with which paths in label files may begin."""
        return self.root.resolve().name


def read_labels(
    table: Path, annotations: Annotations | None, names: tuple[str, ...], paths: Paths, findings: list[Finding]
) -> dict[str, tuple[int, ...]]:
    """Class ids by image id, from a label file, or from annotations if it holds some."""
    labels = _as_labels(annotations) if annotations else read_image_labels(table, names[1:])
    every = (*paths.images.values(), *paths.others)
    matcher = labels.matcher(every, root=paths.name)
    found = {name: matcher.find(relative) for name, relative in paths.images.items()}
    missing = [paths.images[name] for name, classes in found.items() if classes is None]
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
        make_finding("row", f"of {table.name} with another folder, matched by file name", moved),
        make_finding("image", f"labelled in {table.name} but not trained on", not_trained_on),
        make_finding("row", f"of {table.name} about no image, not used", matcher.unused()),
    ]
    return {name: class_ids(row, names) for name, row in found.items() if row is not None}


def find_masks(annotations: Annotations, paths: Paths, findings: list[Finding]) -> dict[str, Mask]:
    """The masks of images, by id, that annotations have; their notes become findings."""
    found = annotations.match(paths.images.values(), paths.name).found
    findings += notes_of(annotations)
    images = ((i, annotations.images[found[path]]) for i, path in paths.images.items() if path in found)
    return {i: image.mask for i, image in images if image.mask}


def notes_of(annotations: Annotations) -> list[Finding]:
    """What annotations have noted, as findings."""
    return [Finding(f"{annotations.path.name}: {text}", names) for text, names in annotations.notes.items()]


def held_out(val: Path | None, paths: Paths, names: tuple[str, ...], findings: list[Finding]) -> dict[str, Mask | None]:
    """The images that `val` names, by id, with the masks that it gives; they are not trained on.

    val: a text file with a name on each line, or annotations. Raises UsageError if it names no image of the data set.
    """
    if val is None:
        return {}
    source = find_annotations(val, names) or _read_list(val)
    matches = source.match(paths.images.values(), paths.name)
    if not matches.found:
        raise UsageError(
            f"{val}: got {pluralize(len(source.images), 'name')} ({format_examples(source.names)}), expected some of "
            f"images of {paths.root}: correct the names"
        )
    held = {i: source.images[matches.found[r]].mask for i, r in paths.images.items() if r in matches.found}
    findings += [
        make_finding("image", f"named in {val.name}: measured on, never trained on", held),
        make_finding("name", f"in {val.name} of no image, not used", matches.unused, is_warning=True),
        *notes_of(source),
    ]
    return held


def _as_labels(annotations: Annotations) -> ImageLabels:
    rows = {
        image_key(name): tuple(annotations.class_names[i] for i in annotations.labels(name))
        for name in annotations.names
    }
    return ImageLabels(str(annotations.path), rows, "")


def _read_list(path: Path) -> Annotations:
    """Names without labels and masks; lines that begin with # are comments."""
    if path.suffix.lower() in (".json", ".csv", ".png"):
        raise UsageError(f"{path}: got a {path.suffix} file, expected a list of images (.txt), masks, or annotations")
    lines = [line for _, line in read_lines(path) if not line.startswith("#")]
    return Annotations(path, (), dict.fromkeys(lines, AnnotatedImage(None, None)))
