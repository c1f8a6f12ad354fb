"""The engine cache: what is found was built from exactly what is asked for; what profiles cover."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multisa.runtime.backends.engine_cache import (
    FLAGS,
    QUARANTINE,
    EngineCache,
    EngineKey,
    Profile,
    StoredEngine,
    this_platform,
    uncovered_shape,
)
from multisa.runtime.errors import BundleError

SMALL = Profile((1, 64, 64), (1, 320, 320), (8, 320, 320))
KEY = EngineKey(
    graph="cam",
    precision="fp32",
    onnx_sha256="ab" * 32,
    library="tensorrt-rtx",
    library_version="1.7.1.116",
    target="sm89",
    gpu="",
    profiles=(SMALL,),
    flags=FLAGS,
    platform=this_platform(),
)
# Another value for every field: a field that is added without one fails the test below.
OTHER = {
    "graph": "segmenter",
    "precision": "fp16",
    "onnx_sha256": "cd" * 32,
    "library": "tensorrt",
    "library_version": "1.7.1.117",
    "target": "sm86",
    "gpu": "NVIDIA L4",
    "profiles": (dataclasses.replace(SMALL, optimum=(1, 256, 320)),),
    "flags": (),
    "platform": "solaris-sparc",
}


class Builder:
    """A callable that gives fixed bytes and counts its calls."""

    def __init__(self, data: bytes = b"plan") -> None:
        self.data = data
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.data


def never() -> bytes:
    raise AssertionError("built though the engine is stored")


def test_an_engine_is_built_once_and_found_as_it_was(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    assert cache.get(KEY) is None
    built = cache.get_or_build(KEY, Builder(b"the plan"))
    found = EngineCache(tmp_path / "engines").get_or_build(KEY, never)
    assert found == built and found.read() == b"the plan" and found.bytes == 8
    assert found.path == tmp_path / "engines" / KEY.digest[:16] / "model.plan"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineKey)])
def test_every_field_of_the_key_gives_another_engine(tmp_path: Path, field: str) -> None:
    cache = EngineCache(tmp_path)
    cache.get_or_build(KEY, Builder())
    other = dataclasses.replace(KEY, **{field: OTHER[field]})
    assert other.digest != KEY.digest
    assert cache.get(other) is None
    assert cache.get_or_build(other, Builder(b"another")).read() == b"another"
    assert cache.get_or_build(KEY, never).read() == b"plan"


def test_find_is_by_graph_library_version_target_flags_and_platform(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    keys = [dataclasses.replace(KEY, **{name: value}) for name, value in OTHER.items()]
    for key in (KEY, *keys):
        cache.get_or_build(key, Builder(key.digest.encode()))
    asked = {name: getattr(KEY, name) for name in ("onnx_sha256", "library", "library_version", "target")}
    here = asked | {"flags": FLAGS, "platform": this_platform()}
    expected = {key.digest for key in (KEY, *keys) if all(getattr(key, n) == v for n, v in here.items())}
    found = cache.find(**asked)
    assert {stored.key.digest for stored in found} == expected and len(expected) == len(keys) - 5
    assert [stored.read().decode() for stored in found] == sorted(expected)
    assert EngineCache(tmp_path / "none").find(**asked) == []


def test_all_engines_are_listed_and_the_unusable_ones(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    assert cache.list_engines() == ([], {})
    keys = (KEY, *(dataclasses.replace(KEY, **{name: value}) for name, value in OTHER.items()))
    stored = [cache.get_or_build(key, Builder()) for key in keys]
    assert cache.list_engines() == (sorted(stored, key=lambda engine: engine.key.digest), {})
    stored[0].path.unlink()
    cache.quarantine(stored[1], "the library refuses it")
    stored[2].path.with_name("plan.json").unlink()  # a build that did not end
    engines, damaged = cache.list_engines()
    assert engines == sorted(stored[3:], key=lambda engine: engine.key.digest)
    assert damaged == {stored[0].path.parent: "model.plan: expected a file of 4 bytes"}


def flip_a_bit(stored: StoredEngine) -> None:
    data = bytearray(stored.path.read_bytes())
    data[1] ^= 4
    stored.path.write_bytes(data)


def edit(stored: StoredEngine, change: Callable[[dict], None]) -> None:
    path = stored.path.with_name("plan.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


DAMAGE: dict[str, Callable[[StoredEngine], object]] = {
    "a flipped bit": flip_a_bit,
    "cut short": lambda stored: os.truncate(stored.path, 2),
    "gone": lambda stored: stored.path.unlink(),
    "a link": lambda stored: (stored.path.rename(stored.path.with_name("x")), stored.path.symlink_to("x")),
    "record cut short": lambda stored: os.truncate(stored.path.with_name("plan.json"), 40),
    "record empty": lambda stored: os.truncate(stored.path.with_name("plan.json"), 0),
    "record too large": lambda stored: os.truncate(stored.path.with_name("plan.json"), 1 << 20),
    "record nested": lambda stored: stored.path.with_name("plan.json").write_text("[" * 60_000),
    "record no text": lambda stored: stored.path.with_name("plan.json").write_bytes(b"\xff\xfe{"),
    "record of another key": lambda stored: edit(stored, lambda r: r["key"].update(target="sm120")),
    "record with more": lambda stored: edit(stored, lambda r: r.update(path="../../elsewhere")),
    "record of another version": lambda stored: edit(stored, lambda r: r.update(schema_version=2)),
    "profile out of order": lambda stored: edit(stored, lambda r: r["key"]["profiles"][0].update(minimum=[9, 9, 9])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_repaired(
    tmp_path: Path, damage: Callable[[StoredEngine], object], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = EngineCache(tmp_path)
    stored = cache.get_or_build(KEY, Builder())
    damage(stored)
    again = Builder(b"again")
    assert cache.get_or_build(KEY, again).read() == b"again"
    assert again.calls == 1
    assert cache.get_or_build(KEY, never).read() == b"again"
    reason = (tmp_path / QUARANTINE / KEY.digest[:16] / "reason.txt").read_text().strip()
    assert reason and reason in capsys.readouterr().err


def test_get_quarantines_a_damaged_engine(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    stored = cache.get_or_build(KEY, Builder())
    flip_a_bit(stored)
    with pytest.raises(BundleError, match="damaged"):
        stored.read()
    assert cache.get(KEY) is None
    assert not stored.path.exists() and (tmp_path / QUARANTINE / stored.path.parent.name).is_dir()


def test_quarantine_moves_what_was_refused_and_nothing_newer(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    old = cache.get_or_build(KEY, Builder(b"old"))
    cache.quarantine(old, "the library refuses it")
    reason = tmp_path / QUARANTINE / KEY.digest[:16] / "reason.txt"
    assert reason.read_text() == "the library refuses it\n"
    cache.quarantine(old, "again")  # gone already
    new = cache.get_or_build(KEY, Builder(b"new"))
    cache.quarantine(old, "the library refuses it")  # the engine before this one
    assert cache.get(KEY) == new
    cache.quarantine(new, "refused, too")  # its place in the quarantine is taken by one of the same key
    assert cache.get(KEY) is None and reason.read_text() == "refused, too\n"


@pytest.mark.parametrize("name", ["model.plan", "plan.json"])
def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, or no permission: the engine stays, and nothing is built in its place."""
    cache = EngineCache(tmp_path)
    stored = cache.get_or_build(KEY, Builder())
    opened = Path.open

    def refuse(path: Path, *arguments: object, **named: object) -> object:
        if path.name == name:
            raise OSError(24, "Too many open files", str(path))
        return opened(path, *arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            cache.get(KEY)
        with pytest.raises(OSError, match="Too many open files"):
            cache.get_or_build(KEY, never)
        engines, unusable = cache.list_engines()
        assert (engines == [stored]) is (name == "model.plan") and len(unusable) == (name == "plan.json")
    assert cache.get(KEY) == stored and not (tmp_path / QUARANTINE).exists()


def test_a_builder_that_fails_stores_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no engine")

    cache = EngineCache(tmp_path)
    with pytest.raises(RuntimeError, match="no engine"):
        cache.get_or_build(KEY, fail)
    assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, Builder()).read() == b"plan"  # the lock was given back


