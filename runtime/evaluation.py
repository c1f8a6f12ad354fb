"""Segmentation metrics from an int64 confusion matrix, and the comparison of two folders of masks.

Follows the protocol of PASCAL VOC: one confusion matrix over the whole set, without the pixels that are 255
in the ground truth; IoU = TP / (TP + FP + FN) per class; mIoU is their mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import load_bundle
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.files import read_user_text
from multisa.runtime.imaging.decode import MAX_PIXELS, read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import pluralize


def confusion_matrix(
    prediction: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], n_classes: int
) -> npt.NDArray[np.int64]:
    """Count pixels: int64 [n_classes, n_classes], rows = truth, columns = prediction.

    Both inputs are uint8 of the same shape. Pixels whose truth is 255 are ignored. Raises ValueError for
    other shapes and for a class outside 0..n_classes-1, including a prediction of 255: a segmenter must not
    abstain.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"got a prediction of {prediction.shape}, expected {truth.shape} as the ground truth")
    kept = truth != IGNORE_INDEX
    rows = truth[kept].astype(np.int64)
    columns = prediction[kept].astype(np.int64)
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.size and values.max() >= n_classes:
            raise ValueError(f"{name} contains class {values.max()}, expected 0..{n_classes - 1}")
    counts = np.bincount(rows * n_classes + columns, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def iou_per_class(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the IoU per class, float64 [n_classes]; NaN for a class in neither truth nor prediction."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    ratios = np.full_like(hits, np.nan)
    np.divide(hits, union, out=ratios, where=union > 0)
    return ratios


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Return the mean of `iou_per_class` over the classes that occur."""
    return float(np.nanmean(iou_per_class(confusion)))


def pixel_accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Return the share of correct pixels; NaN without pixels."""
    total = int(confusion.sum())
    return float(np.diag(confusion).sum()) / total if total else float("nan")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The confusion matrix of a set of masks, and its metrics."""

    classes: tuple[str, ...]
    confusion: npt.NDArray[np.int64]  # [n, n], rows = truth, columns = prediction
    images: int
    missing: tuple[str, ...]  # masks without a prediction, skipped

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU by class, 0..1; None for a class that does not occur."""
        ious = iou_per_class(self.confusion).tolist()
        # NaN is unequal to itself, and JSON cannot represent it.
        return {name: iou if iou == iou else None for name, iou in zip(self.classes, ious, strict=True)}

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur, 0..1."""
        return mean_iou(self.confusion)

    @property
    def pixel_accuracy(self) -> float:
        """Share of correct pixels, 0..1; NaN without pixels."""
        return pixel_accuracy(self.confusion)

    def to_json(self) -> Mapping[str, Any]:
        """Return the metrics as JSON values; the IoU of a class that does not occur is null."""
        metrics = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "iou": self.iou}
        return {"images": self.images, "missing": list(self.missing), **metrics}

    def table(self) -> str:
        """Return the metrics as a table, in percent."""
        width = max(len(name) for name in (*self.classes, "pixel accuracy"))
        values = [*self.iou.items(), ("mIoU", self.miou), ("pixel accuracy", self.pixel_accuracy)]
        rows = [(name, "      -" if value is None or value != value else f"{value:7.2%}") for name, value in values]
        lines = [f"{name:<{width}}  {value}" for name, value in [("class", "    IoU"), *rows]]
        skipped = f", {len(self.missing)} without a prediction skipped" if self.missing else ""
        return "\n".join([*lines, f"{pluralize(self.images, 'image')}{skipped}"])


def evaluate_masks(
    predictions: str | Path,
    ground_truth: str | Path,
    classes: Sequence[str] | str | Path | None = None,
    *,
    names: Sequence[str] | str | Path | None = None,
    allow_missing: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Compare the PNG masks of two folders: IoU per class, mIoU and pixel accuracy (protocol of PASCAL VOC).

    Pixels that are 255 in the ground truth are ignored.

    predictions, ground_truth: folders of masks with the same relative names.
    classes: class names in the order of their ids, or a file with one name per line; by default those of the
    packaged bundle.
    names: relative names of the masks to compare, or a file with one per line; by default every mask in
    `ground_truth`.
    allow_missing: skip masks without a prediction.

    Raises UsageError for missing files, and for missing predictions unless `allow_missing`; ImageError for a
    mask that cannot be read, has more than `max_pixels` or does not fit its ground truth.
    """
    prediction, truth = Path(predictions), Path(ground_truth)
    if classes is None:
        classes = load_bundle().manifest.classes
    class_names = read_class_names(Path(classes)) if isinstance(classes, (str, Path)) else tuple(classes)
    listed = read_mask_names(Path(names)) if isinstance(names, (str, Path)) else names
    present, missing = _masks_to_compare(prediction, truth, listed, allow_missing=allow_missing)
    confusion = np.zeros((len(class_names), len(class_names)), np.int64)
    for name in present:
        pair = (prediction / f"{name}.png", truth / f"{name}.png")
        confusion += _confusion(*pair, len(class_names), max_pixels=max_pixels)
    if confusion.sum() == 0:
        raise UsageError(f"{truth}: every pixel is marked as ignored (255), expected some to count")
    return Evaluation(class_names, confusion, len(present), missing)


def _masks_to_compare(
    prediction: Path, truth: Path, names: Sequence[str] | None, *, allow_missing: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the masks with a prediction, and of those without."""
    for folder in (prediction, truth):
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not a folder, expected a folder of PNG masks")
    all_names = sorted(path.relative_to(truth).with_suffix("").as_posix() for path in truth.rglob("*.png"))
    selected = all_names if names is None else list(names)
    if not selected:
        raise UsageError(f"{truth}: no mask found, expected PNG files")
    untrue = sorted(set(selected) - set(all_names))
    if untrue:
        raise UsageError(f"{truth}: lacks {pluralize(len(untrue), 'mask')}, among them {untrue[0]}.png")
    missing = tuple(name for name in selected if not (prediction / f"{name}.png").is_file())
    present = [name for name in selected if name not in set(missing)]
    if missing and (not allow_missing or not present):
        hint = f"; did you mean {prediction / 'masks'}?" if (prediction / "masks").is_dir() else ""
        raise UsageError(
            f"{prediction}: lacks {len(missing)} of {pluralize(len(selected), 'prediction')}, among them "
            f"{missing[0]}.png: add them or allow it (--allow-missing){hint}"
        )
    return present, missing


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one per line in the order of their ids; blank lines are skipped.

    Raises UsageError for a file that cannot be read or is empty, and for a repeated name.
    """
    return _read_names(path, ignored_suffix="")


def read_mask_names(path: Path) -> tuple[str, ...]:
    """Read relative names of masks, one per line, with or without .png; blank lines are skipped.

    Raises UsageError as `read_class_names` does.
    """
    return _read_names(path, ignored_suffix=".png")


def _read_names(path: Path, *, ignored_suffix: str) -> tuple[str, ...]:
    lines = (line.strip() for line in read_user_text(path).splitlines())
    names = tuple(line.removesuffix(ignored_suffix) for line in lines if line)
    if not names:
        raise UsageError(f"{path}: is empty, expected one name per line")
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path}: contains {repeated!r} more than once, expected each name once")
    return names


def _confusion(prediction: Path, truth: Path, n_classes: int, *, max_pixels: int) -> npt.NDArray[np.int64]:
    predicted, expected = (read_mask(path, max_pixels=max_pixels) for path in (prediction, truth))
    highest = int(expected[expected != IGNORE_INDEX].max(initial=0))
    if highest >= n_classes:
        raise ImageError(
            f"{truth}: contains class {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}: name the "
            "classes of its ids with --classes; the predictions must use the same ids"
        )
    try:
        return confusion_matrix(predicted, expected, n_classes)
    except ValueError as error:
        raise ImageError(f"{prediction}: {error}") from error
