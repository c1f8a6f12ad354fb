"""Every kind of source on this machine: what is listed, in which order, under which id, with which labels."""

import io
import itertools
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.base import Listed, OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.registry import open_source
from multisa.runtime.sources.storage import SeenHashes, safe_id, unique_id, unsafe_path

PHOTOS = {name: f"bytes of {name}".encode() for name in ("a.jpg", "a/b.jpg", "a/c/d.PNG", "b.webp", "z.jpeg")}
CLASSES = ("cat", "dog", "dining table")


def listed(spec: object, **options: Any) -> list[Listed]:
    with open_source(str(spec), **options) as source:
        return list(source.listing())


def items(spec: object, **options: Any) -> list[SourceItem]:
    return [entry for entry in listed(spec, **options) if isinstance(entry, SourceItem)]


def ids(spec: object, **options: Any) -> list[str]:
    return [item.id for item in items(spec, **options)]


def skipped(spec: object) -> dict[str, str]:
    return {entry.id: entry.reason for entry in listed(spec) if isinstance(entry, Skipped)}


def contents(spec: object, **options: Any) -> dict[str, bytes]:
    """Read by another source than the one that listed, as another machine would."""
    with open_source(str(spec), **options) as source:
        return {item.id: source.read(item) for item in items(spec, **options)}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", PHOTOS | {"notes.txt": b"", "a/more.xml": b""})


def test_a_folder(folder: Path) -> None:
    found = listed(folder)
    assert [entry.id for entry in found if isinstance(entry, SourceItem)] == [
        *("a/b.jpg", "a/c/d.PNG", "a.jpg", "b.webp", "z.jpeg")  # "a" before "a.jpg"
    ]
    assert found[-1] == OtherFiles(2)
    assert contents(folder) == contents(f"{folder}/") == contents(f"file://{folder}") == PHOTOS
    for item in items(folder):
        status = (folder / item.id).stat()
        assert (item.size, item.version) == (status.st_size, str(status.st_mtime_ns))


def test_what_is_passed_over_in_a_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", {"a.jpg": b"a", ".b.jpg": b"", ".git/c.jpg": b"", "in/d.jpg": b"d"})
    (tmp_path / "out.jpg").write_bytes(b"")
    (folder / "link.jpg").symlink_to("a.jpg")
    (folder / "away.jpg").symlink_to(tmp_path / "out.jpg")
    (folder / "broken.jpg").symlink_to("nothing")
    (folder / "folder").symlink_to("in")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).write_bytes(b"")
    assert ids(folder) == ["a.jpg", "in/d.jpg", "link.jpg"]
    assert skipped(folder) == {
        ".b.jpg": "hidden",
        ".git": "hidden",
        "away.jpg": "symbolic link that leaves the folder",
        "broken.jpg": "broken symbolic link",
        "folder": "symbolic link to a folder",
        "loop": "symbolic link to a folder",
        "pipe.jpg": "not a regular file",
        "\\udcff.jpg": "its name is not UTF-8",
    }
    assert contents(folder)["link.jpg"] == b"a"


