"""Label files as rows: text in, labels or an error out."""

import json
import pickle
from pathlib import Path

import pytest

from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import ClassNames, ImageLabels, labels_from_scores, read_image_labels

CLASSES = ("cat", "dog", "dining table")


def pickled_size(value: object) -> int:
    return len(pickle.dumps(value))


def match(labels: ImageLabels, relatives: list[str]) -> dict[str, tuple[str, ...]]:
    """The classes of each image that has a row."""
    matcher = labels.matcher(relatives)
    found = {relative: matcher.find(relative) for relative in relatives}
    return {relative: classes for relative, classes in found.items() if classes is not None}


def read(tmp_path: Path, text: str, name: str = "labels.csv") -> ImageLabels:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_image_labels(tmp_path / name, CLASSES)


@pytest.mark.parametrize(
    ("row", "relative", "expected"),
    [
        ("a.jpg,cat", "a.jpg", ("cat",)),
        ("a.jpg,dog cat", "a.jpg", ("cat", "dog")),  # in the order of the ids
        ("a.jpg,dog;dining table", "a.jpg", ("dog", "dining table")),
        ("a.jpg,dining table", "a.jpg", ("dining table",)),
        ("a.jpg, cat  cat ", "a.jpg", ("cat",)),
        ("a.jpg,", "a.jpg", ()),
        ("a,cat", "a.jpg", ("cat",)),
        ("deep/a.jpg,cat", "deep/a.jpg", ("cat",)),
        ("deep/a,cat", "deep/a.jpg", ("cat",)),
        ("deep\\a.jpg,cat", "deep/a.jpg", ("cat",)),
        ("./deep/a.jpg,cat", "deep/a.jpg", ("cat",)),
        ("a.jpg,cat", "deep/a.jpg", ("cat",)),  # by file name
        ("a,cat", "deep/a.jpg", ("cat",)),  # by stem
        ("JPEGImages/a.jpg,cat", "a.jpg", ("cat",)),
        ('"a,b.jpg",cat', "a,b.jpg", ("cat",)),
        ("b.jpg,cat", "a.jpg", None),
        ("deep/a.jpg,cat\na.jpg,dog", "deep/a.jpg", ("cat",)),  # the path wins over the name
        ("a.jpg,cat\na.jpg,cat", "a.jpg", ("cat",)),
        ("a.jpg,dog\nb.jpg,cat\na.jpg,cat", "a.jpg", ("cat", "dog")),  # one row for each label
        ('a.jpg,"cat, dog"', "a.jpg", ("cat", "dog")),
        ('a.jpg,"dining table, dog"', "a.jpg", ("dog", "dining table")),
        ("a.jpg,Cat DOG", "a.jpg", ("cat", "dog")),
        ("a.jpg, dining  table ", "a.jpg", ("dining table",)),
        (" a.jpg ,cat", "a.jpg", ("cat",)),
        ("a.jpg,cat", "a.jpg ", ("cat",)),
        ("\ufeffa.jpg,cat", "a.jpg", ("cat",)),  # files with byte order marks, joined
        ("deep//a.jpg,cat", "deep/a.jpg", ("cat",)),
        ("K\u00e4tzchen.jpg,cat", "Ka\u0308tzchen.jpg", ("cat",)),  # NFC against NFD
        ("Ka\u0308tzchen.jpg,cat", "K\u00e4tzchen.jpg", ("cat",)),
        ("C:\\data\\a.jpg,cat", "a.jpg", ("cat",)),
        ("s3://bucket/deep/a.jpg,cat", "deep/a.jpg", ("cat",)),
        ("deep/a.jpg,cat", "deeper/a.jpg", None),  # another folder
        ("b/deep/a.jpg,cat", "c/deep/a.jpg", None),
    ],
)
def test_csv_rows(tmp_path: Path, row: str, relative: str, expected: tuple[str, ...] | None) -> None:
    assert match(read(tmp_path, f"image,labels\n{row}\n\n"), [relative]).get(relative) == expected


@pytest.mark.parametrize("column", ["labels", "label", "classes", "class", " Labels "])
def test_columns_of_csv(tmp_path: Path, column: str) -> None:
    text = f"split,{column},image\ntrain,dog cat,a.jpg\nval,,b.jpg\n"
    assert match(read(tmp_path, text), ["a.jpg", "b.jpg"]) == {"a.jpg": ("cat", "dog"), "b.jpg": ()}


