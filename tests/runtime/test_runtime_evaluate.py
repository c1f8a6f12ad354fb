"""Evaluation of mask folders against counts made by hand."""

import json
import unicodedata
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multisa.runtime.cli.main import root
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.evaluation import (
    Evaluation,
    ImageScore,
    SkippedFiles,
    confusion_matrix,
    evaluate_masks,
    mean_iou,
    pixel_accuracy,
    read_class_names,
    read_mask_names,
)
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.imaging.png import png_chunk, voc_palette
from multisa.runtime.sources.storage import LocalStore

CLASSES = ("background", "cat", "dog", "unseen")
TRUTH = np.array([[0, 0, 1, 1], [0, 255, 1, 2]], np.uint8)
GUESS = np.array([[0, 1, 1, 1], [0, 2, 0, 2]], np.uint8)
UNSURE = np.array([[0, 255, 1, 1], [0, 255, 0, 255]], np.uint8)


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
        (GUESS[:1], r"pred/a\.png: got 4 x 1 pixels, expected 4 x 2 as in .*gt/a\.png"),
        (np.full_like(TRUTH, 9), r"pred/a\.png: contains class 9, expected 0\.\.3 or 255"),
        (np.full_like(TRUTH, 254), r"pred/a\.png: contains class 254, expected 0\.\.3 or 255"),
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
    for names, match in (((), "names: is empty"), (("a", "a"), "names: contains 'a' more than once")):
        with pytest.raises(UsageError, match=match):
            evaluate_masks(guess, truth, CLASSES, names=names)
    for classes, match in (
        ([], "classes: is empty"),
        (["cat", "cat"], "classes: contains 'cat' more than once"),
        ([str(i) for i in range(256)], "classes: got 256, expected at most 255"),
    ):
        with pytest.raises(UsageError, match=match):
            evaluate_masks(guess, truth, classes)
    with pytest.raises(UsageError, match=r"palette: got uint8 \[3, 4\], expected uint8 \[1\.\.256, 3\]"):
        evaluate_masks(guess, truth, CLASSES, palette=np.zeros((3, 4), np.uint8))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no mask found, expected PNG files$"):
        evaluate_masks(guess, tmp_path / "none", CLASSES)


def test_one_class(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=np.array([[0, 255]], np.uint8))
    result = evaluate_masks(save(tmp_path / "pred", a=np.array([[0, 0]], np.uint8)), truth, ["all"])
    assert result.iou == {"all": 1.0} and result.ignored_share == 0.5


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
    path.write_bytes("\ufeffa.PNG  \r\ndeep\\b.Png\r\n./e\u0301.png\r\n".encode())
    assert read_mask_names(path) == ("a", "deep/b", "\u00e9")
    path.write_text("a\na.png\n")
    assert read_class_names(path) == ("a", "a.png")
    with pytest.raises(UsageError, match="more than once"):
        read_mask_names(path)


def test_counts_do_not_overflow() -> None:
    counts = confusion_matrix(TRUTH % 255, TRUTH, 3) * 2**31
    assert counts.dtype == np.int64 and counts.min() >= 0
    assert mean_iou(counts) == 1.0 and pixel_accuracy(counts) == 1.0


