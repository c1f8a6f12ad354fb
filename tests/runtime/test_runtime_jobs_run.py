"""Which run a folder holds: other settings, other images, files of others, and the way back from each."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from job_runs import public_bytes, reasons, records, run_label, run_segment

from multisa.kernels.cpu import native
from multisa.runtime.backends.gpus import Gpu, GpuProbe
from multisa.runtime.backends.registry import SelectedBackend
from multisa.runtime.bundle import Bundle, Manifest, write_bundle
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import flush_folder
from multisa.runtime.jobs import fingerprint as config
from multisa.runtime.jobs import output as folder_module
from multisa.runtime.jobs.output import CONFIG, JOURNAL, LOCK
from multisa.runtime.jobs.shards import PARTS

WRITERS = ("masks", "tar", "coco", "datumaro")


def times(out: Path) -> dict[str, int]:
    files = (path for path in out.rglob("*") if path.is_file() and ".multisa" not in path.parts)
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_size": 3}, "shard size: got 3, the existing run has 2"),
        ({"writers": ("masks", "coco")}, "writers: got ['masks', 'coco'], the existing run has ['masks']"),
        ({"max_pixels": 99_999}, "max pixels: got 99999, the existing run has "),
        ({"batch": 2}, "batch: got 2, the existing run has 1; look-ahead: got 64, the existing run has None"),
    ],
)
def test_other_settings_are_told(
    photos: Path, bundle: Bundle, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle, shard_size=2)
    before = public_bytes(out)
    with pytest.raises(UsageError) as caught:
        run_segment(photos, out, bundle, **{"shard_size": 2, **options})
    assert said in str(caught.value) and "use those, start over (--overwrite), or choose" in str(caught.value)
    assert public_bytes(out) == before
    run_segment(photos, out, bundle, shard_size=2, workers=3, readers=5)  # those decide nothing


def test_another_bundle_other_labels_another_command(
    photos: Path, bundle: Bundle, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
) -> None:
    labels, out = tmp_path / "labels.csv", tmp_path / "out"
    labels.write_text("image,labels\na.jpg,green\n")
    run_label(photos, out, bundle, labels=labels)
    other = write_bundle(tmp_path / "other", replace(manifest, name="other"), graphs)
    with pytest.raises(UsageError, match=r"other settings \(bundle: got another bundle"):
        run_label(photos, out, other, labels=labels)
    with pytest.raises(UsageError, match="labels: got none, the existing run has some"):
        run_label(photos, out, bundle)
    with pytest.raises(UsageError, match="command: got segment, the existing run has label"):
        run_segment(photos, out, bundle)
    labels.write_text("image,labels\na.jpg,red thing\n")
    with pytest.raises(UsageError, match="labels: got another label file"):
        run_label(photos, out, bundle, labels=labels)


def test_what_runs_the_graphs_and_writes_the_files_is_told(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, out = ("masks", "parquet"), tmp_path / "out"
    run_segment(photos, out, bundle, writers=writers)
    settings = json.loads((out / CONFIG).read_bytes())
    assert settings["instructions of the kernels"] == native.instruction_set()
    assert settings["version of zlib"] == zlib.ZLIB_RUNTIME_VERSION
    assert settings["version of pyarrow"] == metadata.version("pyarrow")
    monkeypatch.setattr(zlib, "ZLIB_RUNTIME_VERSION", "0.1")
    with pytest.raises(UsageError, match=r"version of zlib: got 0\.1, the existing run has \d"):
        run_segment(photos, out, bundle, writers=writers)


def test_plans_and_gpus_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned:
        name = "tensorrt"
        detail: ClassVar = {"plan_sha256": "ab12"}

    monkeypatch.setattr(config, "probe_gpus", lambda: GpuProbe("13.2", (Gpu("some GPU", "sm89"),)))
    found = config.process_fingerprint([SelectedBackend("cam", cast("Any", Planned()), "fp16", "asked for")])
    assert found["backend of cam"] == "tensorrt, fp16"
    assert (found["engine of cam"], found["architecture of the GPU"]) == ("ab12", "sm89")
    assert "version of pyarrow" not in found


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_settings_that_cannot_be_read(photos: Path, bundle: Bundle, tmp_path: Path, content: str) -> None:
    run_segment(photos, tmp_path / "out", bundle)
    (tmp_path / "out" / CONFIG).write_text(content)
    with pytest.raises(UsageError, match="start over with --overwrite"):
        run_segment(photos, tmp_path / "out", bundle)


def test_a_source_that_has_changed(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle)
    before = public_bytes(out)
    (photos / "b.png").rename(photos / "bb.png")
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes() + b"\0")
    match = (
        r"1 added \(bb\.png\); 1 removed \(b\.png\); 1 changed \(a\.jpg\): "
        r"continue .*--skip-source-check.*--overwrite"
    )
    with pytest.raises(UsageError, match=match):
        run_segment(photos, out, bundle)
    summary = run_segment(photos, out, bundle, skip_source_check=True)
    assert summary.done_now == 0 and public_bytes(out) == before


def test_a_run_that_has_ended_is_left_alone(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle, writers=WRITERS)
    before = times(out)
    summary = run_segment(photos, out, bundle, writers=WRITERS)
    assert (summary.done, summary.failures, summary.done_now) == (5, 1, 0)
    assert times(out) == before


@pytest.mark.parametrize("theirs", ["masks/old.png", "labels.jsonl", "failed.jsonl", "shards/mine.tar"])
def test_files_of_others_are_not_written_over(photos: Path, bundle: Bundle, tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "out" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"of no run that can be resumed: choose another folder, or"):
        run_segment(photos, tmp_path / "out", bundle, writers=WRITERS)
    assert path.read_text() == "mine"
    run_segment(photos, tmp_path / "out", bundle, writers=WRITERS, overwrite=True)
    assert (theirs in ("masks/old.png", "shards/mine.tar")) == (path.exists() and path.read_text() == "mine")


def test_overwrite_removes_what_the_run_has_written_and_nothing_else(
    photos: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle, writers=WRITERS, shard_size=2)
    for name in ("notes.txt", "masks/mine.png", "masks/deep/mine.png", "coco/mine.json", "own/x"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    run_segment(photos / "a.jpg", out, bundle, overwrite=True)
    left = public_bytes(out)
    for name in ("notes.txt", "masks/mine.png", "masks/deep/mine.png", "coco/mine.json", "own/x"):
        assert left.pop(name) == b"mine"
    assert set(left) == {"masks/a.png", "labels.jsonl"}
    assert not (out / "shards").exists()  # no folder is left empty


@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_a_removal_that_is_cut_leaves_no_half_run(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """What was removed is never taken for done."""
    out = tmp_path / "out"
    run_segment(photos, out, bundle, shard_size=2)
    before, remove, left = public_bytes(out), folder_module._remove, iter(range(step))

    def cut(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(*arguments)

    monkeypatch.setattr(folder_module, "_remove", cut)
    with pytest.raises(KeyboardInterrupt):
        run_segment(photos, out, bundle, shard_size=2, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="of no run that can be resumed"):
        run_segment(photos, out, bundle, shard_size=2)
    run_segment(photos, out, bundle, shard_size=2, overwrite=True)
    assert public_bytes(out) == before


def test_lists_that_were_altered_lead_nowhere(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "run/out"
    run_segment(photos, out, bundle)
    precious = [tmp_path / "precious.png", tmp_path / "run/precious.png", tmp_path / "elsewhere/precious.png"]
    for path in precious:
        path.parent.mkdir(exist_ok=True)
        path.write_text("keep")
    (out / "masks/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    names = ("../precious.png", "masks/../../precious.png", str(precious[0]), "masks/linked/precious.png")
    lines = "".join(f"{'0' * 64}  {name}\n" for name in names)
    (out / PARTS / "files" / "000000").write_bytes(f"{lines}\n\0\n\xff\n".encode("latin-1"))
    run_segment(photos / "a.jpg", out, bundle, overwrite=True)
    assert all(path.read_text() == "keep" for path in precious)


ALTER: dict[str, Callable[[Path], object]] = {
    "mask": lambda out: (out / "masks/a.png").write_bytes(b"other"),
    "mask gone": lambda out: (out / "masks/a.png").unlink(),
    "folder gone": lambda out: (out / "masks/deep").rename(out / "moved"),
    "list": lambda out: (out / PARTS / "files/000000").write_bytes(b""),
    "list gone": lambda out: (out / PARTS / "files/000000").unlink(),
    "records": lambda out: (out / PARTS / "records/000000").write_bytes(b""),
    "labels": lambda out: (out / "labels.jsonl").unlink(),
    "annotations": lambda out: (out / "coco/annotations/instances_default.json").write_bytes(b"{}"),
    "failures": lambda out: (out / "failed.jsonl").write_bytes(b""),
}


@pytest.mark.parametrize("what", ALTER)
def test_verify_mends_what_was_altered(photos: Path, bundle: Bundle, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle, writers=WRITERS, shard_size=2)
    before, written = public_bytes(out), times(out)
    ALTER[what](out)
    run_segment(photos, out, bundle, writers=WRITERS, shard_size=2, verify=True)
    after = public_bytes(out)
    assert {path: after[path] for path in before} == before
    mended = {path for path in before if times(out)[path] != written[path]}
    as_it_was = "masks/a.png" if what == "folder gone" else "masks/turned.png"
    assert as_it_was not in mended  # of a shard that was as it should be


def test_another_run_in_the_same_folder_is_refused(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hold = "import sys; from pathlib import Path; from multisa.runtime.jobs.output import run_lock\n"
    hold += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", hold, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another run writes to it \(process {other.pid} on .*: wait"):
            run_segment(photos, out, bundle)
        with pytest.raises(UsageError, match="another run writes to it"):
            run_segment(photos, out, bundle, overwrite=True)
        other.kill()
    run_segment(photos, out, bundle)  # a lock ends with its process, however that ends
    with (out / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(MultisaError, match=r"out/\.multisa/lock: cannot be locked \(.*choose a folder on"):
        run_segment(photos, tmp_path / "out", bundle)


def test_a_disk_that_flushes_no_folders(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network disks do not; and where the folder that OUT is in may not be read."""
    open_, fsync, parent = os.open, os.fsync, tmp_path / "shared"
    parent.mkdir()

    def refuse_parent(path: str | Path, *arguments: Any, **names: Any) -> int:
        if Path(path) == parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, *arguments, **names)

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "open", refuse_parent)
    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert run_segment(photos, parent / "out", bundle).done == 5
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):  # nothing else is passed over
        flush_folder(tmp_path)