def test_what_has_changed_since_the_listing_is_not_read(folder: Path, tmp_path: Path) -> None:
    found = {item.id: item for item in items(folder)}
    source = open_source(str(folder))
    (folder / "a.jpg").write_bytes(b"another size")
    with pytest.raises(ImageError, match=r"got 12 bytes, expected the 14 .*changed since it was listed"):
        source.read(found["a.jpg"])
    os.utime(folder / "b.webp", ns=(1, 1))
    with pytest.raises(ImageError, match="changed since it was listed"):
        source.read(found["b.webp"])
    (folder / "z.jpeg").unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.read(found["z.jpeg"])
    (tmp_path / "secret.jpg").write_bytes(b"")
    (folder / "a/b.jpg").unlink()
    (folder / "a/b.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ImageError, match="leaves the folder"):
        source.read(found["a/b.jpg"])
    (folder / "a/c/d.PNG").unlink()
    os.mkfifo(folder / "a/c/d.PNG")
    with pytest.raises(ImageError, match="not a regular file"):  # and does not wait for a writer
        source.read(found["a/c/d.PNG"])
    for place in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(ImageError, match="not a path below the folder"):
            source.read(SourceItem("x.jpg", place, -1))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a/b.jpg", "a.jpg"]),
        ("**", ["a/b.jpg", "a/c/d.PNG", "a.jpg", "b.webp", "z.jpeg"]),
        ("a/**/*.*", ["a/b.jpg", "a/c/d.PNG"]),
        ("[ab].*", ["a.jpg", "b.webp"]),
        ("[!a].*", ["b.webp", "z.jpeg"]),
        ("?/?/?.???", ["a/c/d.PNG"]),
        ("*/*/*", ["a/c/d.PNG"]),
        ("**/c/*", ["a/c/d.PNG"]),
        ("*.gif", []),
    ],
)
def test_a_pattern(folder: Path, pattern: str, expected: list[str]) -> None:
    # Ids are paths below what has no wildcard.
    prefix = len("a/") if pattern.startswith("a/") else 0
    assert ids(f"{folder}/{pattern}") == [name[prefix:] for name in expected]
    assert contents(f"{folder}/{pattern}") == {n[prefix:]: PHOTOS[n] for n in expected}


def test_one_image(folder: Path) -> None:
    assert contents(folder / "a/b.jpg") == {"b.jpg": PHOTOS["a/b.jpg"]}
    (folder / "[1].jpg").write_bytes(b"x")
    assert contents(folder / "[1].jpg") == {"[1].jpg": b"x"}  # what is there is no pattern