def test_abstained_pixels_count_as_wrong_or_are_left_out(tmp_path: Path) -> None:
    folders = save(tmp_path / "pred", a=UNSURE), save(tmp_path / "gt", a=TRUTH)
    result = evaluate_masks(*folders, CLASSES)
    # Background: 2 hits, 1 abstained, 1 cat taken for it. Cat: 2 hits of 3. Dog: its only pixel is abstained.
    assert result.iou == {"background": 2 / 4, "cat": 2 / 3, "dog": 0.0, "unseen": None}
    assert result.miou == pytest.approx((2 / 4 + 2 / 3 + 0) / 3) and result.pixel_accuracy == 4 / 7
    assert result.confusion.dtype == np.int64
    assert result.confusion.tolist() == [[2, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert result.abstained.tolist() == [1, 0, 1, 0]  # not the pixel that is also ignored
    np.testing.assert_array_equal(
        result.confusion_shares[:3], [[2 / 3, 0, 0, 0, 1 / 3], [1 / 3, 2 / 3, 0, 0, 0], [0, 0, 0, 0, 1]]
    )
    assert np.isnan(result.confusion_shares[3]).all()
    left_out = evaluate_masks(*folders, CLASSES, ignore_abstained=True)
    assert left_out.iou == {"background": 2 / 3, "cat": 2 / 3, "dog": None, "unseen": None}
    assert left_out.miou == pytest.approx(2 / 3) and left_out.pixel_accuracy == 4 / 5
    assert left_out.confusion_shares[0].tolist() == [1, 0, 0, 0, 0]
    for answer, label in ((result, "abstained (wrong) "), (left_out, "abstained (left out)")):
        figures = answer.to_json()
        assert figures["abstained_share"] == 2 / 7 and figures["ignored_share"] == 1 / 8
        assert figures["ignore_abstained"] == (answer is left_out)
        lines = answer.table().splitlines()
        assert any(line.startswith(label) and line.endswith(" 28.57%") for line in lines)
        assert any(line.startswith("ignored ground truth") and line.endswith(" 12.50%") for line in lines)


def test_only_abstained_pixels(tmp_path: Path) -> None:
    folders = save(tmp_path / "pred", a=np.full_like(TRUTH, 255)), save(tmp_path / "gt", a=TRUTH)
    result = evaluate_masks(*folders, CLASSES)
    assert result.miou == result.pixel_accuracy == 0 and result.abstained_share == 1
    with pytest.raises(UsageError, match=r"pred: every pixel is abstained \(255\) and left out"):
        evaluate_masks(*folders, CLASSES, ignore_abstained=True)
    with pytest.raises(ValueError, match=r"prediction contains class 255, expected 0\.\.3"):
        confusion_matrix(np.full_like(TRUTH, 255), TRUTH, 4)


def test_names_match_in_any_case_of_the_extension_and_unicode_form(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH, b=TRUTH, c=TRUTH)
    guess = save(tmp_path / "pred", a=TRUTH % 255, b=GUESS, c=TRUTH % 255)
    (truth / "a.png").rename(truth / "a.PNG")
    (guess / "b.png").rename(guess / "b.Png")
    for folder, form in ((truth, "NFC"), (guess, "NFD")):
        below = folder / unicodedata.normalize(form, "caf\u00e9")
        below.mkdir()
        (folder / "c.png").rename(below / unicodedata.normalize(form, "\u00e0.png"))
    result = evaluate_masks(guess, truth, CLASSES)
    assert result.images == 3 and result.skipped == result.missing == ()
    assert result.iou["dog"] == 1 and result.iou["cat"] == 8 / 10  # of b, 2 of 4 pixels
    listed = tmp_path / "list.txt"
    listed.write_bytes(unicodedata.normalize("NFD", "\ufeffcaf\u00e9\\\u00e0.PNG \r\nb.PNG\r\n").encode())
    result = evaluate_masks(guess, truth, CLASSES, names=listed)
    assert result.images == 2 and result.iou["cat"] == 5 / 7
    assert result.skipped == (
        SkippedFiles("predictions", "not in the list", ("a.png",)),
        SkippedFiles("ground truth", "not in the list", ("a.PNG",)),
    )
    names = [unicodedata.normalize("NFD", "caf\u00e9/\u00e0")]
    assert evaluate_masks(guess, truth, CLASSES, names=names).miou == 1


@pytest.mark.parametrize("second", ["deep/e\u0301.png", "deep/\u00e9.PNG"])
@pytest.mark.parametrize("side", ["pred", "gt"])
def test_two_masks_of_one_name_are_refused(tmp_path: Path, side: str, second: str) -> None:
    folders = [save(tmp_path / name, deep__é=TRUTH % 255) for name in ("pred", "gt")]
    data = (tmp_path / side / "deep/\u00e9.png").read_bytes()
    (tmp_path / side / second).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{side}: got .*, expected one mask of that name") as caught:
        evaluate_masks(*folders, CLASSES)
    assert ascii("deep/\u00e9.png") in str(caught.value) and ascii(second) in str(caught.value)


def test_every_other_file_is_counted(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    guess = save(tmp_path / "pred", a=GUESS, new=GUESS, deep__new=GUESS)
    save(tmp_path / "elsewhere", b=GUESS)
    for name in (".DS_Store", "._a.png", "readme.txt", "a.jpg", "png"):
        (guess / name).write_bytes(b"")
    save(guess / ".cache", a=GUESS)
    (truth / "link.png").symlink_to(tmp_path / "elsewhere/b.png")
    (truth / "broken.png").symlink_to("nowhere.png")
    (truth / "folder").symlink_to(".")
    result = evaluate_masks(guess, truth, CLASSES)
    assert result.images == 1
    assert result.skipped == (
        SkippedFiles("predictions", "hidden", (".DS_Store", "._a.png", ".cache")),
        SkippedFiles("predictions", "not PNG", ("a.jpg", "png", "readme.txt")),
        SkippedFiles("predictions", "without ground truth", ("deep/new.png", "new.png")),
        SkippedFiles("ground truth", "broken symbolic link", ("broken.png",)),
        SkippedFiles("ground truth", "symbolic link to a folder", ("folder",)),
        SkippedFiles("ground truth", "symbolic link that leaves the folder", ("link.png",)),
    )
    assert result.to_json()["skipped"][1] == {
        "folder": "predictions", "reason": "not PNG", "paths": ("a.jpg", "png", "readme.txt")
    }  # fmt: skip
    assert "skipped in predictions: not PNG: 3 (a.jpg)\n" in result.table()
    assert result.table().endswith("\n1 image")


def test_doubtful_masks_and_classes_are_noted(tmp_path: Path) -> None:
    binary = np.where(TRUTH > 0, 255, 0).astype(np.uint8)
    folders = save(tmp_path / "pred", a=binary), save(tmp_path / "gt", a=binary)
    only = "only the values 0 and 255, and 255 is no class: write ids 0, 1, .. if it stands for one"
    result = evaluate_masks(*folders, CLASSES)
    assert result.notes == (f"ground truth: {only}",)  # whose 255 hide those of the predictions
    assert result.table().splitlines()[-2] == f"note: ground truth: {only}"
    assert result.to_json()["notes"] == [f"ground truth: {only}"]
    assert evaluate_masks(folders[0], save(tmp_path / "gt2", a=TRUTH), CLASSES).notes == (f"predictions: {only}",)
    (note,) = evaluate_masks(*[save(tmp_path / "gt3", a=TRUTH)] * 2, (*CLASSES[1:], "more")).notes
    assert note.startswith(f"id 0 is {CLASSES[1]!r}, the first class")


def test_arguments_that_have_no_order_or_are_no_folder(tmp_path: Path) -> None:
    folders = save(tmp_path / "pred", a=GUESS), save(tmp_path / "gt", a=TRUTH)
    assert evaluate_masks(*folders, CLASSES, names=[Path("a.png")]).images == 1  # type: ignore[list-item]
    with pytest.raises(UsageError, match="classes: got set, expected a sequence, in the order of the ids"):
        evaluate_masks(*folders, set(CLASSES))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="predictions: got list, expected the path of a folder"):
        evaluate_masks([folders[0]], folders[1], CLASSES)  # type: ignore[arg-type]
    (tmp_path / "c.txt").write_text("# mine\nbackground\n")
    with pytest.raises(UsageError, match=r"c\.txt: got the line '# mine', expected one class per line"):
        evaluate_masks(*folders, tmp_path / "c.txt")


def test_masks_that_are_not_found_say_what_is_there(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.jpg", "b.jpg", ".DS_Store"):
        (other / name).write_bytes(b"")
    match = r"no mask found, expected PNG files \(skipped: hidden: 1 \(\.DS_Store\); not PNG: 2 \(a\.jpg\)\)"
    with pytest.raises(UsageError, match=match):
        evaluate_masks(truth, other, CLASSES)
    save(other, a_pred=GUESS)
    with pytest.raises(UsageError, match=r"lacks 1 of 1 prediction, .*; without ground truth: 1 \(a_pred\.png\)"):
        evaluate_masks(other, truth, CLASSES)


def test_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = save(tmp_path / "pred", a=GUESS, deep__b=GUESS), save(tmp_path / "gt", a=TRUTH, deep__b=TRUTH)
    folder = LocalStore.folder

    def refuse(self: LocalStore, path: str, keep: object) -> object:
        if Path(path) == tmp_path / "gt/deep":
            raise PermissionError
        return folder(self, path, keep)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "folder", refuse)
    with pytest.raises(UsageError, match=r"gt/deep: cannot be listed \(Permission denied\): make it readable"):
        evaluate_masks(*folders, CLASSES)


def paint(mask: np.ndarray, *, alpha: int | None = None, palette: np.ndarray | None = None) -> Image.Image:
    """The mask in the colours of a palette, as RGB, or as RGBA with `alpha`."""
    rgb = (voc_palette() if palette is None else palette)[mask]
    return Image.fromarray(rgb if alpha is None else np.insert(rgb, 3, alpha, axis=2))


def test_masks_of_other_kinds(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    guess = tmp_path / "pred"
    guess.mkdir()
    indexed = Image.fromarray(UNSURE % 255, "P")
    indexed.putpalette([9, 9, 9] * 4)  # colours say nothing: ids count
    for image, options, mask in (
        (paint(UNSURE), {}, UNSURE),
        (paint(UNSURE, alpha=255), {}, UNSURE),
        (Image.fromarray(UNSURE), {}, UNSURE),
        (Image.fromarray(UNSURE.astype(np.uint16)), {}, UNSURE),
        (indexed, {"bits": 2}, UNSURE % 255),
    ):
        image.save(guess / "a.png", **options)
        result = evaluate_masks(guess, truth, CLASSES)
        expected = np.where(mask == 255, 4, mask)
        for row, column in np.ndindex(4, 4):
            assert result.confusion[row, column] == ((row == TRUTH) & (column == expected)).sum()
        assert result.abstained.tolist() == [((row == TRUTH) & (expected == 4)).sum() for row in range(4)]


def test_colours_are_those_of_the_palette(tmp_path: Path) -> None:
    palette = np.array([[0, 0, 0], [7, 7, 7], [0, 0, 9], [1, 1, 1]], np.uint8)
    for name, mask in (("pred", GUESS), ("gt", TRUTH % 255)):
        (tmp_path / name).mkdir()
        paint(mask, palette=palette).save(tmp_path / name / "a.png")
    folders = tmp_path / "pred", tmp_path / "gt"
    assert evaluate_masks(*folders, CLASSES, palette=palette).iou["dog"] == 1 / 2
    match = r"pred/a\.png: got the colour RGBA \(7, 7, 7, 255\) in 3 pixels, first in row 0, column 1, expected the"
    with pytest.raises(ImageError, match=match):
        evaluate_masks(*folders, CLASSES)
    palette[3] = 7  # two classes of one colour
    with pytest.raises(ImageError, match=match):
        evaluate_masks(*folders, CLASSES, palette=palette)
    paint(GUESS, palette=palette, alpha=254).save(folders[0] / "a.png")
    with pytest.raises(ImageError, match=r"RGBA \(0, 0, 0, 254\) in 3 pixels, first in row 0, column 0"):
        evaluate_masks(*folders, CLASSES, palette=palette)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (Image.fromarray(GUESS > 0), "mode 1"),
        (Image.fromarray(np.full_like(GUESS, 256, np.uint16)), "16-bit grey with the value 256, expected class ids"),
        (Image.fromarray(np.stack([GUESS, GUESS], -1), "LA"), "mode LA"),
    ],
)
def test_masks_without_ids_are_refused(tmp_path: Path, image: Image.Image, match: str) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    (tmp_path / "pred").mkdir()
    image.save(tmp_path / "pred/a.png")
    with pytest.raises(ImageError, match=rf"pred/a\.png: got .*{match}"):
        evaluate_masks(tmp_path / "pred", truth, CLASSES)


def test_coloured_masks_have_the_limits_of_others(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH)
    guess = tmp_path / "pred/a.png"
    guess.parent.mkdir()
    paint(GUESS).save(guess)
    assert evaluate_masks(guess.parent, truth, CLASSES, max_pixels=8).images == 1
    with pytest.raises(ImageError, match=r"pred/a\.png: 4x2 = 8 pixels, expected at most 7"):
        evaluate_masks(guess.parent, truth, CLASSES, max_pixels=7)
    data = guess.read_bytes()
    guess.write_bytes(data[:33] + 10_001 * png_chunk(b"tEXt", b"a\0b") + data[33:])
    with pytest.raises(ImageError, match=r"pred/a\.png: cannot be decoded: .*10000"):
        evaluate_masks(guess.parent, truth, CLASSES)
    guess.write_bytes(data[:-30])
    with pytest.raises(ImageError, match=r"pred/a\.png: cannot be decoded"):
        evaluate_masks(guess.parent, truth, CLASSES)


def test_worst_images(tmp_path: Path) -> None:
    truth = save(tmp_path / "gt", a=TRUTH, b=TRUTH, c=TRUTH, d=np.full_like(TRUTH, 255), e=TRUTH)
    guess = save(tmp_path / "pred", a=TRUTH % 255, b=GUESS, c=UNSURE, d=GUESS, e=GUESS)
    # b and e: 2 / 4, 2 / 4 and 1; c: 2 / 4, 2 / 3 and 0, or 2 / 3 and 2 / 3 without abstained pixels.
    b, c = ImageScore("b", pytest.approx(2 / 3), "background", 0.5), ImageScore("c", pytest.approx(7 / 18), "dog", 0.0)
    e, a = ImageScore("e", pytest.approx(2 / 3), "background", 0.5), ImageScore("a", 1.0, "background", 1.0)
    result = evaluate_masks(guess, truth, CLASSES, worst=9)
    assert result.worst == (c, b, e, a)  # no pixel of d counts
    assert evaluate_masks(guess, truth, CLASSES, worst=2).worst == (c, b)
    assert evaluate_masks(guess, truth, CLASSES).worst == ()
    worst = evaluate_masks(guess, truth, CLASSES, worst=9, ignore_abstained=True).worst
    assert [score.name for score in worst] == ["b", "c", "e", "a"] and worst[1].miou == pytest.approx(2 / 3)
    assert result.to_json()["worst"][0] == {
        "name": "c", "miou": pytest.approx(7 / 18), "worst_class": "dog", "worst_iou": 0.0
    }  # fmt: skip
    assert "mIoU  38.89%  c, worst class dog: 0.00%\n" in result.table()


def evaluation_of(confusion: np.ndarray, abstained: np.ndarray | None = None) -> Evaluation:
    n = len(confusion)
    classes = tuple(f"c{i}" for i in range(n))
    abstained = np.zeros(n, np.int64) if abstained is None else abstained
    return Evaluation(classes, confusion, abstained, 0, False, 1, (), (), (), ())


def test_confusion_as_a_matrix() -> None:
    confusion = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 2999]])
    result = evaluation_of(confusion, np.array([0, 0, 1000]))
    matrix = [line.split() for line in result.confusion_table().splitlines()[1:]]
    assert matrix == [
        ["0", "1", "2", "255"],
        ["0", "c0", "75.0", "25.0", ".", "."],
        ["1", "c1", "-", "-", "-", "-"],
        ["2", "c2", "0.0", ".", "75.0", "25.0"],
    ]
    assert result.largest_confusions() == [
        ("c0", "c1", 0.25), ("c2", "abstained", 0.25), ("c2", "c0", 1 / 4000)
    ]  # fmt: skip
    assert result.to_json(confusion=True)["confusion"] == confusion.tolist()
    assert result.to_json(confusion=True)["abstained"] == [0, 0, 1000]
    assert "confusion" not in result.to_json()
    assert evaluation_of(confusion).confusion_table().splitlines()[1].split() == ["0", "1", "2"]