def test_names_that_differ_in_case_alone_are_not_confused() -> None:
    names = ClassNames(("Turkey", "turkey", "r\u00e9d fox"))
    assert names.find("turkey") == "turkey" and names.find("Turkey") == "Turkey"
    assert names.find("TURKEY") is None
    assert names.find(" Re\u0301d\tFox") == "r\u00e9d fox"


def test_a_mapping(tmp_path: Path) -> None:
    labels = read_image_labels({"a.jpg": ("dog", "Cat"), Path("b.jpg"): []}, CLASSES)  # type: ignore[dict-item]
    assert match(labels, ["a.jpg", "b.jpg"]) == {"a.jpg": ("cat", "dog"), "b.jpg": ()}
    for wrong in ("dog", 3, {"cat": 0}):
        with pytest.raises(UsageError, match=rf"labels, key 'a': got {wrong!r}, expected a list of class names"):
            read_image_labels({"a": wrong}, CLASSES)  # type: ignore[dict-item]


def test_the_name_of_the_folder_decides_between_rows(tmp_path: Path) -> None:
    labels = read(tmp_path, "image,labels\ntrain/a.jpg,cat\nval/a.jpg,dog\nval/b.jpg,dog\n")
    matcher = labels.matcher(root="train")
    assert matcher.find("a.jpg") == ("cat",)
    assert not matcher.moved
    assert matcher.find("b.jpg") == ("dog",)
    assert matcher.moved == {"val/b.jpg": "b.jpg"}
    assert matcher.unused() == ("val/a.jpg",)
    nested = labels.matcher()
    assert nested.find("train/a.jpg") == ("cat",)
    assert nested.find("train/b.jpg") is None
    assert nested.unused() == ("val/a.jpg", "val/b.jpg")
    assert nested.why_unused("val/a.jpg") == "no image has this name"
    assert nested.why_unused("val/b.jpg") == "names another folder than train/b.jpg"


def test_csv_with_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbfimage,labels\r\na.jpg,cat\r\n")
    assert match(read_image_labels(tmp_path / "l.csv", CLASSES), ["a.jpg"]) == {"a.jpg": ("cat",)}


def test_json(tmp_path: Path) -> None:
    labels = read(tmp_path, json.dumps({"a.jpg": ["dining table", "cat"], "b": []}), "labels.json")
    assert match(labels, ["a.jpg", "b.png"]) == {"a.jpg": ("cat", "dining table"), "b.png": ()}
    matcher = labels.matcher()
    assert matcher.find("a.jpg") and matcher.find("c.jpg") is None
    assert matcher.unused() == ("b",)