def test_a_list_of_files(folder: Path, tmp_path: Path) -> None:
    fill(tmp_path, {"elsewhere/a.jpg": b"else", "photos/elsewhere/a.jpg": b"inside"})
    away = tmp_path / "elsewhere/a.jpg"
    (folder / "list.txt").write_text(f"z.jpeg\n\na/b.jpg\r\n../elsewhere/a.jpg\nelsewhere/a.jpg\n{folder}/a.jpg\n")
    found = items(folder / "list.txt")
    names = [item.id for item in found]
    assert names[:3] == ["z.jpeg", "a/b.jpg", "elsewhere/a.jpg"]
    assert names[3].startswith("elsewhere/a~") and names[4] == "a.jpg"
    data = list(contents(folder / "list.txt").values())
    assert data == [PHOTOS["z.jpeg"], PHOTOS["a/b.jpg"], b"else", b"inside", PHOTOS["a.jpg"]]
    (folder / "list.txt").write_text(f"{away}\nabsent.jpg\n")
    first, second = items(folder / "list.txt")
    assert first.id == str(away)[1:] and second.size == -1
    with pytest.raises(ImageError, match="No such file"):
        open_source(str(folder / "list.txt")).read(second)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.jpg\nb.jpg\na.jpg\n", "line 3: a.jpg is a duplicate"),
        ("a.jpg\n./a.jpg\n", "line 2: ./a.jpg is a duplicate"),
        ("a.jpg\nx/../a.jpg\n", "line 2"),
        ("a\0.jpg\n", "line 1: .* expected UTF-8 without NUL"),
        ("file:///etc/passwd\n", "line 1: .* expected a path or the URL"),
        ("simplecache::s3://b/k.jpg", "line 1: .* expected a path or the URL"),
        ("a" * (2**20 + 1), "line 1: longer than"),
        ("a.jpg\n\udcff.jpg\n", "line 2: is not UTF-8"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "list.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=match):
        listed(tmp_path / "list.txt")


ROWS: list[tuple[str, object]] = [("a.jpg", ["dog", "cat"]), ("a/b.jpg", "dining table"), ("z.jpeg", [])]


def manifest(path: Path, kind: str) -> Path:
    if kind == "parquet":
        rows = [{"image": image, "labels": [v] if isinstance(v, str) else v} for image, v in ROWS]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"image": i, "labels": v, "more": 1}) + "\n" for i, v in ROWS))
    else:
        cells = [f"{i},{v if isinstance(v, str) else ' '.join(v)},1" for i, v in ROWS]  # type: ignore[arg-type]
        path.write_text("image,labels,more\n" + "\n".join(cells) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests(folder: Path, kind: str) -> None:
    path = manifest(folder / f"photos.{kind}", kind)
    found = items(path, classes=CLASSES)
    assert [(item.id, item.labels) for item in found] == [
        *(("a.jpg", ("dog", "cat")), ("a/b.jpg", ("dining table",)), ("z.jpeg", ()))
    ]
    assert contents(path) == {name: PHOTOS[name] for name, _ in ROWS}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("m.csv", "picture,labels\na,b\n", "line 1: got the columns 'picture,labels', expected 'image'"),
        ("m.csv", "image,image\na,b\n", "got the columns image and image, expected one column of image"),
        ("m.csv", "image,labels\na.jpg\n", "line 2: got 1 columns, expected 2"),
        ("m.csv", 'image,labels\n"a.jpg,cat\n', "not CSV"),
        ("m.csv", "image\na.jpg\n\na.jpg\n", "line 4: a.jpg is a duplicate"),
        ("m.csv", "", "line 1"),
        ("m.jsonl", "{", "line 1: is not JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: is not JSON, or nested too deeply"),
        ("m.jsonl", "[1]", "line 1: got no JSON object"),
        ("m.jsonl", '{"image": 1}', "line 1: got '1' as 'image'"),
        ("m.jsonl", '{"image": "\\ud800.jpg"}', "expected UTF-8"),
        ("m.jsonl", '{"image": "a.jpg", "labels": [1]}', r"line 1, 'labels': got '\[1\]', expected a list"),
        ("m.parquet", "PAR1 and what is no table PAR1", "not a readable Parquet file"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=match):
        listed(tmp_path / name)


def test_tar_shards_with_labels_beside_the_images(tmp_path: Path) -> None:
    make_tar(
        tmp_path / "000.tar",
        [
            ("x/1.cls", b"dog\n"),
            ("x/1.jpg", b"one"),
            ("x/2.jpg", b"two"),
            ("x/2.json", b'{"labels": ["cat", "dining table"], "other": 1}'),
            ("x/3.jpg", b"three"),
            ("x/3.txt", b"cat dog"),
            ("x/4.jpg", b"four"),
            ("x/4.txt", b"a cat on a table"),
            ("x/5.jpg", b"five"),
            ("x/5.json", b"{"),
            ("x/6.jpg", b"six"),
            ("readme", b""),
        ],
    )
    make_tar(tmp_path / "001.tar", [("./x/1.jpg", b"uno"), ("x/long" * 40 + ".jpg", b"L")], tarfile.GNU_FORMAT)
    spec = tmp_path / "{000..001}.tar"
    found = items(spec, classes=CLASSES)
    assert [(item.id, item.labels) for item in found[:7]] == [
        ("000/x/1.jpg", ("dog",)),
        ("000/x/2.jpg", ("cat", "dining table")),
        ("000/x/3.jpg", ("cat", "dog")),
        ("000/x/4.jpg", None),
        ("000/x/5.jpg", None),
        ("000/x/6.jpg", None),
        ("001/x/1.jpg", None),
    ]
    assert skipped(spec) == {"000/x/5.json": "is not JSON, or nested too deeply"}
    assert listed(spec)[-1] == OtherFiles(1)
    assert [*contents(spec).values()] == [b"one", b"two", b"three", b"four", b"five", b"six", b"uno", b"L"]
    assert contents(tmp_path / "*.tar") == contents(spec)
    assert ids(tmp_path / "001.tar")[0] == "001/x/1.jpg"
    with tarfile.open(tmp_path / "000.tar") as tar:
        assert found[0].uri == f"000.tar#{tar.getmember('x/1.jpg').offset_data}"
    with open_source(str(spec)) as source:
        os.utime(tmp_path / "000.tar", ns=(1, 1))
        with pytest.raises(ImageError, match="changed since"):
            source.read(found[0])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path: Path, form: int) -> None:
    names = ["é.jpg", "d/" * 60 + "n" * 90 + ".jpg", "s.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names.append("é" * 100 + "/" + "n" * 200 + ".jpg")
    path = make_tar(tmp_path / "t.tar", [(name, name.encode()) for name in names], form)
    assert contents(path) == {f"t/{name}": name.encode() for name in names}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip(tmp_path: Path, method: int) -> None:
    files = PHOTOS | {"é/ü.jpg": b"e" * 5000}
    with zipfile.ZipFile(tmp_path / "p.zip", "w", method) as archive:
        archive.mkdir("a")
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=name.startswith("z")) as file:
                file.write(data)
        archive.writestr("notes.txt", "")
        archive.comment = b"a comment"
    assert contents(tmp_path / "p.zip") == files
    assert ids(tmp_path / "p.zip") == list(files)
    assert listed(tmp_path / "p.zip")[-1] == OtherFiles(1)
    whole = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "q.zip").write_bytes(b"#!/bin/sh\n" + whole)  # as self-extracting ones are
    assert contents(tmp_path / "q.zip") == files


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("absent.jpg", None, "does not exist, expected a folder"),
        ("absent", None, "does not exist"),
        ("t.tar.gz", b"\x1f\x8b", "decompress it first"),
        ("t.tgz", b"\x1f\x8b", "decompress it first"),
        ("t.tar", b"\x1f\x8b" + bytes(600), "compressed by gzip.*decompress it first"),
        ("{00..0a}.tar", None, "does not exist"),
        ("{3..2}.tar", None, "the smaller number first"),
        ("{0..99999999999}.tar", None, "expected 1 to 1000000"),
        ("{0..1}{0..1}.tar", None, "several ranges"),
        ("{0..1}.tar", None, "0.tar: cannot be read"),
        ("{0..1}.zip", None, "a range counts tar files"),
        ("*.tar", None, "no file of this name"),
        ("*.zip", None, "several files"),
        (".hidden.jpg", b"", "hidden"),
    ],
)
def test_what_is_no_source(tmp_path: Path, name: str, data: bytes | None, match: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=match):
        listed(tmp_path / name)