@pytest.mark.parametrize("n", [7, 21])
def test_matrix_columns_are_aligned(n: int) -> None:
    lines = evaluation_of(np.full((n, n), 10) + 7 * np.eye(n, dtype=np.int64)).confusion_table().splitlines()[1:]
    assert len(lines) == n + 1 and len(set(map(len, lines))) == 1 and len(lines[0]) <= 100


def test_confusion_of_many_classes_is_a_list() -> None:
    confusion = 97 * np.eye(81, dtype=np.int64)
    for i in range(1, 31):
        confusion[i, 0] = i
    lines = evaluation_of(confusion).confusion_table().splitlines()
    assert len(lines) == 21 and lines[1] == "c30 -> c0  23.6% of c30" and lines[20] == "c11 -> c0  10.2% of c11"
    assert evaluation_of(np.eye(81, dtype=np.int64)).confusion_table().splitlines()[1:] == ["none"]


def test_command(tmp_path: Path) -> None:
    save(tmp_path / "pred", a=UNSURE, extra=GUESS)
    save(tmp_path / "gt", a=TRUTH)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    folders = [str(tmp_path / name) for name in ("pred", "gt")]
    arguments = ["evaluate", *folders, "--classes", str(tmp_path / "classes.txt"), "--confusion", "--worst", "1"]
    shown = CliRunner().invoke(root, arguments)
    assert shown.exit_code == 0 and "255\n  0 background  66.7" in shown.stdout and "worst class dog" in shown.stdout
    assert "skipped in predictions: without ground truth: 1 (extra.png)" in shown.stdout
    figures = json.loads(CliRunner().invoke(root, [*arguments, "--json", "--ignore-abstained"]).stdout)
    assert figures["miou"] == pytest.approx(2 / 3) and figures["confusion"][1] == [1, 2, 0, 0]
    assert figures["worst"][0]["name"] == "a" and figures["ignore_abstained"] is True


