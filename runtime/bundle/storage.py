"""Read, verify and write bundles: folders with graphs and bundle.json.

`multisa inspect FOLDER` verifies a bundle and describes it.
"""

import json
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multisa.runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check_manifest,
    manifest_from_json,
    manifest_to_json,
)
from multisa.runtime.errors import BundleError
from multisa.runtime.files import flush_folder, sha256_of_bytes, sha256_of_file, write_bytes_atomically
from multisa.runtime.imaging.decode import MAX_ENLARGEMENT

ENGINES_FOLDER = "engines"  # built TensorRT engines inside a bundle: a cache that can be rebuilt
MODEL_CARD = "MODEL_CARD.md"  # what the bundle is for, how it was made and measured, and its licences

_MANIFEST_LIMIT = 1 << 20  # bytes; a manifest has some kilobytes
_SEGMENTER = "DeepLabV3+ on pseudo-masks"  # its name in metrics.training, SEGMENTER of training/run_record.py
_CARD_LINES = 12  # of the model card that `describe` shows


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Bundle({self.manifest.name!r}, {len(self.manifest.classes)} classes, path={str(self.path)!r})"

    def read_file(self, name: str) -> bytes:
        """Read one file and verify its bytes against the manifest. Raises BundleError on a mismatch."""
        entry = self.manifest.files.get(name)
        if entry is None:
            listed = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.path}: no file {name!r} in the bundle, it lists {listed}")
        path = _contained(self.path, name, entry)
        data = path.read_bytes()
        _compare(path, sha256_of_bytes(data), entry)
        return data


def default_bundle_path() -> Path:
    """Return the folder of the packaged bundle."""
    return Path(__file__).parents[1] / "bundles" / "voc-animals"


