"""Every file, row and label that a run is given is used, or listed with its reason."""

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from job_runs import reasons, records, run_label, run_segment
from PIL import Image

from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.jobs.output import SNAPSHOT, UNUSED
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.sources.base import OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.registry import open_source

CLASSES = ("red thing", "green")


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def labels_of(out: Path) -> dict[str, tuple[str, list[str]]]:
    """By image: where its labels come from, and which they are."""
    return {row["image"]: (row["labels_from"], row["classes"]) for row in records(out)}


# Names of files, by what a source is to do with them.
IMAGES = (
    "a.png",
    "B.PNG",
    "deep/c.png",
    "deep/er/d.png",
    "K\u00e4tzchen.png",
    "Ka\u0308mel.png",
    "two words.png",
    "x,y.png",
)
OTHERS = ("notes.txt", "data.bin", "noextension")
UNREAD = ("d.heic", "deep/e.NEF")
MASKS = ("a.mask.png", "deep/c.seg.PNG")
HIDDEN = (".e.png", ".git/f.png", "deep/._c.png")
UNSAFE = ("../up.png", "back\\slash.png", "a//b.png", "/root.png")  # only archives hold these


def write_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return folder


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tar(path: Path, names: list[str]) -> Path:
    return write_members(path, [(name, png()) for name in names])


def write_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, png())
    return path


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("write", [write_folder, write_tar, write_zip])
def test_files_are_listed_skipped_or_counted(
    tmp_path: Path, write: Callable[[Path, list[str]], Path], seed: int
) -> None:
    random = np.random.default_rng(seed)
    unsafe = () if write is write_folder else UNSAFE
    names = [name for name in (*IMAGES, *OTHERS, *MASKS, *UNREAD, *HIDDEN, *unsafe) if random.random() < 0.6]
    random.shuffle(names)
    path = write(tmp_path / ("t.tar" if write is write_tar else "t.zip" if write is write_zip else "t"), names)
    if not path.exists():
        return
    with open_source(str(path)) as source:
        listing = list(source.listing())
    prefix = "t/" if write is write_tar else ""
    used = {entry.id.removeprefix(prefix) for entry in listing if isinstance(entry, SourceItem)}
    skipped = {entry.id.removeprefix(prefix) for entry in listing if isinstance(entry, Skipped)}
    others = sum(entry.count for entry in listing if isinstance(entry, OtherFiles))
    assert used == set(IMAGES) & set(names)
    listed = {name for name in names if any(name == id_ or name.startswith(f"{id_}/") for id_ in skipped)}
    assert listed == {name for name in names if name in (*HIDDEN, *MASKS, *UNREAD, *unsafe)}
    assert len(used) + len(listed) + others == len(names)


SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f" {name} ",
    lambda name: f"./{name}",
    lambda name: name.replace("/", "\\"),
    lambda name: name.replace("/", "//"),
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: name.rpartition(".")[0],
    lambda name: name.rpartition("/")[2],
    lambda name: f"C:\\data\\images\\{name}",
)
CELLS: tuple[tuple[str, list[str]], ...] = (
    ("green", ["green"]),
    ("Green", ["green"]),
    ("red thing", ["red thing"]),
    (" red  thing;green", ["red thing", "green"]),
    ("green, red thing", ["red thing", "green"]),
    ("", []),
)


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_used_or_listed(tmp_path: Path, bundle: Bundle, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(seed)
    folder = write_folder(tmp_path / "images", list(IMAGES))
    expected: dict[str, tuple[str, list[str]]] = {}
    rows: list[tuple[str, str]] = []
    for name in IMAGES:
        cell, classes = CELLS[random.integers(len(CELLS))]
        if random.random() < 0.2:
            continue
        expected[name] = ("file", classes)
        key = SPELLINGS[random.integers(len(SPELLINGS))](name)
        is_long = len(classes) > 1 and random.random() < 0.5
        rows += [(key, one) for one in classes] if is_long else [(key, cell)]
    unused = [(f"gone{i}.png", "green") for i in range(random.integers(4))]
    rows += unused
    if not expected:
        return
    random.shuffle(rows)
    with (tmp_path / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows(
            [("Image", "split", "Label"), *((k, "x", v) for k, v in rows)]
        )
    out = tmp_path / "out"
    run_label(folder, out, bundle, labels=tmp_path / "labels.csv")
    found = labels_of(out)
    assert found.keys() == set(IMAGES)
    assert {name: found[name] for name in expected} == expected
    without = len(IMAGES) - len(expected)
    assert [source for name, (source, _) in found.items() if name not in expected] == ["scores"] * without
    messages = capsys.readouterr().err
    assert (f"labelled with predicted classes: {without} of {len(IMAGES)} images" in messages) == bool(without)
    count = f"{len(unused)} row{'' if len(unused) == 1 else 's'}"
    assert (f"without an image: {count} of" in messages) == bool(unused)


def write_manifest(path: Path, rows: list[tuple[str, str]]) -> None:
    if path.suffix == ".csv":
        lines = ["\ufeffimage,classes,more", *(f'{image},"{cell}",1' for image, cell in rows)]
        path.write_text("\r\n".join(lines), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"image": image, "Label": cell}) + "\n" for image, cell in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        images, cells = zip(*rows, strict=True)
        parquet.write_table(pyarrow.table({"image": images, "Class": cells}), path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_of_a_manifest(tmp_path: Path, bundle: Bundle, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, ["a.png", "b.png", "c.png"])
    path = tmp_path / f"m{suffix}"
    write_manifest(
        path, [("a.png", "green"), ("a.png", "Red Thing"), ("b.png", "red thing, green"), ("c.png", "green")]
    )
    assert run_label(path, tmp_path / "out", bundle).done == 3
    both = ("file", ["red thing", "green"])
    assert labels_of(tmp_path / "out") == {"a.png": both, "b.png": both, "c.png": ("file", ["green"])}
    assert "predicted classes" not in capsys.readouterr().err
    write_manifest(path, [("a.png", "green"), ("b.png", "green"), ("a.png", "red thing")])
    with pytest.raises(UsageError, match=r"a\.png is a duplicate, expected .* its rows one after the other"):
        run_label(path, tmp_path / "out2", bundle)
    write_manifest(path, [("a.png", "blue thing")])
    with pytest.raises(UsageError, match=r"a\.png: unknown class 'blue', expected red thing, green"):
        run_label(path, tmp_path / "out2", bundle)
    run_segment(path, tmp_path / "out3", bundle)  # which has no use for labels
    assert "segment does not use image-level labels: those of 1 of 1 image are ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "image,labels,label\na.png,green,green\n", "line 1: got the columns labels and label, expected one"),
        ("m.jsonl", '{"image": "a.png", "class": "green", "classes": []}', "line 1: got the columns class and classes"),
        ("m.jsonl", '{"image": "a.png", "image": "b.png"}', "line 1: is JSON with a key that occurs twice"),
        ("m.jsonl", '{"image": "a.png", "label": 3}', "line 1, 'label': got '3', expected a list of class names"),
    ],
)
def test_manifests_with_several_meanings(tmp_path: Path, bundle: Bundle, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        run_label(tmp_path / name, tmp_path / "out", bundle)


def test_images_without_any_labels(
    tmp_path: Path, bundle: Bundle, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_label(photos, tmp_path / "out", bundle)
    assert "labelled with predicted classes: 6 of 6 images\n" in capsys.readouterr().err
    labels = {"elsewhere/a.jpg": ["green"], "other/deep/d.png": ["green"], "else/c.jpg": []}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    run_label(photos, tmp_path / "out2", bundle, labels=tmp_path / "labels.json")
    messages = capsys.readouterr().err
    assert "labelled with predicted classes: 4 of 6 images: b.png, broken.jpg, deep/c.jpg and 1 more" in messages
    assert "labels.json: else/c.jpg (names another folder than deep/c.jpg)" in messages
    moved = "elsewhere/a.jpg for a.jpg, other/deep/d.png for deep/d.png"
    assert f"used, though they name another folder: 2 rows of {tmp_path / 'labels.json'}: {moved}" in messages
    assert labels_of(tmp_path / "out2")["deep/d.png"] == ("file", ["green"])


def test_a_source_without_an_image_says_what_it_holds(tmp_path: Path, bundle: Bundle) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"folder .*images: no image found \(nothing is there\), expected"):
        run_segment(folder, tmp_path / "out", bundle)
    (tmp_path / "away.png").write_bytes(png())
    for name in ("l.png", "m.png"):
        (folder / name).symlink_to(tmp_path / "away.png")
    write_folder(folder, [".e.png", "a.mask.png", "notes.txt"])
    expected = (
        r"no image found \(found only symbolic link that leaves the folder: 2 \(l\.png\), "
        r"a mask by its name \(\.mask\.png\): 1 \(a\.mask\.png\), hidden: 1 \(\.e\.png\) and 1 more\), expected"
    )
    with pytest.raises(UsageError, match=expected):
        run_segment(folder, tmp_path / "out", bundle)
    write_zip(tmp_path / "z.zip", ["../a.png", "b.txt"])
    with pytest.raises(UsageError, match=r"found only path that leaves .*, 1 file not named like an image: "):
        run_segment(tmp_path / "z.zip", tmp_path / "out", bundle)


@pytest.mark.parametrize("order", [["a.png", "b.png", "a.json", "b.cls"], ["b.cls", "a.json", "b.png", "a.png"]])
def test_labels_apart_from_their_image_in_a_tar(tmp_path: Path, bundle: Bundle, order: list[str]) -> None:
    data = {
        "a.png": png(1),
        "b.png": png(2),
        "a.json": b'["green"]',
        "b.cls": b"red thing",
        "c.json": b"[]",
        "x.txt": b"",
    }
    write_members(tmp_path / "s.tar", [(name, data[name]) for name in (*order, "c.json", "x.txt")])
    assert run_label(tmp_path / "s.tar", tmp_path / "out", bundle).skipped == 1
    assert labels_of(tmp_path / "out") == {"s/a.png": ("file", ["green"]), "s/b.png": ("file", ["red thing"])}
    with Snapshot(tmp_path / "out" / SNAPSHOT) as snapshot:
        assert [*snapshot.skipped_entries()] == [Skipped("s/c.json", "belongs to no image")]
        assert snapshot.other_files == OtherFiles(1)


def test_labels_apart_from_their_image_in_a_tar_that_memory_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multisa.runtime.sources.tar.HELD_MEMBERS", 2)
    write_tar(tmp_path / "s.tar", ["a.png", "b.png", "c.cls", "a.cls", "a.png", "readme.txt", "d.png"])
    with open_source(str(tmp_path / "s.tar")) as source:
        listing = list(source.listing())
    reason = "does not stand beside an image in the tar file: sort its members by name, as it has more than 2"
    assert Skipped("s/c.cls", reason) in listing
    assert sum(isinstance(entry, SourceItem) for entry in listing) == 3


@pytest.mark.parametrize(
    "members",
    [
        [("a.png", png()), ("a.json", b'["green"]'), ("a.cls", b"red thing")],
        [("a.png", png()), ("a.json", b'["green"]'), ("a.json", b"[]")],
        [("a.json", b'["red thing"]'), ("b.png", png()), ("a.png", png()), ("a.json", b'{"labels": "green"}')],
    ],
)
def test_contrary_labels_of_one_sample(tmp_path: Path, bundle: Bundle, members: list[tuple[str, bytes]]) -> None:
    path = write_members(tmp_path / "s.tar", members)
    with pytest.raises(UsageError, match=r"s/a\.\w+: got the labels \[.*\], but \[.*\] in a\.\w+, expected the same"):
        run_label(path, tmp_path / "out", bundle)
    run_segment(path, tmp_path / "out2", bundle)  # which has no use for them


def test_equal_labels_of_one_sample(tmp_path: Path, bundle: Bundle) -> None:
    members = [("a.png", png()), ("a.json", b'["green", "red thing"]'), ("a.cls", b"Red thing;green"), ("a.txt", b"hi")]
    run_label(write_members(tmp_path / "s.tar", members), tmp_path / "out", bundle)
    assert labels_of(tmp_path / "out") == {"s/a.png": ("file", ["red thing", "green"])}
    with Snapshot(tmp_path / "out" / SNAPSHOT) as snapshot:  # the caption
        assert snapshot.other_files.kinds == {".txt": (1, "a.txt")}


def test_joined_archives(tmp_path: Path, bundle: Bundle) -> None:
    one = write_members(tmp_path / "1.tar", [("a.png", png(1)), ("a.cls", b"green")])
    two = write_members(tmp_path / "2.tar", [("b.png", png(2)), ("b.cls", b"red thing")])
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    run_label(tmp_path / "both.tar", tmp_path / "out", bundle)
    expected = {"both/a.png": ("file", ["green"]), "both/b.png": ("file", ["red thing"])}
    assert labels_of(tmp_path / "out") == expected
    (tmp_path / "junk.tar").write_bytes(one.read_bytes() + b"junk" * 512)
    with open_source(str(tmp_path / "junk.tar")) as source:
        reasons_of = [entry.reason for entry in source.listing() if isinstance(entry, Skipped)]
    assert len(reasons_of) == 1 and reasons_of[0].startswith(f"damaged at byte {one.stat().st_size}: ")
    write_zip(tmp_path / "1.zip", ["a.png"])
    first = (tmp_path / "1.zip").read_bytes()
    write_zip(tmp_path / "2.zip", ["b.png"])
    (tmp_path / "both.zip").write_bytes(first + (tmp_path / "2.zip").read_bytes())
    with open_source(str(tmp_path / "both.zip")) as source:
        item, skipped = source.listing()
    assert item.id == "b.png"  # type: ignore[union-attr]
    reason = f"{len(first)} bytes before its first member, as of another zip file, are not read"
    assert skipped == Skipped("both.zip", reason)


def test_label_files_with_dots_in_their_names(tmp_path: Path, bundle: Bundle) -> None:
    members = [
        *[("p.2023.01.png", png(1)), ("p.2023.01.cls", b"green"), ("p.2023.02.png", png(2))],
        *[("p.2023.02.json", b'["red thing"]'), ("p.3.json", b"[]"), ("r.png", png(3)), ("r.png.json", b'["green"]')],
    ]
    run_label(write_members(tmp_path / "s.tar", members), tmp_path / "out", bundle)
    found = {name: labels for name, (_, labels) in labels_of(tmp_path / "out").items()}
    assert found == {"s/p.2023.01.png": ["green"], "s/p.2023.02.png": ["red thing"], "s/r.png": ["green"]}
    with Snapshot(tmp_path / "out" / SNAPSHOT) as snapshot:
        assert [*snapshot.skipped_entries()] == [Skipped("s/p.3.json", "belongs to no image")]


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("", []),
        ("a thing on a table", []),
        ("green, dgo", ["taken for a caption: it holds class names, but 'dgo' is no class"]),
    ],
)
def test_captions_are_no_labels(tmp_path: Path, bundle: Bundle, text: str, skipped: list[str]) -> None:
    members = [("a.png", png()), ("a.txt", text.encode()), ("a.json", b'{"width": 64}')]
    run_label(write_members(tmp_path / "s.tar", members), tmp_path / "out", bundle)
    assert labels_of(tmp_path / "out")["s/a.png"][0] == "scores"
    with Snapshot(tmp_path / "out" / SNAPSHOT) as snapshot:
        assert [entry.reason for entry in snapshot.skipped_entries()] == skipped
        assert snapshot.other_files == OtherFiles(2 - len(skipped))