def reference_miou(pairs: list[tuple[np.ndarray, np.ndarray]], *, ignore_abstained: bool) -> float:
    prediction, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    kept = (truth != 255) & ~(ignore_abstained & (prediction == 255))
    ious = []
    for class_id in range(len(CLASSES)):
        hit, named = kept & (prediction == class_id), kept & (truth == class_id)
        if (hit | named).any():
            ious.append((hit & named).sum() / (hit | named).sum())
    return float(np.mean(ious))


KINDS = ("plain", "upper", "coloured", "16-bit", "NFD", "absent")
EXTRAS = (
    ".DS_Store",
    "._\u00e90.png",
    ".hidden/\u00e90.png",
    "notes.txt",
    "m0.jpg",
    "deep/x.tiff",
    "more.png",
    "deep/o.PNG",
)
masks_in_folders = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS[:-1])), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(masks_in_folders, st.sets(st.sampled_from(EXTRAS)), st.sets(st.sampled_from(EXTRAS[:6])), st.integers(0, 2**32))
def test_every_file_and_pixel_is_accounted_for(
    kinds: list[tuple[str, str]], extra_predictions: set[str], extra_truth: set[str], seed: int
) -> None:
    random = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        pairs = []
        for i, both in enumerate(kinds):
            pair = tuple(random.choice([0, 1, 2, 3, 255], (3, 5)).astype(np.uint8) for _ in both)
            pair[0][0, 0] = pair[1][0, 0] = 1  # some pixel counts
            for side, kind, mask in zip(("pred", "gt"), both, pair, strict=True):
                write_as(kind, Path(folder, side, "deep"), f"\u00e9{i}", mask)
            if both[0] != "absent":
                pairs.append(pair)
        for side, extras in (("pred", extra_predictions), ("gt", extra_truth)):
            for name in extras:
                write_as("plain", Path(folder, side, name).parent, Path(name).name, pair[0])
        given_files = {side: sum(p.is_file() for p in Path(folder, side).rglob("*")) for side in ("pred", "gt")}
        folders = Path(folder, "pred"), Path(folder, "gt")
        if not pairs:
            with pytest.raises(UsageError, match="lacks"):
                evaluate_masks(*folders, CLASSES, allow_missing=True)
            return
        results = [evaluate_masks(*folders, CLASSES, allow_missing=True, ignore_abstained=on) for on in (False, True)]
    for ignore_abstained, result in enumerate(results):
        skipped = Counter[str]()
        for files in result.skipped:
            skipped[files.folder] += files.count
        assert given_files["pred"] == result.images + skipped["predictions"]
        assert given_files["gt"] == result.images + len(result.missing) + skipped["ground truth"]
        assert result.images == len(pairs) and len(result.missing) == len(kinds) - len(pairs)
        assert result.miou == pytest.approx(reference_miou(pairs, ignore_abstained=bool(ignore_abstained)), abs=1e-12)
        assert result.confusion.sum() + result.abstained.sum() + result.ignored == 15 * result.images


def write_as(kind: str, folder: Path, name: str, mask: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = unicodedata.normalize("NFD", name) if kind == "NFD" else name
    path = folder / (stem if "." in stem else f"{stem}.{'PNG' if kind == 'upper' else 'png'}")
    image = {"coloured": paint(mask), "16-bit": Image.fromarray(mask.astype(np.uint16))}.get(
        kind, Image.fromarray(mask)
    )
    if kind != "absent":
        image.save(path, "PNG")
