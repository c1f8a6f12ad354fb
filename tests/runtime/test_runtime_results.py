"""What a run leaves depends on its images, bundle and options alone; what was there before never shows."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multisa.runtime import bulk
from multisa.runtime.bulk import RunOptions
from multisa.runtime.bundle import Bundle
from multisa.runtime.results import begin_results, finish_results
from multisa.runtime.segment import segment_images


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def public_files(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and ".multisa" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_an_earlier_run_leaves_no_trace(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    segment_images(photos, out, bundle=bundle, options=RunOptions(gallery=True))
    (out / "masks" / "mine.png").write_bytes(b"of no run")
    shutil.rmtree(photos / "deep")
    Image.new("RGB", (64, 64)).save(photos / "new.png")
    for target in (out, fresh):
        segment_images(photos, target, bundle=bundle)
    assert (out / "masks" / "mine.png").read_bytes() == b"of no run"
    (out / "masks" / "mine.png").unlink()
    assert public_files(out) == public_files(fresh)
    assert not (out / "masks" / "deep").exists() and not list((out / "overlays").iterdir())


def test_a_run_that_is_cut_leaves_no_trace_in_the_next(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", RunOptions(workers=1, gallery=True)
    segment_images(photos, out, bundle=bundle, options=options)
    write_mask = bulk.write_mask

    def full_disk(path: Path, *rest: Any) -> None:
        if path.name == "d.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_mask(path, *rest)

    monkeypatch.setattr(bulk, "write_mask", full_disk)
    (photos / "b.png").rename(photos / "bb.png")
    with pytest.raises(OSError, match="No space left"):
        segment_images(photos, out, bundle=bundle, options=options)
    # What is done is told, what is not is not; the page and the masks of before are not spoken of.
    assert [row["image"] for row in lines(out / "labels.jsonl")] == ["a.jpg", "bb.png", "deep/c.jpg"]
    assert [row["image"] for row in lines(out / "failed.jsonl")] == ["broken.jpg"]
    assert not (out / "index.html").exists()
    monkeypatch.undo()
    (photos / "bb.png").unlink()
    for target in (out, tmp_path / "fresh"):
        segment_images(photos, target, bundle=bundle, options=options)
    assert public_files(out) == public_files(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 4])
def test_a_name_that_cannot_be_written_is_a_failure_of_the_image(
    photos: Path, bundle: Bundle, tmp_path: Path, workers: int
) -> None:
    (photos / "broken.jpg").unlink()
    shutil.copy(photos / "a.jpg", photos / ("x" * 250 + ".jpg"))  # too long with .overlay.jpg
    (photos / "e.png").mkdir()  # as the mask of e.jpg would be named
    shutil.copy(photos / "a.jpg", photos / "e.jpg")
    shutil.copy(photos / "a.jpg", photos / "e.png" / "f.jpg")
    out = tmp_path / "out"
    options = RunOptions(workers=workers, gallery=True)
    summary = segment_images(photos, out, bundle=bundle, options=options)
    assert (summary.images, summary.failures) == (8, 1)
    (failed,) = lines(out / "failed.jsonl")
    assert failed["image"].startswith("xxx") and "File name too long: rename" in failed["reason"]
    assert (out / "masks" / "e.jpg.png").is_file() and (out / "masks" / "e.png" / "f.png").is_file()
    assert not list((out / "masks").glob("xxx*"))


def test_a_mask_named_as_a_folder_is_a_failure_of_the_image(
    photos: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "masks" / "a.png").mkdir(parents=True)
    (out / "masks" / "a.png" / "mine.txt").write_text("of no run")
    (out / "masks" / "deep").write_text("a file of no run")
    segment_images(photos, out, bundle=bundle)
    failed = {row["image"]: row["reason"] for row in lines(out / "failed.jsonl")}
    assert set(failed) == {"a.jpg", "broken.jpg", "deep/c.jpg", "deep/d.png"}
    assert "its results cannot be written: " in failed["a.jpg"] and str(tmp_path) not in failed["a.jpg"]
    assert (out / "masks" / "a.png" / "mine.txt").is_file() and (out / "masks" / "deep").is_file()


@pytest.mark.parametrize(
    "mask",
    [
        "masks/../../precious.png",
        "../precious.png",
        "masks/linked/precious.png",
        "precious.png",
        "masks/precious.txt",
        "masks/\0.png",
        "masks/\ud800.png",
        f"masks/{'y' * 300}.png",
        7,
    ],
)
def test_altered_notes_lead_nowhere(tmp_path: Path, mask: object) -> None:
    out = tmp_path / "run" / "out"
    (out / "masks").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (out / "masks" / "linked").symlink_to(tmp_path / "elsewhere")
    places = (out, out.parent, out.parents[1], tmp_path / "elsewhere")
    precious = [folder / "precious.png" for folder in places] + [out / "masks" / "precious.txt"]
    for path in precious:
        path.write_text("keep")
    nested = "[" * 100_000
    (out / "labels.jsonl").write_text(f"{json.dumps({'mask': mask})}\nno json\n{nested}\n[]\n")
    begin_results(out, ["a"])
    finish_results(out, [], pictures=False)
    assert all(path.is_file() for path in precious)
    assert not (out / "labels.jsonl").exists()
    assert (out / ".multisa" / "masks.jsonl").read_text() == ""