@pytest.mark.parametrize("options", ["[1]", "{", '"key"'])
def test_storage_options_that_are_no_object_are_not_shown(options: str) -> None:
    with pytest.raises(UsageError, match="storage options: got no JSON object") as raised:
        open_source("s3://bucket", storage_options=options)
    assert options not in str(raised.value).replace('{"endpoint_url": "..."}', "")


def test_many_threads_read_one_source(tmp_path: Path) -> None:
    files = [(f"{i:04}.jpg", f"{i}".encode() * (1 + i % 50)) for i in range(400)]
    path = make_tar(tmp_path / "t.tar", files)
    with open_source(str(path)) as source, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, items(path))) == [data for _, data in files]


@given(st.lists(st.text(max_size=300) | st.from_regex(r"[a./\\:~]{0,12}", fullmatch=True), max_size=30))
def test_made_ids_are_safe_and_unique(paths: list[str]) -> None:
    seen = SeenHashes()
    for place in dict.fromkeys(paths):
        wanted = made = safe_id(place)
        attempts = itertools.count()
        while not seen.add(made):
            made = unique_id(wanted, place, next(attempts))
        assert not unsafe_path(made)
        assert made == safe_id(made)
        assert wanted == place or unsafe_path(place) or not place


def test_seen_is_a_set() -> None:
    seen = SeenHashes()
    names = [f"{i}.jpg" for i in range(5000)]
    assert all(seen.add(name) for name in names)
    assert not any(seen.add(name) for name in names)