def test_labels_that_a_label_file_replaces(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, ["a.png", "b.png"])
    write_manifest(tmp_path / "m.csv", [("a.png", "green"), ("b.png", "green")])
    (tmp_path / "l.json").write_text('{"a.png": ["red thing"], "b.png": ["green"]}')
    run_label(tmp_path / "m.csv", tmp_path / "out", bundle, labels=tmp_path / "l.json")
    assert labels_of(tmp_path / "out")["a.png"] == ("file", ["red thing"])
    replaced = f"labels of 1 image in the source are replaced by those of {tmp_path / 'l.json'}: a.png\n"
    assert replaced in capsys.readouterr().err


def test_label_files_that_are_not_named(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "images", ["a.png"])
    (folder / "labels.csv").write_text("image,labels\na.png,green\n")
    run_label(folder, tmp_path / "out", bundle)
    assert f"{folder / 'labels.csv'} is not read: name it with --labels to use it\n" in capsys.readouterr().err
    for name in ("m.json", "m.tsv", "m.xlsx"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(UsageError, match=r"got a table or labels, expected images or a manifest: save it as \.csv"):
            run_label(tmp_path / name, tmp_path / "out2", bundle)


def test_paths_of_windows_in_a_manifest(tmp_path: Path, bundle: Bundle) -> None:
    write_folder(tmp_path, ["sub/a.png", "b\\c.png"])
    write_manifest(tmp_path / "m.jsonl", [("sub\\a.png", "green"), ("b\\c.png", "green")])
    assert run_label(tmp_path / "m.jsonl", tmp_path / "out", bundle).done == 2


def test_what_is_not_used_is_listed(tmp_path: Path, bundle: Bundle) -> None:
    folder = write_folder(tmp_path / "images", ["a.png", "b.png", "deep/c.png", "a.mask.png", ".d.png"])
    labels = {"a.png": ["green"], "gone.png": [], "other/c.png": ["green"], "B.png": [], "a.mask.png": []}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    out = tmp_path / "out"
    run_label(folder, out, bundle, labels=tmp_path / "labels.json")
    lines = [json.loads(line) for line in (out / UNUSED).read_text().splitlines()]
    assert [(line["name"], line["reason"]) for line in lines] == [
        (".d.png", "hidden"),
        ("a.mask.png", "a mask by its name (.mask.png)"),
        ("B.png", "no image has this name, but b.png differs in upper or lower case only"),
        ("a.mask.png", "its image is skipped: a mask by its name (.mask.png)"),
        ("gone.png", "no image has this name"),
        ("other/c.png", "names another folder than deep/c.png"),
    ]
    write_folder(tmp_path / "clean", ["a.png"])
    run_segment(tmp_path / "clean", tmp_path / "out2", bundle)
    assert not (tmp_path / "out2" / UNUSED).exists()


def test_results_of_another_job_are_no_images(tmp_path: Path, bundle: Bundle) -> None:
    folder = write_folder(tmp_path / "images", ["a.png", "deep/b.png"])
    run_segment(Path(f"{folder}/a.png"), folder / "out", bundle)
    summary = run_segment(folder, tmp_path / "out", bundle)
    assert (summary.images, summary.skipped) == (2, 1)
    with Snapshot(tmp_path / "out" / SNAPSHOT) as snapshot:
        assert [*snapshot.skipped_entries()] == [Skipped("out", "the results of a job")]


def test_notes_are_summed(tmp_path: Path, bundle: Bundle) -> None:
    for i in range(2):
        Image.fromarray(np.full((64, 64), 9000 + i, np.uint16)).save(tmp_path / f"{i}.png")
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    summary = run_segment(tmp_path, tmp_path.with_name("notes-out"), bundle)
    assert summary.notes == {"16-bit grey scaled to 8 bits": 2}


def test_a_list_is_read_with_blanks_around_its_names(tmp_path: Path, bundle: Bundle) -> None:
    write_folder(tmp_path, ["a.png", "b.png", " c .png"])
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbfa.png \r\n   \r\n\tb.png\r\n c .png\r\n")
    run_segment(tmp_path / "l.txt", tmp_path / "out", bundle)
    assert [row["image"] for row in records(tmp_path / "out")] == ["a.png", "b.png", " c .png"]


@pytest.mark.parametrize(
    "text", ['{"label": "green"}', '{" Labels": ["green"]}', '["green"]', '{"classes": ["Green"]}', '"green"']
)
def test_spellings_of_labels_beside_an_image(tmp_path: Path, bundle: Bundle, text: str) -> None:
    write_members(tmp_path / "s.tar", [("a.png", png()), ("a.json", text.encode())])
    run_label(tmp_path / "s.tar", tmp_path / "out", bundle)
    assert labels_of(tmp_path / "out") == {"s/a.png": ("file", ["green"])}


def zip_with_names(path: Path, raw: bytes, extra: bytes = b"") -> Path:
    """A zip with one image whose name has these bytes and no flag for UTF-8."""
    info = zipfile.ZipInfo("N" * len(raw))
    info.extra = extra
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, png())
    path.write_bytes(path.read_bytes().replace(b"N" * len(raw), raw))
    return path


