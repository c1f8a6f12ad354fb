"""Segmentation metrics: counts first (int64), ratios of them afterwards.

Protocol of PASCAL VOC: one confusion matrix over the whole set, pixels marked 255 in the truth left out,
IoU = TP / (TP + FP + FN) per class, mIoU their mean.
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
    """Count pixels, int64 [n_classes, n_classes], rows = truth, columns = prediction.

    Both inputs are uint8 of one shape. Pixels whose truth is 255 are left out. Raises ValueError for a class
    outside 0..n_classes-1 (a prediction of 255 included: a segmenter has no right to abstain).
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}: they must be equal")
    kept = truth != IGNORE_INDEX
    rows = truth[kept].astype(np.int64)
    columns = prediction[kept].astype(np.int64)
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.size and values.max() >= n_classes:
            raise ValueError(f"{name} holds class {values.max()}, expected 0..{n_classes - 1}")
    counts = np.bincount(rows * n_classes + columns, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def iou_per_class(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU of each class, float64 [n_classes]; NaN for a class neither in the truth nor predicted."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    ratios = np.full_like(hits, np.nan)
    np.divide(hits, union, out=ratios, where=union > 0)
    return ratios


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Mean of `iou_per_class` over the classes that occur."""
    return float(np.nanmean(iou_per_class(confusion)))


def pixel_accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Share of counted pixels that are right; NaN when none was counted."""
    total = int(confusion.sum())
    return float(np.diag(confusion).sum()) / total if total else float("nan")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Counts over a whole set and what they amount to."""

    classes: tuple[str, ...]
    confusion: npt.NDArray[np.int64]  # [n, n], rows = truth, columns = prediction
    images: int
    missing: tuple[str, ...]  # truth without a prediction, left out

    def to_json(self) -> Mapping[str, Any]:
        """The figures as JSON values; the IoU of a class that does not occur is null."""
        ious = iou_per_class(self.confusion).tolist()
        return {
            "images": self.images,
            "missing": list(self.missing),
            "miou": mean_iou(self.confusion),
            "pixel_accuracy": pixel_accuracy(self.confusion),
            # NaN is unequal to itself, and JSON has no word for it.
            "iou": {name: iou if iou == iou else None for name, iou in zip(self.classes, ious, strict=True)},
        }

    def table(self) -> str:
        """The figures for people, in percent."""
        width = max(len(name) for name in (*self.classes, "pixel accuracy"))
        ious = iou_per_class(self.confusion).tolist()
        rows = [
            (name, f"{iou:7.2%}" if iou == iou else "      -")
            for name, iou in zip(self.classes, ious, strict=True)
        ]
        rows += [("mIoU", f"{mean_iou(self.confusion):7.2%}")]
        rows += [("pixel accuracy", f"{pixel_accuracy(self.confusion):7.2%}")]
        lines = [f"{name:<{width}}  {value}" for name, value in [("class", "    IoU"), *rows]]
        left_out = f", {len(self.missing)} without a prediction left out" if self.missing else ""
        return "\n".join([*lines, f"{pluralize(self.images, 'image')}{left_out}"])


def evaluate_masks(
    predictions: str | Path,
    ground_truth: str | Path,
    classes: Sequence[str] | str | Path | None = None,
    *,
    names: Sequence[str] | str | Path | None = None,
    allow_missing: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Compare the PNG masks of two folders: IoU of each class, mIoU, pixel accuracy (PASCAL VOC's protocol).

    classes: names in the order of their ids, or a file with one name a line; those of the packaged bundle by
    default. names: relative names of the masks to compare, or a file with one a line; every mask of
    `ground_truth` by default. Pixels of the ground truth that are 255 are left out.

    Raises UsageError for missing files, and for missing predictions unless `allow_missing`; ImageError for a
    mask that cannot be read or does not fit its ground truth.
    """
    if classes is None:
        classes = load_bundle().manifest.classes
    class_names = read_class_names(Path(classes)) if isinstance(classes, (str, Path)) else tuple(classes)
    listed = read_mask_names(Path(names)) if isinstance(names, (str, Path)) else names
    return _evaluate(
        Path(predictions),
        Path(ground_truth),
        class_names,
        listed,
        allow_missing=allow_missing,
        max_pixels=max_pixels,
    )


def _evaluate(
    prediction: Path,
    truth: Path,
    classes: tuple[str, ...],
    names: Sequence[str] | None,
    *,
    allow_missing: bool,
    max_pixels: int,
) -> Evaluation:
    for folder in (prediction, truth):
        if not folder.is_dir():
            raise UsageError(f"{folder}: is no folder, expected one with PNG masks")
    found = sorted(path.relative_to(truth).with_suffix("").as_posix() for path in truth.rglob("*.png"))
    wanted = found if names is None else list(names)
    if not wanted:
        raise UsageError(f"{truth}: no mask found, expected PNG files")
    untrue = sorted(set(wanted) - set(found))
    if untrue:
        raise UsageError(f"{truth}: lacks {pluralize(len(untrue), 'mask')}, among them {untrue[0]}.png")
    missing = tuple(name for name in wanted if not (prediction / f"{name}.png").is_file())
    present = [name for name in wanted if name not in set(missing)]
    if missing and (not allow_missing or not present):
        hint = f"; did you mean {prediction / 'masks'}?" if (prediction / "masks").is_dir() else ""
        raise UsageError(
            f"{prediction}: lacks {len(missing)} of {pluralize(len(wanted), 'prediction')}, among them "
            f"{missing[0]}.png: add them or allow it (--allow-missing){hint}"
        )
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    for name in present:
        confusion += _confusion(
            prediction / f"{name}.png", truth / f"{name}.png", len(classes), max_pixels=max_pixels
        )
    if confusion.sum() == 0:
        raise UsageError(f"{truth}: every pixel is marked as ignored (255), nothing can be counted")
    return Evaluation(classes, confusion, len(present), missing)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of the classes, one a line in the order of ids; blank lines are skipped.

    Raises UsageError for a file that cannot be read or is empty, and for a name given twice.
    """
    return _each_once(path, _read_lines(path))


def read_mask_names(path: Path) -> tuple[str, ...]:
    """Read a list of masks, one relative name a line, with or without .png; blank lines are skipped.

    Raises UsageError as `read_class_names` does.
    """
    return _each_once(path, tuple(line.removesuffix(".png") for line in _read_lines(path)))


def _read_lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in read_user_text(path).splitlines() if line.strip())


def _each_once(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise UsageError(f"{path}: is empty, expected one name a line")
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path}: {repeated!r} is there more than once, expected each name once")
    return names


def _confusion(prediction: Path, truth: Path, n_classes: int, *, max_pixels: int) -> npt.NDArray[np.int64]:
    answer, expected = (read_mask(path, max_pixels=max_pixels) for path in (prediction, truth))
    highest = int(expected[expected != IGNORE_INDEX].max(initial=0))
    if highest >= n_classes:
        raise ImageError(
            f"{truth}: truth holds class {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}: name the "
            "classes of its ids with --classes; the predictions must have the same ids"
        )
    try:
        return confusion_matrix(answer, expected, n_classes)
    except ValueError as error:
        raise ImageError(f"{prediction}: {error}") from error
