"""Segmentation metrics from an int64 confusion matrix, and the comparison of two folders of masks.

Follows the protocol of PASCAL VOC: one confusion matrix over the whole set, without the pixels that are 255
in the ground truth; IoU = TP / (TP + FP + FN) per class; mIoU is their mean. A prediction of 255 means that
the segmenter abstained: such a pixel is a FN of its class and an FP of none, or left out on request.
"""

import bisect
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bundle import load_bundle
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.files import read_user_text
from multisa.runtime.imaging.decode import MAX_PIXELS
from multisa.runtime.imaging.painted_masks import class_colours, read_ids
from multisa.runtime.imaging.png import IGNORE_INDEX, UInt8, voc_palette
from multisa.runtime.progress import pluralize
from multisa.runtime.sources.folders import walk
from multisa.runtime.sources.storage import Entry, LocalStore, NameFilter, printable, reason_of

Int64 = npt.NDArray[np.int64]

MATRIX_CLASSES = 21  # of VOC; a larger matrix is wider than most terminals
MATRIX_CLASSES_WITH_DECIMALS = 10
CONFUSIONS_SHOWN = 20


def confusion_matrix(prediction: UInt8, truth: UInt8, n_classes: int) -> Int64:
    """Count pixels: int64 [n_classes, n_classes], rows = ground truth, columns = prediction.

    Both inputs are uint8 of the same shape. Pixels whose ground truth is 255 are ignored. Raises ValueError for
    other shapes and for a class outside 0..n_classes-1, including a prediction of 255: a segmenter must not
    abstain. `evaluate_masks` counts abstained pixels.
    """
    joint = _joint_counts(prediction, truth)
    for name, axis in (("ground truth", 1), ("prediction", 0)):
        highest = _highest(joint[:IGNORE_INDEX], axis)
        if highest >= n_classes:
            raise ValueError(f"{name} contains class {highest}, expected 0..{n_classes - 1}")
    return joint[:n_classes, :n_classes].copy()


def _joint_counts(prediction: UInt8, truth: UInt8) -> Int64:
    """Count the pixels of every pair of values: int64 [256, 256], rows = ground truth, columns = prediction."""
    if prediction.shape != truth.shape:
        raise ValueError(f"got a prediction of {prediction.shape}, expected {truth.shape} as the ground truth")
    pairs = truth.ravel().astype(np.intp) * 256 + prediction.ravel()
    return np.bincount(pairs, minlength=256 * 256).astype(np.int64, copy=False).reshape(256, 256)


def _highest(counts: Int64, axis: int) -> int:
    """Return the highest row (axis 1) or column (axis 0) that has pixels; -1 without pixels."""
    return int(np.flatnonzero(counts.any(axis=axis)).max(initial=-1))


def iou_per_class(confusion: Int64) -> npt.NDArray[np.float64]:
    """Return the IoU per class, float64 [n]; NaN for a class in neither ground truth nor prediction.

    confusion: int64 [n, n], or [n, n + 1] where the last column counts the pixels without a predicted class.
    """
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0)[: len(hits)] + confusion.sum(axis=1) - hits
    ratios = np.full_like(hits, np.nan)
    np.divide(hits, union, out=ratios, where=union > 0)
    return ratios


def mean_iou(confusion: Int64) -> float:
    """Return the mean of `iou_per_class` over the classes that occur; NaN if none does."""
    ious = iou_per_class(confusion)
    return float("nan") if np.isnan(ious).all() else float(np.nanmean(ious))


def pixel_accuracy(confusion: Int64) -> float:
    """Return the share of correct pixels of a matrix as `iou_per_class` takes it; NaN without pixels."""
    total = int(confusion.sum())
    return float(np.diag(confusion).sum()) / total if total else float("nan")


@dataclass(frozen=True)
class SkippedFiles:
    """The files of one folder that are not compared for one reason."""

    folder: str  # "predictions" or "ground truth"
    reason: str
    paths: tuple[str, ...]  # relative; a folder that is not read is one of them

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.paths)

    def __str__(self) -> str:
        return f"{self.reason}: {self.count} ({self.paths[0]})"