def test_names_in_zips(tmp_path: Path) -> None:
    def name_of(path: Path) -> str:
        with open_source(str(path)) as source:
            return next(entry.id for entry in source.listing() if isinstance(entry, SourceItem))

    name = "K\u00e4tzchen \u732b.png"
    assert name_of(write_zip(tmp_path / "flag.zip", [name])) == name
    assert name_of(zip_with_names(tmp_path / "bytes.zip", name.encode())) == name
    old = "\u00e4\u00f6.png".encode("cp437")
    assert name_of(zip_with_names(tmp_path / "old.zip", old)) == "\u00e4\u00f6.png"
    text = name.encode()
    for crc, expected in ((zipfile.crc32(old), name), (1, "\u00e4\u00f6.png")):  # the field is about another name
        field = b"\x75\x70" + (5 + len(text)).to_bytes(2, "little") + b"\x01" + crc.to_bytes(4, "little") + text
        assert name_of(zip_with_names(tmp_path / "field.zip", old, field)) == expected


def test_several_images_by_name(tmp_path: Path, bundle: Bundle) -> None:
    write_folder(tmp_path / "images", ["a.png", "deep/b.png", "c.txt"])
    names = [str(tmp_path / "images" / name) for name in ("deep/b.png", "a.png")]
    both = Path("\0".join(names))
    assert run_segment(both, tmp_path / "out", bundle).done == 2
    assert {path.name for path in (tmp_path / "out/masks").rglob("*.png")} == {"a.png", "b.png"}
    assert [row["image"] for row in records(tmp_path / "out")] == ["deep/b.png", "a.png"]
    quoted = f"{tmp_path}/images/**/*.png"
    run_segment(Path(quoted), tmp_path / "out2", bundle)
    for name in ("a.png", "deep/b.png"):
        assert (tmp_path / "out/masks" / name).read_bytes() == (tmp_path / "out2/masks" / name).read_bytes()
    for other, what in (("c.txt", "no image file"), ("deep", "no image file")):
        with pytest.raises(UsageError, match=rf"{other}: is one of 3 arguments and {what}, expected images only"):
            run_segment(Path("\0".join([*names, str(tmp_path / "images" / other)])), tmp_path / "out3", bundle)
    with pytest.raises(UsageError, match="results would lie beside the image"):
        run_segment(both, tmp_path / "images", bundle)
    (tmp_path / "images" / "two\nlines.png").write_bytes(png())
    named = [str(tmp_path / "images" / name) for name in ("two\nlines.png", "a.png", "deep/b.mask.png")]
    (tmp_path / "images/deep/b.mask.png").write_bytes(png())
    assert run_segment(Path("\0".join(named)), tmp_path / "out5", bundle).images == 2
    urls = ["https://127.0.0.1:9/x.jpg?a=b", "https://127.0.0.1:9/y.jpg"]
    with open_source("\0".join(urls)) as source:
        found = [entry for entry in source.listing() if isinstance(entry, SourceItem)]
    assert [item.uri for item in found] == urls
    missing = Path("\0".join([*names, str(tmp_path / "gone.png")]))
    run_segment(missing, tmp_path / "out4", bundle)
    assert reasons(tmp_path / "out4") == {"gone.png": "No such file or directory"}