def test_a_damaged_engine_that_cannot_be_moved_is_missing(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    stored = cache.get_or_build(KEY, Builder())
    flip_a_bit(stored)
    lock = tmp_path / f"{KEY.digest[:16]}.lock"
    lock.unlink()
    lock.mkdir()  # as where the folder may only be read: nothing can be locked or moved
    assert cache.get(KEY) is None
    assert stored.path.exists()


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (((2, 64, 64), (1, 64, 64), (1, 64, 64)), "batch 2, 1, 1"),
        (((1, 64, 64), (1, 512, 64), (1, 320, 64)), "height 64, 512, 320"),
        (((1, 64, 0), (1, 64, 64), (1, 64, 64)), "width 0, 64, 64"),
    ],
)
def test_a_profile_is_in_order(shapes: tuple[tuple[int, int, int], ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Profile(*shapes)


def test_a_profile_says_what_it_covers() -> None:
    assert SMALL.covers((1, 64, 64)) and SMALL.covers((8, 320, 100))
    assert not SMALL.covers((9, 64, 64)) and not SMALL.covers((1, 63, 64))
    assert str(SMALL) == "1x64x64:1x320x320:8x320x320"


# One process that builds: it notes when it begins, and builds until it is told to finish.
BUILD = """
import sys, time
from pathlib import Path
from multisa.runtime.backends.engine_cache import EngineCache, EngineKey, Profile
from multisa.runtime.progress import console
work, name = Path(sys.argv[1]), sys.argv[2]
key = EngineKey("cam", "fp32", "ab" * 32, "tensorrt-rtx", "1.7.1.116", "sm89", "",
              (Profile((1, 64, 64), (1, 320, 320), (8, 320, 320)),), ("TF32=0",), "linux-x86_64")
def build():
    (work / f"{name}.building").touch()
    while not (work / f"{name}.go").exists():
        time.sleep(0.01)
    return name.encode()
with console():
    print(EngineCache(work / "engines").get_or_build(key, build).read().decode())
"""


def start(work: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(work), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def test_a_second_builder_waits_and_finds_the_engine_of_the_first(tmp_path: Path) -> None:
    first = start(tmp_path, "first")
    wait_for(tmp_path / "first.building")
    second = start(tmp_path, "second")
    assert second.stderr is not None
    assert "waiting for another process that builds cam for sm89" in second.stderr.readline()
    (tmp_path / "first.go").touch()
    assert first.communicate(timeout=60)[0] == second.communicate(timeout=60)[0] == "first\n"
    assert not (tmp_path / "second.building").exists()


def test_a_builder_that_is_killed_leaves_the_next_one_free(tmp_path: Path) -> None:
    killed = start(tmp_path, "killed")
    wait_for(tmp_path / "killed.building")
    waiting = start(tmp_path, "waiting")
    assert waiting.stderr is not None and "waiting" in waiting.stderr.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    wait_for(tmp_path / "waiting.building")  # it got the lock that the system took back
    (tmp_path / "waiting.go").touch()
    assert waiting.communicate(timeout=60)[0] == "waiting\n"


def test_what_a_killed_builder_was_writing_is_removed(tmp_path: Path) -> None:
    place = tmp_path / KEY.digest[:16]
    place.mkdir(parents=True)
    (place / ".model.plan.0123456789abcdef.tmp").write_bytes(b"half of a")
    (place / "model.plan").write_bytes(b"whole, but without the record that is written last")
    cache = EngineCache(tmp_path)
    assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, Builder()).read() == b"plan"
    assert sorted(path.name for path in place.iterdir()) == ["model.plan", "plan.json"]


# Profiles against every image with sides in 64..68.
SMALLEST = 64
LONG_SIDE = 68
SIDES = range(SMALLEST, LONG_SIDE + 1)


def profile(batch: int, low: tuple[int, int], high: tuple[int, int]) -> Profile:
    return Profile((batch, *low), (batch, *high), (8, *high))


@st.composite
def profiles(draw: st.DrawFn) -> list[Profile]:
    bounds = st.integers(SMALLEST - 2, LONG_SIDE + 2)
    found = []
    for _ in range(draw(st.integers(0, 4))):
        (top, bottom), (left, right) = (sorted((draw(bounds), draw(bounds))) for _ in range(2))
        found.append(profile(draw(st.integers(1, 2)), (top, left), (bottom, right)))
    return found


@given(profiles())
def test_every_shape_is_looked_at(found: list[Profile]) -> None:
    shapes = [(1, height, width) for height in SIDES for width in SIDES]
    missing = [shape for shape in shapes if not any(p.covers(shape) for p in found)]
    answer = uncovered_shape(found, LONG_SIDE)
    assert answer in missing if missing else answer is None


def test_both_orientations_and_the_square() -> None:
    wide, tall = profile(1, (64, 64), (66, 68)), profile(1, (64, 64), (68, 66))
    assert uncovered_shape([wide, tall], LONG_SIDE) == (1, 67, 67)
    assert uncovered_shape([wide, tall, profile(1, (67, 67), (68, 68))], LONG_SIDE) is None
    assert uncovered_shape([], LONG_SIDE) == (1, 64, 64)