@dataclass(frozen=True)
class ImageScore:
    """The mIoU of one image, over the classes that occur in it, and its class with the lowest IoU."""

    name: str  # relative path of the mask without .png
    miou: float  # 0..1
    worst_class: str
    worst_iou: float  # 0..1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The confusion matrix of a set of masks, and its metrics."""

    classes: tuple[str, ...]
    confusion: Int64  # [n, n], rows = ground truth, columns = prediction; pixels that have a class in both
    abstained: Int64  # [n], pixels of each class of ground truth whose prediction is 255
    ignored: int  # pixels that are 255 in the ground truth
    ignore_abstained: bool  # abstained pixels are left out of the metrics; otherwise they count as wrong
    images: int
    missing: tuple[str, ...]  # masks without a prediction, skipped
    skipped: tuple[SkippedFiles, ...]  # every other file that is not compared
    worst: tuple[ImageScore, ...]  # the images with the lowest mIoU first, as many as asked for
    notes: tuple[str, ...]  # what the masks or classes make doubtful

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU by class, 0..1; None for a class that does not occur."""
        ious = iou_per_class(self._counts).tolist()
        # NaN is unequal to itself, and JSON cannot represent it.
        return {name: iou if iou == iou else None for name, iou in zip(self.classes, ious, strict=True)}

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur, 0..1."""
        return mean_iou(self._counts)

    @property
    def pixel_accuracy(self) -> float:
        """Share of correct pixels, 0..1; NaN without pixels."""
        return pixel_accuracy(self._counts)

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that are 255 in the ground truth, 0..1."""
        return self.ignored / (self.ignored + int(self.confusion.sum()) + int(self.abstained.sum()))

    @property
    def abstained_share(self) -> float:
        """Share of abstained pixels among those that are not ignored, 0..1, whether or not they count."""
        abstained = int(self.abstained.sum())
        return abstained / (abstained + int(self.confusion.sum()))

    @property
    def confusion_shares(self) -> npt.NDArray[np.float64]:
        """Share of each prediction in the pixels of a class, 0..1: float64 [n, n + 1], rows = ground truth.

        The last column is for abstained pixels: 0 if they are left out. The row of a class without pixels is NaN.
        """
        counts = self._counts
        with np.errstate(invalid="ignore"):  # 0 / 0
            return np.asarray(counts / counts.sum(axis=1, keepdims=True), np.float64)

    @property
    def _counts(self) -> Int64:
        """What the metrics count, int64 [n, n + 1]; the last column is for abstained pixels."""
        return np.column_stack((self.confusion, self.abstained * (not self.ignore_abstained)))

    def largest_confusions(self, count: int = CONFUSIONS_SHOWN) -> list[tuple[str, str, float]]:
        """Return the largest entries of `confusion_shares` off the diagonal, at most `count`, largest first.

        Each is the class of the ground truth, the predicted class or "abstained", and the share, 0..1.
        """
        shares = np.nan_to_num(self.confusion_shares)
        np.fill_diagonal(shares, 0)
        order = np.argsort(-shares, axis=None, kind="stable")[:count]
        places = [divmod(int(place), shares.shape[1]) for place in order if shares.flat[place] > 0]
        predicted = (*self.classes, "abstained")
        return [(self.classes[row], predicted[column], float(shares[row, column])) for row, column in places]

    def to_json(self, *, confusion: bool = False) -> Mapping[str, Any]:
        """Return the metrics as JSON values; the IoU of a class that does not occur is null.

        `worst` is there if images were asked for; `confusion` adds `Evaluation.confusion` and `abstained`.
        """
        metrics = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "iou": self.iou}
        shares = {"ignored_share": self.ignored_share, "abstained_share": self.abstained_share}
        files = {"missing": list(self.missing), "skipped": [asdict(files) for files in self.skipped]}
        notes = {"notes": list(self.notes)}
        worst = {"worst": [asdict(score) for score in self.worst]} if self.worst else {}
        counts = {"confusion": self.confusion.tolist(), "abstained": self.abstained.tolist()} if confusion else {}
        shares["ignore_abstained"] = self.ignore_abstained
        return {"images": self.images, **files, **notes, **metrics, **shares, **worst, **counts}

    def table(self, *, confusion: bool = False) -> str:
        """Return the metrics as a table, in percent, with the worst images and the skipped files, if any.

        `confusion` adds `confusion_table`.
        """
        abstained = f"abstained ({'left out' if self.ignore_abstained else 'wrong'})"
        shares = [("ignored ground truth", self.ignored_share), (abstained, self.abstained_share)]
        values = [*self.iou.items(), ("mIoU", self.miou), ("pixel accuracy", self.pixel_accuracy), *shares]
        width = max(len(name) for name, _ in values)
        rows = [(name, "      -" if value is None or value != value else f"{value:7.2%}") for name, value in values]
        lines = [f"{name:<{width}}  {value}" for name, value in [("class", "    IoU"), *rows]]
        if confusion:
            lines += ["", self.confusion_table(), ""]
        for score in self.worst:
            lines += [f"mIoU {score.miou:7.2%}  {score.name}, worst class {score.worst_class}: {score.worst_iou:.2%}"]
        if None in self.iou.values():
            lines.append("-: in neither ground truth nor predictions, not in the mIoU")
        lines += [f"skipped in {files.folder}: {files}" for files in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        skipped = f", {len(self.missing)} without a prediction skipped ({self.missing[0]})" if self.missing else ""
        return "\n".join([*lines, f"{pluralize(self.images, 'image')}{skipped}"])

    def confusion_table(self) -> str:
        """Return `confusion_shares` as text, in percent; of many classes, only the largest confusions."""
        n = len(self.classes)
        if n > MATRIX_CLASSES:
            largest = [f"{a} -> {b}  {share:.1%} of {a}" for a, b, share in self.largest_confusions()]
            return "\n".join(["largest confusions, ground truth -> prediction:", *(largest or ["none"])])
        decimals = int(n <= MATRIX_CLASSES_WITH_DECIMALS)
        columns = [*map(str, range(n)), *(["255"] if self._counts[:, n].any() else [])]
        labels = [f"{class_id:>3} {name}" for class_id, name in enumerate(self.classes)]
        width, cell = max(map(len, labels)), 4 + 2 * decimals
        lines = [" " * width + "".join(f"{column:>{cell}}" for column in columns)]
        for label, shares in zip(labels, 100 * self.confusion_shares[:, : len(columns)], strict=True):
            texts = ("-" if s != s else f"{s:.{decimals}f}" if s else "." for s in shares.tolist())
            lines.append(f"{label:<{width}}" + "".join(f"{text:>{cell}}" for text in texts))
        return "\n".join(["confusion in % of each class, rows = ground truth, columns = prediction:", *lines])


@dataclass(frozen=True)
class _Masks:
    """The masks below a folder, and why the other files are skipped."""

    title: str  # "predictions" or "ground truth"
    root: Path
    paths: dict[str, str]  # name without .png, in NFC (macOS writes NFD) -> relative path
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> relative paths

    def skip(self, path: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(printable(path))

    def summary(self) -> tuple[SkippedFiles, ...]:
        return tuple(SkippedFiles(self.title, reason, tuple(paths)) for reason, paths in self.skipped.items())

    def explain(self) -> str:
        return f" (skipped: {'; '.join(map(str, self.summary()))})" if self.skipped else ""

    def path(self, name: str) -> Path:
        return self.root / self.paths[name]


# more than six parameters: keyword-only options, most of them those of the command
def evaluate_masks(
    predictions: str | Path,
    ground_truth: str | Path,
    classes: Sequence[str] | str | Path | None = None,
    *,
    names: Sequence[str] | str | Path | None = None,
    palette: UInt8 | None = None,
    allow_missing: bool = False,
    ignore_abstained: bool = False,
    worst: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Compare the PNG masks of two folders: IoU per class, mIoU and pixel accuracy (protocol of PASCAL VOC).

    Pixels that are 255 in the ground truth are ignored. Those that are 255 in the prediction are abstained.

    predictions, ground_truth: folders of masks with the same relative names. The extension may be of any case.
    classes: class names in the order of their ids, or a file with one name per line; by default those of the
    packaged bundle.
    names: relative names of the masks to compare, with or without .png, or a file with one per line; by default
    every mask in `ground_truth`.
    palette: colours of the classes, uint8 [1..256, 3], by which masks saved as RGB are read; by default those of
    the packaged bundle, or VOC's with `classes`.
    allow_missing: skip masks without a prediction.
    ignore_abstained: leave abstained pixels out; by default they count as wrong.
    worst: number of images with the lowest mIoU to keep in `Evaluation.worst`.

    Raises UsageError for missing files, and for missing predictions unless `allow_missing`; ImageError for a
    mask that cannot be read, has more than `max_pixels` or does not fit its ground truth.
    """
    if classes is None:
        manifest = load_bundle().manifest
        classes, palette = manifest.classes, manifest.mask_palette() if palette is None else palette
    class_names = _class_names(classes)
    colours = class_colours(voc_palette() if palette is None else palette, len(class_names))
    prediction = _list_masks("predictions", predictions)
    truth = _list_masks("ground truth", ground_truth)
    listed = read_mask_names(Path(names)) if isinstance(names, (str, Path)) else names
    present, missing = _masks_to_compare(prediction, truth, listed, allow_missing=allow_missing)
    counter = _Counter(class_names, ignore_abstained, worst)
    for name in present:
        ids = [read_ids(masks.path(name), colours, max_pixels) for masks in (prediction, truth)]
        counter.add(name, _checked_counts(ids, prediction.path(name), truth.path(name), len(class_names)))
    if not counter.counts.any():
        raise UsageError(f"{ground_truth}: every pixel is marked as ignored (255), expected some to count")
    if ignore_abstained and not counter.counts[:, :-1].any():
        raise UsageError(f"{predictions}: every pixel is abstained (255) and left out, expected some to count")
    return Evaluation(
        classes=class_names,
        confusion=counter.counts[:, :-1].copy(),
        abstained=counter.counts[:, -1].copy(),
        ignored=counter.ignored,
        ignore_abstained=ignore_abstained,
        images=len(present),
        missing=missing,
        skipped=prediction.summary() + truth.summary(),
        worst=tuple(counter.worst),
        notes=tuple(_notes(class_names, counter)),
    )


