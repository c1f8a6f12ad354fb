"""Hostile archives: each attack is a row, and ends in a skipped member with a reason or one clear error."""

import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.sources.base import Skipped, SourceItem
from multisa.runtime.sources.registry import open_source
from multisa.runtime.sources.storage import unsafe_path

GOOD = b"good bytes " * 60

UNSAFE = {
    "/etc/a.jpg": "absolute path",
    "../a.jpg": "path that leaves its folder (..)",
    "x/../../a.jpg": "path that leaves its folder (..)",
    "x\\..\\a.jpg": "backslash in its name",
    "C:/a.jpg": "absolute path",
    "x//a.jpg": "empty name in its path",
    "x/./a.jpg": "empty name in its path",
    "x/.hidden/a.jpg": "hidden",
    "._a.jpg": "hidden",
    "new\nline.jpg": "control character in its name",
    "a /.jpg/é.jpg": "hidden",
    "a\x7f.jpg": "control character in its name",
    "n" * 300 + ".jpg": "its name is too long",
    "d/" * 1500 + "a.jpg": "its name is too long",
}


def look(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """What can be read, and what is skipped, by id."""
    with open_source(str(path)) as source:
        entries = list(source.listing())
        data = {entry.id: source.read(entry) for entry in entries if isinstance(entry, SourceItem)}
    return data, {entry.id: entry.reason for entry in entries if isinstance(entry, Skipped)}


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(
    name: str, data: bytes = GOOD, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def with_field(header: bytes, start: int, value: bytes) -> bytes:
    """A tar header with a field replaced and its checksum right again."""
    header = header[:start] + value + header[start + len(value) :]
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


@pytest.mark.parametrize(("name", "reason"), UNSAFE.items())
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unsafe_names_in_a_tar(tmp_path: Path, name: str, reason: str, form: int) -> None:
    (tmp_path / "t.tar").write_bytes(tar_of(member(name), member("good.jpg"), form=form))
    assert look(tmp_path / "t.tar") == ({"t/good.jpg": GOOD}, {f"t/{name}": reason})


@pytest.mark.parametrize(("name", "reason"), UNSAFE.items())
def test_unsafe_names_in_a_zip(tmp_path: Path, name: str, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(name, GOOD)
        archive.writestr("good.jpg", GOOD)
    assert look(tmp_path / "z.zip") == ({"good.jpg": GOOD}, {name: reason})


def _sparse() -> bytes:
    data = tar_of(member("bad.jpg", b""))[:512]
    # More of its holes in a block behind the header, then its data.
    header = with_field(with_field(with_field(data, 156, b"S"), 482, b"\1"), 124, b"%011o" % 512)
    return header + bytes(512) + bytes(512)


TARS: dict[str, tuple[bytes, str]] = {
    "symbolic link": (tar_of(member("bad.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"))[:512], "symbolic link"),
    "hard link": (tar_of(member("bad.jpg", b"", tarfile.LNKTYPE, "good.jpg"))[:512], "a link to another member"),
    "device": (tar_of(member("bad.jpg", b"", tarfile.CHRTYPE))[:512], "not a regular file"),
    "pipe": (tar_of(member("bad.jpg", b"", tarfile.FIFOTYPE))[:512], "not a regular file"),
    "device with a size": (
        with_field(tar_of(member("bad.jpg", b"", tarfile.CHRTYPE))[:512], 124, b"%011o" % 10**9),
        "not a regular file",
    ),
    "sparse": (_sparse(), "stored with holes (sparse), expected a plain file"),
    "not UTF-8": (with_field(tar_of(member("\udcffbad.jpg", b""))[:512], 0, b"\xffbad.jpg"), "its name is not UTF-8"),
}


@pytest.mark.parametrize(("bad", "reason"), TARS.values(), ids=TARS)
def test_members_of_a_tar_that_are_no_files(tmp_path: Path, bad: bytes, reason: str) -> None:
    (tmp_path / "t.tar").write_bytes(bad + tar_of(member("good.jpg")))
    data, skipped = look(tmp_path / "t.tar")
    assert data == {"t/good.jpg": GOOD}
    assert list(skipped.values()) == [reason]


def test_sparse_by_pax(tmp_path: Path) -> None:
    info, data = member("bad.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    (tmp_path / "t.tar").write_bytes(tar_of((info, data), member("good.jpg"), form=tarfile.PAX_FORMAT))
    data_read, skipped = look(tmp_path / "t.tar")
    assert data_read == {"t/good.jpg": GOOD}
    assert "sparse" in skipped["t/bad.jpg"]


def test_the_first_of_equal_names_is_used(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_of(member("a.jpg"), member("b.jpg"), member("a.jpg", b"other")))
    data, skipped = look(tmp_path / "t.tar")
    assert data == {"t/a.jpg": GOOD, "t/b.jpg": GOOD}
    assert "the first is used" in skipped["t/a.jpg"]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.jpg", GOOD)
        archive.writestr("a.jpg", b"other")
    data, skipped = look(tmp_path / "z.zip")
    assert data == {"a.jpg": GOOD} and "the first is used" in skipped["a.jpg"]


HEADER = tar_of(member("a.jpg"))[:512]
DAMAGE: dict[str, tuple[bytes, str]] = {
    "bad checksum": (b"x" + HEADER[1:], "checksum"),
    "half a header": (HEADER[:300], "the file ends in a header"),
    "no size": (with_field(HEADER, 124, b"9" * 11), "a header without a size"),
    "negative size": (with_field(HEADER, 124, b"\xff" * 11 + b"\xf0"), "a header without a size"),
    "huge long name": (with_field(with_field(HEADER, 156, b"L"), 124, b"%011o" % 2**30), "a header of 1073741824"),
    "long name cut off": (with_field(with_field(HEADER, 156, b"L"), 124, b"%011o" % 5000), "ends in a header"),
    "pax of nonsense": (with_field(HEADER, 156, b"x") + b"nonsense" * 83 + bytes(384), "malformed pax header"),
    "pax of a huge length": (
        with_field(with_field(HEADER, 156, b"x"), 124, b"%011o" % 30) + b"99999999999 path=a.jpg\n".ljust(512),
        "malformed pax header",
    ),
    "pax of a negative size": (
        with_field(with_field(HEADER, 156, b"x"), 124, b"%011o" % 11) + b"11 size=-1\n".ljust(512, b"\0"),
        "a size of",
    ),
}


@pytest.mark.parametrize(("tail", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_tar_is_read_as_far_as_it_is_whole(tmp_path: Path, tail: bytes, reason: str) -> None:
    whole = tar_of(member("good.jpg"))[: 512 + 1024]
    (tmp_path / "t.tar").write_bytes(whole + tail)
    data, skipped = look(tmp_path / "t.tar")
    assert data == {"t/good.jpg": GOOD}
    assert reason in skipped["t.tar"] and "the rest is not read" in skipped["t.tar"]
    (tmp_path / "t.tar").write_bytes(tail)
    with pytest.raises(UsageError, match="cannot be read as a tar file"):
        look(tmp_path / "t.tar")


@pytest.mark.parametrize("size", [b"%011o" % 5000, b"\x80" + b"\xff" * 11])
def test_a_member_cut_off(tmp_path: Path, size: bytes) -> None:
    whole = tar_of(member("good.jpg"))[: 512 + 1024]
    (tmp_path / "t.tar").write_bytes(whole + with_field(HEADER, 124, size) + b"x" * 100)
    data, skipped = look(tmp_path / "t.tar")
    assert data == {"t/good.jpg": GOOD}
    assert skipped["t/a.jpg"].startswith("truncated: 100 of its")


def test_an_empty_tar_and_one_that_shrinks(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"")
    assert look(tmp_path / "t.tar") == ({}, {"t.tar": "is empty"})
    (tmp_path / "t.tar").write_bytes(tar_of(member("a.jpg")))
    source = open_source(str(tmp_path / "t.tar"))
    (item,) = (entry for entry in source.listing() if isinstance(entry, SourceItem))
    (tmp_path / "t.tar").write_bytes(tar_of(member("a.jpg"))[:600])
    with pytest.raises(ImageError, match="changed"):
        source.read(item)
    with pytest.raises(ImageError, match="ends after 88 of the image's 660 bytes"):
        source.read(SourceItem(item.id, item.uri, item.size))


def test_a_thousand_long_names_in_a_row_are_no_recursion(tmp_path: Path) -> None:
    name = with_field(with_field(HEADER, 156, b"L"), 124, b"%011o" % 6) + b"b.jpg\0".ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(name * 5000 + tar_of(member("a.jpg")))
    assert look(tmp_path / "t.tar") == ({"t/b.jpg": GOOD}, {})


def zip_of(method: int = zipfile.ZIP_DEFLATED, data: bytes = GOOD) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.jpg", data)
        archive.writestr("good.jpg", GOOD)
    return buffer.getvalue()


def patched(data: bytes, offset: int, form: str, *values: int) -> bytes:
    """The first entry of the central directory with fields replaced."""
    at = data.index(b"PK\1\2") + offset
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def _second_offset(data: bytes) -> bytes:
    """The second entry begins inside the first."""
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4) + 42
    return data[:at] + struct.pack("<I", 10) + data[at + 4 :]


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (lambda: patched(zip_of(), 8, "<H", 1), "encrypted"),
    "symbolic link": (lambda: patched(zip_of(), 38, "<I", 0o120777 << 16), "symbolic link"),
    "device": (lambda: patched(zip_of(), 38, "<I", 0o020777 << 16), "not a regular file"),
    "method": (lambda: patched(zip_of(), 10, "<H", 99), "compressed by method 99"),
    "bomb": (lambda: zip_of(data=bytes(3 * 2**20)), "inflates from"),
    "too large": (lambda: patched(zip_of(), 20, "<2I", 2**31, 2**31 + 1), "lies outside the file"),
    "outside": (lambda: patched(zip_of(), 42, "<I", 2**31), "lies outside the file"),
    "zip64 without a field": (lambda: patched(zip_of(), 20, "<I", 2**32 - 1), "zip64 field is damaged"),
    "stored with two sizes": (lambda: patched(zip_of(zipfile.ZIP_STORED), 24, "<I", 10), "of two sizes"),
}


@pytest.mark.parametrize(("make", "reason"), ZIPS.values(), ids=ZIPS)
def test_members_of_a_zip_that_are_skipped(tmp_path: Path, make: Callable[[], bytes], reason: str) -> None:
    (tmp_path / "z.zip").write_bytes(make())
    data, skipped = look(tmp_path / "z.zip")
    assert data == {"good.jpg": GOOD}
    assert reason in skipped["a.jpg"]


def test_members_that_overlap_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "z.zip").write_bytes(_second_offset(zip_of()))
    data, skipped = look(tmp_path / "z.zip")
    assert data == {} and set(skipped) == {"a.jpg", "good.jpg"}
    assert set(skipped.values()) == {"overlaps another member, as in a zip bomb"}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (zip_of(zipfile.ZIP_BZIP2), "method 12"),
        (patched(zip_of(), 24, "<I", 20), "got 21 bytes, expected 20"),
        (patched(zip_of(), 24, "<I", 2000), "got 660 bytes, expected 2000"),
        (patched(zip_of(), 16, "<I", 1), "CRC is wrong"),
        (zip_of().replace(b"PK\3\4", b"PK\3\5", 1), "its header is missing"),
        (zip_of()[:35] + b"\xff" * 8 + zip_of()[43:], "cannot be inflated"),
    ],
)
def test_members_of_a_zip_that_turn_out_to_be_others(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "z.zip").write_bytes(data)
    with open_source(str(tmp_path / "z.zip")) as source:
        for entry in source.listing():
            if isinstance(entry, Skipped):
                assert match in entry.reason
            elif isinstance(entry, SourceItem) and entry.id == "a.jpg":
                with pytest.raises(ImageError, match=match):
                    source.read(entry)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a zip file"),
        (b"PK\3\4" + bytes(500), "not a zip file"),
        (zip_of()[:-40], "not a zip file"),
        (b"PK\5\6" * 20_000, "cannot be read"),
        (zip_of()[:-10] + struct.pack("<I", 2**30) + zip_of()[-6:], "central directory"),
        (zip_of().replace(b"PK\1\2", b"PK\1\1"), "central directory"),
        (zip_of()[:-18] + b"\1\0" + zip_of()[-16:], "one part of several"),
        (zip_of()[:-6] + b"\xff" * 4 + zip_of()[-2:], "not where its end record says"),
        (zip_of()[:-2] + b"\x08\0PK\5\6 end", "not a zip file"),  # which end is the archive's?
        (patched(zip_of(), 6, "<H", 99), "zip file version"),
        (patched(zip_of(), 8, "<H", 0x0800).replace(b"a.jpg", b"\xff.jpg"), "utf-8"),
    ],
)
def test_zips_that_cannot_be_read(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(UsageError, match=match):
        look(tmp_path / "z.zip")


def test_a_zip_with_a_huge_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for i in range(2000):
            archive.writestr(f"{i}.jpg", b"")
    monkeypatch.setattr("multisa.runtime.sources.storage._LARGEST_READ", 70_000)
    with pytest.raises(UsageError, match=r"got a directory of .* expected at most 70000"):
        look(tmp_path / "z.zip")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from(["t.tar", "z.zip"]))
def test_mutated_archives_never_do_more_than_say_so(tmp_path: Path, seed: int, name: str) -> None:
    dice = random.Random(seed)
    sample = (member("a.json", b'{"labels": ["x"]}'), member("n" * 150 + ".jpg"), member("b.jpg"))
    form = dice.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    data = bytearray(tar_of(*sample, form=form)[:5000] if name == "t.tar" else zip_of())
    for _ in range(dice.randint(1, 6)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    if name == "t.tar":  # else a wrong checksum is all there is to see
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar":
                data[at : at + 512] = with_field(bytes(data[at : at + 512]), 0, b"")
    (tmp_path / name).write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
    with suppress(UsageError), open_source(str(tmp_path / name)) as source:
        for entry in list(source.listing()):
            if isinstance(entry, SourceItem):
                assert not unsafe_path(entry.id)
                with suppress(ImageError):
                    assert len(source.read(entry)) == entry.size