@pytest.mark.parametrize(
    ("text", "name", "match"),
    [
        ("a.jpg,cat\n", "l.csv", "line 1: got 'a.jpg,cat', expected the header 'image,labels'"),
        ("", "l.csv", "line 1"),
        ("image,labels\n", "l.csv", "has no row"),
        ("image,labels\na.jpg,cat\nb.jpg,cow\n", "l.csv", "line 3: unknown class 'cow', expected cat, dog"),
        ("image,labels\na.jpg,cat,dog\n", "l.csv", "line 2: got 3 columns"),
        ("image,labels\n,cat\n", "l.csv", "line 2: got no image"),
        (
            "image,labels\na.jpg,\n\na.jpg,dog\n",
            "l.csv",
            r"line 4: a\.jpg has the labels dog here, but no labels at line 2",
        ),
        ("image,labels,classes\na.jpg,cat,dog\n", "l.csv", "line 1: got the columns labels and classes, expected one"),
        ("image,split\na.jpg,train\n", "l.csv", "line 1: got 'image,split', expected the header"),
        ('image,labels\n"a.jpg,cat\n', "l.csv", "line 2: not CSV"),
        ("{", "l.json", "not JSON"),
        ("[" * 500_000, "l.json", "nested too deeply"),
        ('["a"]', "l.json", "no JSON object"),
        ('{"a": "cat"}', "l.json", "key 'a': got 'cat', expected a list"),
        ('{"a": [1]}', "l.json", "expected a list"),
        ('{"a": {}}', "l.json", r"key 'a': got \[\], expected a list"),
        ('{"a": {"cat": 1}}', "l.json", "key 'a': got .*, expected a list"),
        ('{"a": ["cow"]}', "l.json", "key 'a': unknown class 'cow'"),
        ('{"a": ["cat"], "a": ["dog"]}', "l.json", "keep one"),
        ("{}", "l.json", "has no row"),
        ("a cat", "l.txt", r"expected \.csv or \.json"),
    ],
)
def test_errors(tmp_path: Path, text: str, name: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read(tmp_path, text, name)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.csv: not found"):
        read_image_labels(tmp_path / "absent.csv", CLASSES)
    (tmp_path / "latin.csv").write_bytes(b"image,labels\n\xe9.jpg,cat\n")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_image_labels(tmp_path / "latin.csv", CLASSES)


def test_ambiguous_rows(tmp_path: Path) -> None:
    labels = read(tmp_path, "image,labels\nx/a.jpg,cat\ny/a.jpg,dog\nx/b.jpg,cat\ny/b.jpg,cat\n")
    with pytest.raises(UsageError, match=r"a\.jpg matches several rows .*x/a\.jpg, y/a\.jpg"):
        match(labels, ["a.jpg"])
    assert match(labels, ["b.jpg"]) == {"b.jpg": ("cat",)}  # several, but they agree
    both = read(tmp_path, "image,labels\na,cat\na.jpg,dog\n")
    with pytest.raises(UsageError, match="several rows"):
        match(both, ["a.jpg"])


@pytest.mark.parametrize("row", ["a.jpg", "a"])
def test_a_row_about_an_image_by_its_path_is_about_no_other(tmp_path: Path, row: str) -> None:
    labels = read(tmp_path, f"image,labels\n{row},cat\nx/deep/a.jpg,dog\n")
    assert match(labels, ["a.jpg", "deep/a.jpg"]) == {"a.jpg": ("cat",), "deep/a.jpg": ("dog",)}
    alone = read(tmp_path, f"image,labels\n{row},cat\n")
    for order in (["a.jpg", "deep/a.jpg"], ["deep/a.jpg", "a.jpg"]):
        assert match(alone, order) == {"a.jpg": ("cat",)}
        matcher = alone.matcher(order)
        assert [matcher.find(relative) for relative in order if relative == "a.jpg"] == [("cat",)]
        assert matcher.unused() == ()
    assert match(alone, ["deep/a.jpg"]) == {"deep/a.jpg": ("cat",)}


def test_one_row_for_several_images(tmp_path: Path) -> None:
    labels = read(tmp_path, "image,labels\na.jpg,cat\n")
    assert match(labels, ["x/a.jpg", "x/c.jpg"]) == {"x/a.jpg": ("cat",)}
    with pytest.raises(UsageError, match=r"matches several images \(x/a\.jpg, y/a\.jpg\)"):
        match(labels, ["x/a.jpg", "y/a.jpg"])
    with pytest.raises(UsageError, match="write their paths relative to the images' folder"):
        match(labels, ["x/a.jpg", "y/a.jpg", "z.jpg"])


def test_labels_from_scores() -> None:
    scores = {"cow": 0.5, "cat": 0.29, "dog": 0.3, "horse": float("nan")}
    thresholds = dict.fromkeys(scores, 0.3)
    assert labels_from_scores(scores, thresholds) == ("cow", "dog")


def test_images_one_by_one(tmp_path: Path) -> None:
    matcher = read(tmp_path, "image,labels\na.jpg,cat\nx/b.jpg,dog\nc,\nd.jpg,cat\n").matcher()
    assert matcher.find("a.jpg") == matcher.find("a.jpg") == ("cat",)
    assert matcher.find("deep/a.jpg") is None  # the row is about the other by its path
    assert matcher.find("b.jpg") == ("dog",)
    assert matcher.find("c.jpg") == ()
    assert matcher.find("none.jpg") is None
    assert matcher.unused() == ("d.jpg",)


def test_a_row_for_two_images_is_found_when_the_second_comes(tmp_path: Path) -> None:
    labels = read(tmp_path, "image,labels\na.jpg,cat\n")
    for second in ("y/a.jpg", "a.jpg"):  # by its name, and by its path
        matcher = labels.matcher()
        assert matcher.find("x/a.jpg") == ("cat",)
        with pytest.raises(UsageError, match=rf"matches several images \(x/a\.jpg, {second}\)"):
            matcher.find(second)
    known = labels.matcher(["x/a.jpg", "a.jpg"])
    assert known.find("x/a.jpg") is None and known.find("a.jpg") == ("cat",)


def test_a_matcher_holds_rows_and_not_images(tmp_path: Path) -> None:
    matcher = read(tmp_path, "image,labels\na.jpg,cat\nx/a.jpg,dog\n").matcher()
    matcher.find("x/a.jpg")
    matcher.find("none.jpg")  # makes the index of file names
    before = pickled_size(matcher)
    assert not any(matcher.find(f"{i}.jpg") for i in range(1000))
    assert pickled_size(matcher) == before