def _class_names(classes: Sequence[str] | str | Path) -> tuple[str, ...]:
    if isinstance(classes, (set, frozenset, Mapping)):
        raise UsageError(f"classes: got {type(classes).__name__}, expected a sequence, in the order of the ids")
    names = read_class_names(Path(classes)) if isinstance(classes, (str, Path)) else tuple(classes)
    if len(_checked_names("classes", names)) > IGNORE_INDEX:
        raise UsageError(f"classes: got {len(names)}, expected at most {IGNORE_INDEX}, as ids are bytes")
    return names


def _notes(classes: tuple[str, ...], counter: "_Counter") -> Iterator[str]:
    if classes[0] != "background":
        yield f"id 0 is {classes[0]!r}, the first class: begin the classes with 'background' if 0 means that"
    truth, predicted = counter.counts.sum(axis=1), counter.counts[:, :-1].sum(axis=0)
    sides = (("ground truth", truth, counter.ignored), ("predictions", predicted, counter.counts[:, -1].sum()))
    for title, pixels, n_255 in sides:
        if n_255 and not pixels[1:].any():
            yield f"{title}: only the values 0 and 255, and 255 is no class: write ids 0, 1, .. if it stands for one"


class _Counter:
    """Sums the pixel counts of images, and keeps the images with the lowest mIoU."""

    def __init__(self, classes: tuple[str, ...], ignore_abstained: bool, most: int) -> None:
        self._classes = classes
        self._columns = len(classes) + (not ignore_abstained)
        self._most = most
        self.counts = np.zeros((len(classes), len(classes) + 1), np.int64)  # last column: abstained
        self.ignored = 0
        self.worst: list[ImageScore] = []

    def add(self, name: str, joint: Int64) -> None:
        """Add the counts that `_joint_counts` made of one image."""
        n = len(self._classes)
        counts = np.column_stack((joint[:n, :n], joint[:n, IGNORE_INDEX]))
        self.counts += counts
        self.ignored += int(joint[IGNORE_INDEX].sum())
        counts = counts[:, : self._columns]
        if self._most > 0 and counts.any():
            ious = iou_per_class(counts)
            lowest = int(np.nanargmin(ious))
            score = ImageScore(name, mean_iou(counts), self._classes[lowest], float(ious[lowest]))
            bisect.insort(self.worst, score, key=lambda score: score.miou)
            del self.worst[self._most :]