def test_a_folder_that_cannot_be_written(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if os.geteuid():
        out.chmod(0o555)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", out], check=False).returncode:
        pytest.skip("who is root writes to any folder, and no read-only disk can be made here")
    try:
        with pytest.raises(MultisaError, match=r"\.multisa: .*make the folder writable, or"):
            run_segment(photos, out, bundle)
    finally:
        if not os.geteuid():
            subprocess.run(["umount", out], check=True)


def test_names_that_are_too_long_or_those_of_folders(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    photo = (photos / "a.jpg").read_bytes()
    (photos / "broken.jpg").unlink()
    (photos / ("x" * 251 + ".jpg")).write_bytes(photo)  # as a mask the name would have 255 letters
    (photos / ("y" * 250 + ".JPEG")).write_bytes(photo)
    (photos / "y.png").mkdir()
    for name in ("e.jpg", "e.png/f.jpg", "e.jpg.png/g.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(photo)
    for out, workers in (("one", 1), ("four", 4)):
        summary = run_segment(photos, tmp_path / out, bundle, workers=workers, shard_size=3)
        assert (summary.images, summary.failures) == (10, 0)
    masks = {path for path in public_bytes(tmp_path / "one") if path.startswith("masks/e")}
    assert masks == {"masks/e.jpg~4.png", "masks/e.png/f.png", "masks/e.jpg.png/g.png"}
    assert public_bytes(tmp_path / "one") == public_bytes(tmp_path / "four")


def test_a_result_that_no_disk_can_name_is_a_failure_of_the_image(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    photo = (photos / "a.jpg").read_bytes()
    for ending in (".jpg", ".bmp"):  # so both keep their full names, which are too long with .png
        (photos / ("x" * 250 + ending)).write_bytes(photo)
    run_segment(photos, tmp_path / "out", bundle, shard_size=2)
    said = {image: reason for image, reason in reasons(tmp_path / "out").items() if image != "broken.jpg"}
    assert len(said) == 2 and all("File name too long: rename the image" in r for r in said.values())
    kinds = {row["image"][0]: row["kind"] for row in records(tmp_path / "out", "failed.jsonl")}
    assert kinds == {"b": "decode", "x": "encode"}


def test_an_image_that_is_too_large(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run_segment(photos, tmp_path / "out", bundle, max_pixels=40 * 90)
    said = reasons(tmp_path / "out")
    assert set(said) >= {"b.png", "broken.jpg"} and "a.jpg" not in said
    assert str(40 * 90) in said["b.png"] or "3,600" in said["b.png"]


def test_what_the_journal_holds(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run_segment(photos, tmp_path / "out", bundle, shard_size=4)
    lines = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    lines.sort(key=lambda line: line["shard"])
    assert [(line["shard"], line["images"], line["failed"]) for line in lines] == [(0, 3, 1), (1, 2, 0)]
