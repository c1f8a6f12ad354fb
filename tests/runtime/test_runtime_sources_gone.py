"""Sources that are gone, as opposed to one image of them: disks, archives, links, servers' files."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from multisa.runtime.errors import ImageError
from multisa.runtime.sources import storage
from multisa.runtime.sources.base import Source, SourceItem
from multisa.runtime.sources.registry import open_source
from multisa.runtime.sources.remote import RemoteStore
from multisa.runtime.sources.storage import LocalStore


def listed(source: Source) -> dict[str, SourceItem]:
    return {entry.id: entry for entry in source.listing() if isinstance(entry, SourceItem)}


def is_gone(source: Source, item: SourceItem) -> bool:
    """As the pipeline asks."""
    with pytest.raises(ImageError):
        source.read(item)
    return not source.exists(item)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with two images in a folder, a tar file and a zip file of them."""
    disk = tmp_path / "disk"
    for name in ("a.jpg", "in/b.jpg"):
        path = disk / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    with tarfile.open(disk / "photos.tar", "w") as tar, zipfile.ZipFile(disk / "photos.zip", "w") as archive:
        for name in ("a.jpg", "in/b.jpg"):
            tar.add(disk / "photos" / name, name)
            archive.write(disk / "photos" / name, name)
    (disk / "photos/list.txt").write_text("a.jpg\nin/b.jpg\nnever.jpg\n")
    (tmp_path / "list.txt").write_text(f"{disk}/photos/a.jpg\nlink/in/b.jpg\nnever/c.jpg\n")
    (tmp_path / "link").symlink_to(disk / "photos")
    return disk


SPECS = (
    *("disk/photos", "disk/photos/**/*.jpg", "disk/photos/a.jpg", "disk/photos.tar", "disk/*.tar"),
    *("disk/photos.zip", "disk/photos/list.txt", "list.txt"),
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_disk_that_is_unplugged(tmp_path: Path, disk: Path, spec: str, leaves: str) -> None:
    with open_source(str(tmp_path / spec)) as source:
        found = [item for item in listed(source).values() if item.size >= 0]
        assert found and all(source.exists(item) for item in found)
        disk.rename(tmp_path / "elsewhere")
        if leaves != "nothing":
            disk.mkdir()
        gone = [is_gone(source, item) for item in found]
        if (spec, leaves) == ("list.txt", "nothing"):
            # Only the link tells a folder that was removed from a disk that was unplugged.
            assert gone == [False, True]
            return
        assert all(gone)


def test_one_image_that_is_gone(tmp_path: Path, disk: Path) -> None:
    sources = [open_source(str(tmp_path / spec)) for spec in SPECS if spec not in ("disk/photos/a.jpg",)]
    items = [listed(source) for source in sources]
    shutil.rmtree(disk / "photos/in")
    for source, found in zip(sources, items, strict=True):
        for item in found.values():
            assert source.exists(item)  # one that never was is an error of the list
    with tarfile.open(disk / "photos.tar", "w"):
        pass  # another one in its place
    tar = sources[SPECS.index("disk/photos.tar") - 1]
    assert not is_gone(tar, items[SPECS.index("disk/photos.tar") - 1]["photos/a.jpg"])


@pytest.mark.parametrize("folder", ["/mnt", "/media", "/media/me", "/run/media/me", "/Volumes", "/"])
def test_disks_that_mount_themselves(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def holds_any(asked: str) -> bool:
        if asked != folder:
            raise FileNotFoundError
        return True

    monkeypatch.setattr(storage, "_holds_any", holds_any)
    assert not LocalStore().is_reachable(os.path.join(folder, "disk/photos/a.jpg"))  # noqa: PTH118
    assert LocalStore().is_reachable(os.path.join(folder, "a.jpg"))  # noqa: PTH118


def test_looking_whether_a_folder_is_there_looks_at_one_name(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Names:
        asked = 0

        def __init__(self, _: object) -> None: ...
        def __enter__(self) -> Iterator[str]:
            return self._names()

        def __exit__(self, *_: object) -> None: ...
        def _names(self) -> Iterator[str]:
            while True:
                Names.asked += 1
                assert Names.asked < 10, "all of a million names are looked at"
                yield "a.jpg"

    with open_source(str(disk / "photos")) as source:
        (item, *_) = listed(source).values()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", Names)
            there = source.exists(item)
        assert there and Names.asked == 1


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.pipe({f"/multisa-gone/{name}": b"x" for name in ("a.jpg", "in/b.jpg")})
    yield files
    if files.exists("/multisa-gone"):
        files.rm("/multisa-gone", recursive=True)


def test_a_server_is_asked_for_one_name_and_not_again_for_a_while(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("memory://multisa-gone")
    item = listed(source)["a.jpg"]
    asked = []
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: asked.append(path) or info(self, path))
    monkeypatch.setattr(type(memory), "ls", lambda *_, **__: pytest.fail("all names are asked for"))
    assert all(source.exists(item) for _ in range(50)) and len(asked) == 1


def test_a_server_that_is_gone(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("memory://multisa-gone/a.jpg\nmemory://multisa-gone/never.jpg\n")
    monkeypatch.setattr("multisa.runtime.sources.remote._REMEMBERED", 0.0)
    folder, one = open_source("memory://multisa-gone"), open_source("memory://multisa-gone/a.jpg")
    many = open_source(str(tmp_path / "list.txt"))
    never = listed(many)["multisa-gone/never.jpg"]
    for source in (folder, one, many):
        (item, *_) = listed(source).values()
        assert source.read(item) == b"x" and source.exists(item)
    assert many.exists(never)
    memory.rm("/multisa-gone", recursive=True)
    assert not folder.exists(item) and not one.exists(item)
    assert not many.exists(never)  # what was read before cannot be read any more


def test_hosts_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of web servers some are always down, of buckets none should refuse."""
    up: set[str] = set()

    def info(path: str) -> dict[str, Any]:
        if path.partition("://")[2].partition("/")[0] not in up:
            raise PermissionError(path)
        return {}

    for protocol, unknown in (("http", True), ("memory", False)):
        store = RemoteStore(protocol, {})
        monkeypatch.setattr(store._files, "info", info, raising=False)
        monkeypatch.setattr("multisa.runtime.sources.remote._REMEMBERED", 0.0)
        up.clear()
        assert store.is_reachable(f"{protocol}://one/a.jpg") is unknown
        for host in ("one", "two", "three", "four"):
            store._note(f"{protocol}://{host}/a.jpg")
        up.add("three")
        assert store.is_reachable(f"{protocol}://one/b.jpg")
        up.clear()
        up.add("one")  # the last few are asked
        assert not store.is_reachable(f"{protocol}://one/b.jpg")