def _list_masks(title: str, path: str | Path) -> _Masks:
    """List the masks below a folder. Raises UsageError for two masks of one name."""
    if not isinstance(path, (str, Path)):
        raise UsageError(f"{title}: got {type(path).__name__}, expected the path of a folder")
    folder = Path(path)
    masks = _Masks(title, folder, {})
    for entry in walk(_MaskStore(str(folder)), str(folder), lambda _: True, None):
        assert isinstance(entry, Entry)  # every file is kept
        name, ending = entry.name[:-4], entry.name[-4:]
        reason = entry.problem or ("" if ending.lower() == ".png" else "not PNG")
        if reason:
            masks.skip(entry.name, reason)
            continue
        first = masks.paths.setdefault(unicodedata.normalize("NFC", name), entry.name)
        if first != entry.name:
            raise UsageError(f"{folder}: got {first!a} and {entry.name!a}, expected one mask of that name: remove one")
    return masks


class _MaskStore(LocalStore):
    """Files of this machine; a folder that cannot be listed is an error, as its masks would not be measured."""

    def folder(self, path: str, keep: NameFilter) -> Iterator[Entry]:
        try:
            return super().folder(path, keep)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"{printable(path)}: is not a folder, expected a folder of PNG masks") from error
        except OSError as error:
            raise UsageError(f"{printable(path)}: cannot be listed ({reason_of(error)}): make it readable") from error


