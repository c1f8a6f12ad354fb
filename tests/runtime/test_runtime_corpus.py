"""Finding images and naming them."""

import os
import sys
from pathlib import Path

import pytest

from multisa.runtime.corpus import find_images
from multisa.runtime.errors import UsageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["b.jpg", "a.JPG", "notes.txt"], ["a", "b"]),
        (["x/a.jpg", "a.jpg", "x.y/a.tif"], ["a", "x.y/a", "x/a"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        (["a.jpg", "A.png"], ["A.png", "a.jpg"]),  # one file on some file systems
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["a.v1.jpg", "a.v2.jpg"], ["a.v1", "a.v2"]),
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),  # a mask would be named as a folder
        (["a.jpg", "A.PNG/x/b.jpg"], ["A.PNG/x/b", "a.jpg"]),
        (["a.jpg", "a.overlay.jpg/b.jpg", "c.jfif"], ["a", "a.overlay.jpg/b", "c"]),
    ],
)
def test_names(tmp_path: Path, files: list[str], names: list[str]) -> None:
    touch(tmp_path, *files)
    corpus = find_images(tmp_path)
    assert [image.relative for image in corpus.images] == sorted(f for f in files if not f.endswith("txt"))
    assert [image.name for image in corpus.images] == names
    assert all(image.path.is_file() for image in corpus.images)
    assert corpus.skipped == ()
    assert corpus.other_files == sum(file.endswith("txt") for file in files)


def test_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (image,) = find_images(tmp_path / "a.jpg").images
    assert (image.relative, image.name) == ("a.jpg", "a")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names or files")
def test_one_file_that_cannot_be_taken(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden.jpg")
    with pytest.raises(UsageError, match="hidden, expected a folder of images or one image"):
        find_images(tmp_path / ".hidden.jpg")
    no_text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))
    no_text.touch()
    with pytest.raises(UsageError, match=r"\\udcff\.jpg: its name is not UTF-8"):
        find_images(no_text)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UsageError, match="not a regular file"):
        find_images(tmp_path / "pipe.jpg")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such files")
def test_a_pipe_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert find_images(tmp_path).skipped == ("pipe.jpg: not a regular file",)


def test_passed_over(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    touch(corpus, "a.jpg", ".hidden.jpg", ".git/b.jpg", "real/c.jpg")
    touch(tmp_path, "outside/d.jpg")
    (corpus / "inside.jpg").symlink_to(corpus / "a.jpg")
    (corpus / "leaves.jpg").symlink_to(tmp_path / "outside/d.jpg")
    (corpus / "folder").symlink_to(corpus / "real")
    (corpus / "broken.jpg").symlink_to(corpus / "nowhere.jpg")
    found = find_images(corpus)
    assert [image.relative for image in found.images] == ["a.jpg", "inside.jpg", "real/c.jpg"]
    assert found.skipped == (
        ".git: hidden",
        ".hidden.jpg: hidden",
        "broken.jpg: broken symbolic link",
        "folder: symbolic link to a folder",
        "leaves.jpg: symbolic link that leaves the folder",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse file names that are not UTF-8")
def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    found = find_images(tmp_path)
    assert len(found.images) == 1
    assert found.skipped == (r"\udcff.jpg: its name is not UTF-8",)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_images(tmp_path / "absent")
    touch(tmp_path, "a.txt")
    with pytest.raises(UsageError, match="no image found"):
        find_images(tmp_path)