def load_bundle(path: str | Path | None = None) -> Bundle:
    """Load a bundle and verify it: the schema of bundle.json, then name, size and SHA-256 of every file.

    path: the folder of the bundle; by default the packaged one (`voc-animals`). Returns the `Bundle`, which
    the predictors accept in place of a path. Raises BundleError that names the file or key, the value and
    what is expected.
    """
    path = default_bundle_path() if path is None else Path(path)
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise BundleError(f"{path}: has no {MANIFEST_NAME}, expected a bundle folder written by `multisa export`")
    size = manifest_path.stat().st_size
    if size > _MANIFEST_LIMIT:
        raise BundleError(f"{manifest_path}: {size} bytes, expected at most {_MANIFEST_LIMIT}")
    try:
        manifest = manifest_from_json(manifest_path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BundleError(f"{manifest_path}: is not JSON ({error}): get the bundle again") from error
    except ValueError as error:
        raise BundleError(f"{manifest_path}: {error}") from error
    for name, entry in manifest.files.items():
        file = _contained(path, name, entry)
        _compare(file, sha256_of_file(file), entry)
    return Bundle(path, manifest)


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write `files` and bundle.json to `folder`, replacing any bundle in it, and verify the result.

    Computes the manifest's `files` from the bytes, and writes everything to a temporary folder beside the
    target first. The engine cache of a replaced bundle stays, since its keys depend on the graphs. Raises
    BundleError if the manifest is invalid, and as `check_replaceable` does.
    """
    entries = {name: FileEntry(sha256_of_bytes(data), len(data)) for name, data in sorted(files.items())}
    complete = replace(manifest, files=entries)
    try:
        check_manifest(complete)
    except ValueError as error:
        raise BundleError(f"{folder / MANIFEST_NAME}: {error}") from error
    check_replaceable(folder)
    target = folder.resolve()  # the target of a link
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
        new = Path(work, "new")
        new.mkdir()
        for name, data in files.items():
            write_bytes_atomically(new / name, data)
        write_bytes_atomically(new / MANIFEST_NAME, manifest_to_json(complete).encode())
        flush_folder(new)
        if target.exists():
            _swap(new, target)
        else:
            new.replace(target)
        flush_folder(target.parent)
    return load_bundle(folder)


def _contained(folder: Path, name: str, entry: FileEntry) -> Path:
    path = folder / name
    if not path.exists():
        raise BundleError(f"{path}: the file is missing, {MANIFEST_NAME} lists it")
    if path.resolve().parent != folder.resolve() or not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{path}: leads to {path.resolve()}, expected a file inside the bundle's folder")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"{path}: got {size} bytes, expected {entry.bytes}: get the bundle again")
    return path


def _compare(path: Path, digest: str, entry: FileEntry) -> None:
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: got sha256 {digest}, expected {entry.sha256}: the file was altered, get the bundle again"
        )


def check_replaceable(folder: Path) -> None:
    """Raise BundleError if writing a bundle to `folder` would remove anything but a bundle.

    A bundle consists of its manifest, the files listed in it and, perhaps, its engine cache.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    problem = _foreign_content(folder)
    if problem:
        raise BundleError(
            f"{folder}: exists and is not only a bundle ({problem}), expected a new folder or a bundle to "
            "replace: choose another folder or move the other files away"
        )


def _foreign_content(folder: Path) -> str:
    """Return what in `folder` does not belong to a bundle, or ""."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return f"no {MANIFEST_NAME}"
    if path.stat().st_size > _MANIFEST_LIMIT:
        return f"{MANIFEST_NAME} has more than {_MANIFEST_LIMIT} bytes"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return f"{MANIFEST_NAME} is not JSON, or nested too deeply"
    # Checks only the keys of every version: bundles of older and newer versions may be replaced too.
    value = value if isinstance(value, dict) else {}
    if "schema_version" not in value or not isinstance(value.get("files"), dict):
        return f"{MANIFEST_NAME} is not a manifest, expected schema_version and files in it"
    names = {MANIFEST_NAME, *value["files"]}
    for path in sorted(folder.iterdir()):
        is_cache = path.name == ENGINES_FOLDER and path.is_dir()
        if not is_cache and not (path.name in names and path.is_file()):
            return f"{path.name} does not belong to it"
    return ""


def _swap(new: Path, folder: Path) -> None:
    """Replace `folder` by `new`, keeping its engine cache. On any failure or interrupt, restore `folder`."""
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old")
    try:
        folder.replace(old)
        if (old / ENGINES_FOLDER).exists():
            (old / ENGINES_FOLDER).replace(new / ENGINES_FOLDER)
        new.replace(folder)
    finally:
        if not folder.exists():
            if (new / ENGINES_FOLDER).exists():
                (new / ENGINES_FOLDER).replace(old / ENGINES_FOLDER)
            old.replace(folder)
        elif old.exists():
            shutil.rmtree(old)


_DIGEST_DIGITS = 12  # of a SHA-256 in the table; --json prints all


def bundle_to_json(bundle: Bundle) -> dict[str, Any]:
    """Return the folder and the contents of bundle.json as JSON values."""
    return {"path": str(bundle.path), **json.loads(manifest_to_json(bundle.manifest))}


def describe(bundle: Bundle) -> str:
    """Return text: the beginning of the model card, and tables of classes, parameters, licences and verified files."""
    manifest = bundle.manifest
    tables = (_classes, _parameters, _metrics, _provenance, _files)
    head = [f"{manifest.name} ({bundle.path})"]
    sections = [head, _card(bundle), *(make(manifest) for make in tables), _licences(bundle)]
    return "\n\n".join("\n".join(map(printable, lines)) for lines in sections if lines)


def printable(text: str) -> str:
    """Remove control characters: bundles come from anywhere, and these could rewrite what a terminal shows."""
    return "".join(filter(str.isprintable, text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns are as wide as their longest cell, numbers right-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]
    return [
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace(",", "").replace("-", "", 1).rstrip("% ").isdigit() or text == "-"


def _card(bundle: Bundle) -> list[str]:
    """The model card up to its first section, and where all of it is."""
    if MODEL_CARD not in bundle.manifest.files:
        return []
    text = bundle.read_file(MODEL_CARD).decode("utf-8", "replace").partition("\n## ")[0]
    return [*text.strip().splitlines()[:_CARD_LINES], "", f"all of the model card: {bundle.path / MODEL_CARD}"]


def _licences(bundle: Bundle) -> list[str]:
    """The licences that the manifest names, and where their texts are."""
    known = bundle.manifest.provenance.get("licences")
    rows = [(str(licence), work) for work, licence in known.items()] if isinstance(known, dict) else []
    texts = [str(bundle.path / name) for name in bundle.manifest.files if name.startswith(("NOTICE", "LICEN"))]
    lines = table(("licence", "of"), rows) if rows else []
    return [*lines, f"texts of licences: {', '.join(texts)}"] if texts else lines


def _classes(manifest: Manifest) -> list[str]:
    label = manifest.parameters.label
    gains = dict(zip(manifest.foreground, label.class_gain, strict=False))
    training = manifest.metrics.get("training", {})
    ious = _segmenter_row(training).get("iou", []) if isinstance(training, dict) else []
    thresholds = manifest.parameters.score_thresholds
    rows = []
    for index, name in enumerate(manifest.classes):
        threshold = f"{thresholds[name]:g}" if name in thresholds else "-"
        gain = f"{gains[name]:g}" if name in gains else "-"
        iou = ious[index] if index < len(ious) else None
        iou_text = f"{iou:.2f}" if isinstance(iou, (int, float)) else "-"
        rows.append((str(index), name, threshold, gain, iou_text))
    return table(("id", "class", "score threshold", "gain", "IoU %"), rows)


def _segmenter_row(training: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of the segmenter in the bundle, or the last ones. Keys are "NAME, seed SEED (LIST)"."""
    own = [row for name, row in training.items() if re.split(r" \(|, seed", name)[0] == _SEGMENTER]
    return next(iter(own), [{}, *training.values()][-1])


def _parameters(manifest: Manifest) -> list[str]:
    parameters = manifest.parameters
    label, segmenter = parameters.label, parameters.segmenter_label
    radius = f"radius {label.walk_radius} at stride {parameters.walk_stride}"
    mirror = "averaged with the mirror image" if segmenter.mirror else "of the image alone"
    rows = (
        ("image", f"long side {parameters.long_side} pixels, enlarged at most {MAX_ENLARGEMENT:g} times"),
        ("smallest part of a mask", f"{parameters.min_area:g} of the image"),
        ("labels by default with", parameters.label_method),
        ("segmenter: probabilities", mirror),
        ("segmenter: background divided by", f"{segmenter.background_ratio:g}"),
        ("segmenter: dense CRF", "on" if segmenter.use_crf else "off"),
        ("walk: CAM scales", ", ".join(f"{scale:g}" for scale in parameters.cam_scales)),
        ("walk: random walk", f"{radius}, beta {label.walk_beta:g}, {label.walk_steps} steps"),
        ("walk: background score", f"{label.background:g}"),
        ("walk: dense CRF", "on" if label.use_crf else "off"),
        ("ignored id", str(manifest.ignore_index)),
    )
    return table(("parameter", "value"), rows)


def _metrics(manifest: Manifest) -> list[str]:
    numbers = ((name, n) for name, n in manifest.metrics.items() if isinstance(n, (int, float)))
    rows = [(name, f"{number:g}") for name, number in numbers]
    training = manifest.metrics.get("training", {})
    for stage, values in training.items() if isinstance(training, dict) else ():
        if isinstance(values, dict) and isinstance(values.get("miou"), (int, float)):
            rows.append((f"mIoU %, {stage}", f"{values['miou']:.2f}"))
    return table(("metric", "value"), rows) if rows else []


def _provenance(manifest: Manifest) -> list[str]:
    """Show the values that fit on a line; --json prints all."""
    rows = [
        (name, text if isinstance(text, str) else json.dumps(text))
        for name, text in manifest.provenance.items()
        if isinstance(text, (str, int, float)) or (isinstance(text, dict) and len(json.dumps(text)) < 90)
    ]
    return table(("provenance", "value"), rows) if rows else []


def _files(manifest: Manifest) -> list[str]:
    rows = [
        (name, f"{entry.bytes / 1e6:.2f}", f"{entry.sha256[:_DIGEST_DIGITS]}...")
        for name, entry in manifest.files.items()
    ]
    return table(("file (verified)", "MB", "SHA-256"), rows)