def _masks_to_compare(
    prediction: _Masks, truth: _Masks, names: Sequence[str] | None, *, allow_missing: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the masks with a prediction, and of those without; skip the others."""
    if not truth.paths:
        raise UsageError(f"{truth.root}: no mask found, expected PNG files{truth.explain()}")
    listed = None if names is None else _checked_names("names", [_mask_name(str(name)) for name in names])
    selected = listed or sorted(truth.paths)
    chosen = set(selected)
    untrue = sorted(chosen - truth.paths.keys())
    if untrue:
        lacks = f"lacks {pluralize(len(untrue), 'mask')}, among them {untrue[0]}.png"
        raise UsageError(f"{truth.root}: {lacks}: add them or correct the list{truth.explain()}")
    for masks in (prediction, truth):
        for name, path in masks.paths.items():
            if name not in chosen:
                masks.skip(path, "not in the list" if name in truth.paths else "without ground truth")
    missing = tuple(name for name in selected if name not in prediction.paths)
    present = [name for name in selected if name in prediction.paths]
    if missing and (not allow_missing or not present):
        hint = f"; did you mean {prediction.root / 'masks'}?" if (prediction.root / "masks").is_dir() else ""
        raise UsageError(
            f"{prediction.root}: lacks {len(missing)} of {pluralize(len(selected), 'prediction')}, among them "
            f"{missing[0]}.png: add them or allow it (--allow-missing){hint}{prediction.explain()}"
        )
    return present, missing


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one per line in the order of their ids; blank lines are skipped.

    Raises UsageError for a file that cannot be read or is empty, for a repeated name and for a comment.
    """
    names = _read_names(path, str)
    if comment := next((name for name in names if name.startswith("#")), None):
        raise UsageError(f"{path}: got the line {comment!r}, expected one class per line: remove comments")
    return names


def read_mask_names(path: Path) -> tuple[str, ...]:
    """Read relative names of masks, one per line, with or without .png; blank lines are skipped.

    Backslashes become slashes. Raises UsageError as `read_class_names` does.
    """
    return _read_names(path, _mask_name)


def _mask_name(line: str) -> str:
    path = PurePosixPath(line.replace("\\", "/")).as_posix()
    return unicodedata.normalize("NFC", path[:-4] if path.lower().endswith(".png") else path)


def _read_names(path: Path, parse: Callable[[str], str]) -> tuple[str, ...]:
    return _checked_names(path, [parse(line.strip()) for line in read_user_text(path).splitlines() if line.strip()])


def _checked_names(source: object, names: Iterable[str]) -> tuple[str, ...]:
    counts = Counter(names)
    if not counts:
        raise UsageError(f"{source}: is empty, expected one name per line")
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise UsageError(f"{source}: contains {name!r} more than once, expected each name once")
    return tuple(counts)


def _checked_counts(ids: Sequence[UInt8], prediction: Path, truth: Path, n_classes: int) -> Int64:
    """Return `_joint_counts` of a prediction and its ground truth. Raises ImageError if they do not fit."""
    (height, width), (true_height, true_width) = (side.shape for side in ids)
    if ids[0].shape != ids[1].shape:
        raise ImageError(
            f"{prediction}: got {width} x {height} pixels, expected {true_width} x {true_height} as in {truth}"
        )
    joint = _joint_counts(*ids)
    found = (truth, _highest(joint[:IGNORE_INDEX], axis=1)), (prediction, _highest(joint[:n_classes, :-1], axis=0))
    for path, highest in found:
        if highest >= n_classes:
            raise ImageError(
                f"{path}: contains class {highest}, expected 0..{n_classes - 1} or {IGNORE_INDEX}: name the classes of "
                "its ids with --classes; predictions and ground truth must use the same ids"
            )
    return joint
