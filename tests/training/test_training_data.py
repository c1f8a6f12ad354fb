"""Every image, row and object name of a data set is used, or listed with its reason, or an error."""

import json
import random
import unicodedata
from pathlib import Path

import pytest

from multisa.runtime.errors import DatasetError, MultisaError
from multisa.runtime.sources.storage import is_image
from multisa.training.data import Dataset, read_dataset

CLASSES = "background\nred\nblue\n"
NFC, NFD = "k\u00e4tzchen", "ka\u0308tzchen"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def voc(root: Path, *files: str, train: str = "a\nb\n", val: str = "", classes: str = CLASSES) -> Path:
    """A data set in VOC layout with these files in JPEGImages, which nothing decodes here."""
    for name in files:
        write(root / "JPEGImages" / name)
    write(root / "ImageSets" / "Segmentation" / "train.txt", train)
    if val:
        write(root / "ImageSets" / "Segmentation" / "val.txt", val)
    if classes:
        write(root / "classes.txt", classes)
    return root


def annotate(root: Path, name: str, *objects: str, head: str = "<annotation>") -> None:
    texts = "".join(f"<object><name>{entry}</name><part><name>head</name></part></object>" for entry in objects)
    write(root / "Annotations" / f"{name}.xml", f"{head}{texts}</annotation>")


