"""Finding all images of a folder at once, and naming their results."""

from pathlib import Path

import pytest

from multisa.runtime.errors import UsageError
from multisa.runtime.sources.base import Skipped
from multisa.runtime.sources.folders import list_images


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
    found = list_images(tmp_path)
    assert [image.relative for image in found.images] == sorted(f for f in files if not f.endswith("txt"))
    assert [image.name for image in found.images] == names
    assert all(image.path.is_file() for image in found.images)
    assert found.skipped == () and list(found.others) == [f for f in files if f.endswith("txt")]


def test_entries_that_are_not_read(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    touch(corpus, "a.jpg", ".hidden.jpg", ".git/b.jpg", "real/c.jpg", "real/.DS_Store", "real/notes.txt", "b.tar")
    touch(tmp_path, "outside/d.jpg")
    (corpus / "inside.jpg").symlink_to(corpus / "a.jpg")
    (corpus / "leaves.jpg").symlink_to(tmp_path / "outside/d.jpg")
    found = list_images(corpus)
    assert [image.relative for image in found.images] == ["a.jpg", "inside.jpg", "real/c.jpg"]
    assert found.skipped == (
        Skipped(".git", "hidden"),
        Skipped(".hidden.jpg", "hidden"),
        Skipped("leaves.jpg", "symbolic link that leaves the folder"),
        Skipped("real/.DS_Store", "hidden"),
    )
    assert found.others == ("b.tar", "real/notes.txt")


def test_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt")
    for path in (tmp_path / "absent", tmp_path / "a.txt"):
        with pytest.raises(UsageError, match="is not a folder, expected a folder"):
            list_images(path)
    with pytest.raises(UsageError, match="no image found"):
        list_images(tmp_path)
