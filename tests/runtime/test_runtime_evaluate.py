"""Evaluation of mask folders against counts made by hand."""

from pathlib import Path

import numpy as np
import pytest

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.evaluation import (
    confusion_matrix,
    evaluate_masks,
    mean_iou,
    pixel_accuracy,
    read_class_names,
    read_mask_names,
)
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.imaging.png import voc_palette

CLASSES = ("background", "cat", "dog", "unseen")
TRUTH = np.array([[0, 0, 1, 1], [0, 255, 1, 2]], np.uint8)
GUESS = np.array([[0, 1, 1, 1], [0, 2, 0, 2]], np.uint8)


def save(folder: Path, **masks: np.ndarray) -> Path:
    for name, mask in masks.items():
        write_mask(folder / f"{name.replace('__', '/')}.png", mask, voc_palette())
    return folder


def test_figures(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH, deep__b=TRUTH)
    result = evaluate_masks(save(tmp_path / "pred", a=GUESS, deep__b=TRUTH % 255), truth, CLASSES)
    figures = result.to_json()
    # a: background 2 hits of 4, cat 2 of 4, dog 1 of 1; b is right everywhere.
    assert figures["iou"] == {"background": 5 / 7, "cat": 5 / 7, "dog": 1.0, "unseen": None}
    assert figures["miou"] == pytest.approx((5 / 7 + 5 / 7 + 1) / 3)
    assert figures["pixel_accuracy"] == 12 / 14
    assert figures["images"] == 2 and figures["missing"] == []
    table = result.table()
    assert "71.43%" in table and "unseen" in table and "2 images" in table


def test_missing_predictions(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH, b=TRUTH)
    guess = save(tmp_path / "pred", a=GUESS)
    with pytest.raises(UsageError, match=r"lacks 1 of 2 predictions, among them b\.png"):
        evaluate_masks(guess, truth, CLASSES)
    result = evaluate_masks(guess, truth, CLASSES, allow_missing=True)
    assert result.images == 1 and result.missing == ("b",)
    assert "1 without a prediction skipped" in result.table()
    assert evaluate_masks(guess, truth, CLASSES, names=("a",)).images == 1


def test_hint_to_the_masks_folder(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    save(tmp_path / "out/masks", a=GUESS)
    with pytest.raises(UsageError, match=r"did you mean .*masks"):
        evaluate_masks(tmp_path / "out", truth, CLASSES, allow_missing=True)


@pytest.mark.parametrize(
    ("guess", "match"),
    [
        (GUESS[:1], r"got a prediction of \(1, 4\), expected \(2, 4\)"),
        (np.full_like(TRUTH, 9), "prediction contains class 9"),
        (np.full_like(TRUTH, 255), "prediction contains class 255"),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, guess: np.ndarray, match: str) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    with pytest.raises(ImageError, match=match):
        evaluate_masks(save(tmp_path / "pred", a=guess), truth, CLASSES)


def test_truth_of_other_classes_names_its_file(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=np.where(TRUTH == 2, 17, TRUTH).astype(np.uint8))
    match = r"gt/a\.png: contains class 17, expected 0\.\.3 or 255: .*--classes"
    with pytest.raises(ImageError, match=match):
        evaluate_masks(save(tmp_path / "pred", a=GUESS), truth, CLASSES)


def test_usage_errors(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=np.full_like(TRUTH, 255))
    guess = save(tmp_path / "pred", a=GUESS)
    with pytest.raises(UsageError, match="is not a folder"):
        evaluate_masks(tmp_path / "absent", truth, CLASSES)
    with pytest.raises(UsageError, match="every pixel is marked as ignored"):
        evaluate_masks(guess, truth, CLASSES)
    with pytest.raises(UsageError, match=r"gt: lacks 1 mask, among them x\.png"):
        evaluate_masks(guess, truth, CLASSES, names=("x",))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no mask found"):
        evaluate_masks(guess, tmp_path / "none", CLASSES)


def test_read_names(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a\n\n deep/b.png \n")
    assert read_mask_names(path) == ("a", "deep/b")
    assert read_class_names(path) == ("a", "deep/b.png")  # a name, whatever it ends in
    for read in (read_mask_names, read_class_names):
        for text, match in (("\n", "is empty"), ("a\na\n", "more than once")):
            path.write_text(text)
            with pytest.raises(UsageError, match=match):
                read(path)
        with pytest.raises(UsageError, match="absent: not found"):
            read(tmp_path / "absent")
        with pytest.raises(UsageError, match="cannot be read: Is a directory"):
            read(tmp_path)
    path.write_text("a\na.png\n")
    assert read_class_names(path) == ("a", "a.png")
    with pytest.raises(UsageError, match="more than once"):
        read_mask_names(path)


def test_counts_do_not_overflow() -> None:
    counts = confusion_matrix(TRUTH % 255, TRUTH, 3) * 2**31
    assert counts.dtype == np.int64 and counts.min() >= 0
    assert mean_iou(counts) == 1.0 and pixel_accuracy(counts) == 1.0