def findings(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {finding.text: finding.names for finding in dataset.findings}


def classes(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    return {item.id: item.classes for item in dataset.train_images}


def test_object_names_of_another_spelling_and_of_no_class(tmp_path: Path) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg", "c.jpg", train="a\nb\nc\n")
    annotate(root, "a", "Red", " blue\n", "car", "bus")
    annotate(root, "b", "red", "car", head='\ufeff<annotation xmlns="urn:made-up">')
    annotate(root, "c")
    annotate(root, "nobody", "red")
    dataset = read_dataset(root)
    assert classes(dataset) == {"a": (1, 2), "b": (1,), "c": ()}
    assert findings(dataset) == {
        "object names that are no class of classes.txt are left out": ("car in 2 images", "bus in 1 image"),
        "object names are read as classes of another spelling": ("Red for red in 1 image",),
        "1 annotation without an object": ("c",),
        "1 annotation about no image, not used": ("nobody.xml",),
        "train: 3 of 3 images have no mask and are not measured on": ("a", "b", "c"),
        "1 image to train on without any class": ("c",),
    }


def test_objects_of_two_names_and_files_of_other_names(tmp_path: Path) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg")
    for name in ("a", "b"):
        text = "<annotation><object><name>red</name><name>blue</name></object><object/></annotation>"
        write(root / "Annotations" / f"{name}.xml", text)
    for name in ("Labels.csv", "SegmentationObject/a.png", "ImageSets/Segmentation/Val.txt"):
        write(root / name)
    dataset = read_dataset(root)
    assert classes(dataset) == {"a": (1, 2), "b": (1, 2)}
    found = findings(dataset)
    assert found["object names that are no class of classes.txt are left out"] == ("(no name) in 2 images",)
    assert found["1 entry not read, because of its capitals"] == ("Labels.csv",)
    assert found["1 entry beside JPEGImages, not read"] == ("SegmentationObject",)
    assert found["1 entry of ImageSets/Segmentation, not read"] == ("Val.txt",)
    (root / "Annotations" / "b.xml").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 annotations are missing, for example b\.xml; expected one"):
        read_dataset(root)


def test_rows_that_name_other_folders(tmp_path: Path) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg")
    write(root / "labels.csv", "image,labels\nimages/a.jpg,red\nJPEGImages/b.jpg,red\n")
    match = r"no row for 1 image, for example JPEGImages/a\.jpg \(rows about no image: images/a\.jpg\); expected paths"
    with pytest.raises(DatasetError, match=match):
        read_dataset(root)


def test_no_label_at_all(tmp_path: Path) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg", classes="")
    for name in "ab":
        annotate(root, name, "aeroplane parts")
    message = r"none of the 2 images to train on has a label, expected some of aeroplane.*aeroplane parts in 2 images\)"
    with pytest.raises(DatasetError, match=message):
        read_dataset(root)
    write(root / "labels.csv", "image,labels\na,\nb,\n")
    with pytest.raises(DatasetError, match=r"none of the 2 images .* correct the labels"):
        read_dataset(root)


def test_messages_are_one_line_each_and_a_class_without_images_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg")
    write(root / "labels.csv", "image,labels\na,red\nb,red\n" + "".join(f"gone{n},blue\n" for n in range(5)))
    dataset = read_dataset(root)
    assert [finding.text for finding in dataset.findings if finding.is_warning] == [
        "1 class that no image to train on shows"
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [str(finding) for finding in dataset.findings]
    assert "5 rows of labels.csv about no image, not used: gone0, gone1, gone2 and 2 more" in lines
    assert lines[-1] == "1 class that no image to train on shows: blue"
    read_dataset(root, quiet=True)
    assert capsys.readouterr().err == ""


def test_rows_about_images_that_are_not_trained_on(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", "a.jpg", "b.jpg", "v.jpg", "spare.jpg", "spare.png", val="v\n")
    write(root / "labels.json", json.dumps({n: ["red"] for n in ("old/JPEGImages/a.jpg", "b", "v", "spare.png", "x")}))
    write(root / "labels.csv", "image,labels\n")
    found = findings(read_dataset(root))
    assert found["1 row of labels.json with another folder, matched by file name"] == (
        "old/JPEGImages/a.jpg for JPEGImages/a.jpg",
    )
    assert found["2 images labelled in labels.json but not trained on"] == ("JPEGImages/spare.png", "JPEGImages/v.jpg")
    assert found["1 row of labels.json about no image, not used"] == ("x",)
    assert found["2 images in neither train.txt nor val.txt, not used"] == ("spare.jpg", "spare.png")
    assert found["1 label source not read, because another one is used"] == ("labels.csv",)


def test_files_of_a_voc_layout_are_found_by_their_stems(tmp_path: Path) -> None:
    root = voc(tmp_path, "a.JPG", "b.png", "c.jpeg", ".d.jpg", "e.txt", "f/g.jpg", train="a\nb\nc\n", val="")
    write(root / "labels.csv", "image,labels\na,red\nb.png,blue\nJPEGImages/c,red\n")
    for name in ("a.PNG", "z.png", "b.jpg"):
        write(root / "SegmentationClass" / name)
    write(root / "stray.jpg")
    dataset = read_dataset(root)
    assert [item.image.name for item in dataset.train_images] == ["a.JPG", "b.png", "c.jpeg"]
    assert [item.mask and Path(str(item.mask)).name for item in dataset.train_images] == ["a.PNG", None, None]
    assert findings(dataset) == {
        "3 entries of JPEGImages other than images, not used": (".d.jpg (hidden)", "e.txt", "f (folder)"),
        "1 entry of SegmentationClass other than masks (PNG), not used": ("b.jpg",),
        "1 entry beside JPEGImages, not read": ("stray.jpg",),
        "1 mask besides those of train.txt and val.txt, not used": ("z.png",),
        "train: 2 of 3 images have no mask and are not measured on": ("b", "c"),
    }


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_two_files_of_one_stem(tmp_path: Path, folder: str) -> None:
    root = voc(tmp_path, "a.png", "b.jpg")
    write(root / "labels.csv", "image,labels\na,red\nb,blue\n")
    for name in ("a.PNG", "a.png"):
        write(root / folder / name)
    with pytest.raises(DatasetError, match=rf"{folder}/a\.PNG: got a\.png beside it, expected one file"):
        read_dataset(root)


def test_lists_as_editors_and_other_programs_write_them(tmp_path: Path) -> None:
    names = "\ufeffa.jpg  \r\n\r\n# a comment\r\n\ufeff b 1\r\nmy image\t\r\nno 1\r\n"
    root = voc(tmp_path, "a.JPG", "b.jpg", "my image.jpg", "no 1.png", train=names)
    write(root / "labels.csv", "\ufeffimage,labels\r\na,red\r\nb,blue\r\nmy image,red\r\nno 1,blue\r\n")
    write(root / "classes.txt", "\ufeffbackground \r\nred\r\n  blue\r\n\r\n")
    dataset = read_dataset(root)
    assert classes(dataset) == {"a": (1,), "b": (2,), "my image": (1,), "no 1": (2,)}
    found = findings(dataset)
    assert found["1 line of train.txt with a second column, which is not used"] == ("b 1",)
    assert found["1 comment in train.txt"] == ("# a comment",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\nJPEGImages/b.jpg\n", r"train\.txt, line 2: got 'JPEGImages/b\.jpg', expected the name of one image"),
        ("a b\n", r"train\.txt, line 1: got 'a b', expected the name of one image"),
        ("a 2\n", r"train\.txt, line 1: got 'a 2'"),
        ("a\nb\na.jpg\n", r"train\.txt: got a more than once, expected each image once"),
        ("a\nc\nd\n", r"JPEGImages/c\.jpg: listed in train\.txt but missing \(and 1 more\); expected a file"),
        ("# nothing\n", r"got no image name in train_aug\.txt or train\.txt"),
    ],
)
def test_lines_that_name_no_image(tmp_path: Path, lines: str, message: str) -> None:
    root = voc(tmp_path, "a.jpg", "b.jpg", train=lines)
    write(root / "labels.csv", "image,labels\na,red\nb,blue\n")
    with pytest.raises(DatasetError, match=message):
        read_dataset(root)


@pytest.mark.parametrize(("on_disk", "in_text"), [(NFC, NFD), (NFD, NFC)])
def test_composed_and_decomposed_names_are_the_same(tmp_path: Path, on_disk: str, in_text: str) -> None:
    root = voc(tmp_path / "voc", f"{on_disk}.jpg", train=f"{in_text}\n", classes=f"background\n{on_disk}\n")
    write(root / "SegmentationClass" / f"{in_text}.png")
    annotate(root, in_text, in_text)
    dataset = read_dataset(root)
    assert classes(dataset) == {NFC: (1,)} and dataset.class_names == ("background", NFC)
    assert dataset.train[0].image.name == f"{on_disk}.jpg" and dataset.findings == ()
    folder = tmp_path / "folder"
    write(folder / f"{on_disk}.jpg")
    write(folder / "classes.txt", CLASSES)
    write(folder / "labels.csv", f"image,labels\n{in_text}.jpg,red blue\n")
    assert classes(read_dataset(folder)) == {NFC: (1, 2)} and read_dataset(folder).findings == ()


def test_everything_else_in_a_folder_of_images(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a.jpg", ".b.jpg", "notes.txt", "x/c.tar", "x/d.png"):
        write(root / name)
    write(tmp_path / "e.jpg")
    (root / "e.jpg").symlink_to(tmp_path / "e.jpg")
    write(root / "classes.txt", CLASSES)
    write(root / "labels.json", '{"a": ["red"], "x/d": ["blue"], "e.jpg": ["red"]}')
    assert findings(read_dataset(root)) == {
        "2 entries of the folder, not read": (".b.jpg (hidden)", "e.jpg (symbolic link that leaves the folder)"),
        "2 files of another extension than an image's, not used": ("notes.txt", "x/c.tar"),
        "1 row of labels.json about no image, not used": ("e.jpg",),
    }


def spelt(text: str, chance: random.Random) -> str:
    return unicodedata.normalize(chance.choice(("NFC", "NFD")), text)


def random_names(chance: random.Random) -> list[str]:
    stems = chance.sample(["a", "b c", "d.e", "f\u00e9", "g#", "h_1", "\u00fcj", "k"], chance.randint(2, 8))
    return [spelt(stem, chance) + chance.choice((".jpg", ".JPG", ".jpeg", ".png", ".PNG")) for stem in stems]


def table(names: list[str], chance: random.Random) -> str:
    """Rows about some images in any spelling, and about none."""
    keys = [name if chance.random() < 0.5 else name.rpartition(".")[0] for name in names]
    keys += [f"gone{n}" for n in range(chance.randint(0, 2))]
    rows = [f"{spelt(key, chance)},{chance.choice(('red', 'BLUE', 'red blue', ''))}" for key in keys]
    text = chance.choice(("\n", "\r\n")).join(["image,labels", *rows, ""])
    return chance.choice(("", "\ufeff")) + text


def clutter(folder: Path, chance: random.Random) -> None:
    """Entries that no training uses."""
    for name in (".hidden.png", "notes.txt", "below/z.jpg", "spare.gif", "Thumbs.db"):
        if chance.random() < 0.3:
            write(folder / name)
    if chance.random() < 0.3:
        (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")


def nfc(names: list[str]) -> list[str]:
    return sorted(unicodedata.normalize("NFC", name) for name in names)


def named(dataset: Dataset, *words: str) -> list[str]:
    """The names of the findings whose text has one of the words, without their reasons."""
    texts = [n for f in dataset.findings if any(word in f.text for word in words) for n in f.names]
    return [text.partition(" (")[0] for text in texts]


def test_random_folders_are_accounted_for(tmp_path: Path) -> None:
    read = 0
    for seed in range(120):
        chance, root = random.Random(seed), tmp_path / str(seed)
        names = random_names(chance)
        for name in names:
            write(root / name)
        clutter(root, chance)
        write(root / "classes.txt", chance.choice(("", "\ufeff")) + CLASSES)
        keep = names if chance.random() < 0.8 else names[1:]
        text = table([*keep, *(["spare.gif", "below/z.jpg"] if chance.random() < 0.9 else [])], chance)
        write(root / "labels.csv", text)
        try:
            dataset = read_dataset(root, quiet=True)
        except MultisaError:
            continue
        read += 1
        used = [item.image.relative_to(root).as_posix() for item in dataset.train_images]
        files = [p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()]
        others = {"labels.csv", "classes.txt"}
        assert nfc([*used, *named(dataset, "of the folder", "another extension")]) == nfc([*{*files} - others])
        rows = len(text.splitlines()) - 1
        assert rows == len(used) + len(named(dataset, "about no image"))
    assert 60 < read < 120  # some must be refused


def test_random_voc_layouts_are_accounted_for(tmp_path: Path) -> None:
    read = 0
    for seed in range(120):
        chance, root = random.Random(seed), tmp_path / str(seed)
        names = random_names(chance)
        stems = [name.rpartition(".")[0] for name in names]
        cut = chance.randint(1, len(stems))
        lines = [spelt(chance.choice((stem, f"{stem}.jpg", f"{stem} 1")), chance) for stem in stems[:cut]]
        end = chance.choice(("\n", "\r\n", " \n"))
        extra = chance.choice(("", "", "", "# comment\n", "gone\n", "x/y\n"))
        text = chance.choice(("", "\ufeff")) + end.join([*lines, ""]) + extra
        val = "".join(f"{spelt(stem, chance)}\n" for stem in stems[cut : cut + 2])
        voc(root, *names, train=text, val=val)
        clutter(root / "JPEGImages", chance)
        for stem in stems:
            write(root / "SegmentationClass" / f"{spelt(stem, chance)}{chance.choice(('.png', '.PNG', '.bmp'))}")
        objects = {s: chance.sample(["red", "Red", " blue ", "car", "Car", ""], chance.randint(0, 4)) for s in stems}
        for stem, entries in objects.items():
            annotate(root, spelt(stem, chance), *entries)
        try:
            dataset = read_dataset(root, quiet=True)
        except MultisaError:
            continue
        read += 1
        used = [item.image.name for item in (*dataset.train_images, *dataset.val)]
        without = [n for n in names if nfc([n.rpartition(".")[0]])[0] in named(dataset, "val: ")]
        folder = [entry.name for entry in (root / "JPEGImages").iterdir()]
        listed = named(dataset, "of JPEGImages", "in neither train.txt nor val.txt, not used")
        images = [n for n in listed if n in folder]
        assert nfc([*used, *without, *images]) == nfc(folder)
        assert not any(is_image(name) and name in used for name in images)
        shown = {s: {e.strip() for e in objects[s]} for s in stems[:cut]}
        unknown = sum(bool(entry in ("car", "Car", "")) for entries in shown.values() for entry in entries)
        counted = [int(n.split()[-2]) for n in named_counts(dataset, "no class of classes.txt")]
        assert unknown == sum(counted)
        for stem, entries in shown.items():
            expected = {1 for e in entries if e.lower() == "red"} | {2 for e in entries if e == "blue"}
            assert classes(dataset)[nfc([stem])[0]] == tuple(sorted(expected))
    assert 40 < read < 120


def named_counts(dataset: Dataset, words: str) -> list[str]:
    return [name for finding in dataset.findings if words in finding.text for name in finding.names]
