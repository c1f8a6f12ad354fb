"""Decisions about the masks of a run become corrections, tasks and lists; nothing leaves its folder."""

import json
import shutil
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from job_runs import run_label, run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.cli.main import root
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.jobs.fingerprint import read_fingerprint, run_key
from multisa.runtime.jobs.output import CONFIG, SNAPSHOT
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.review import FORMAT, review_run

DECIDED = {"a.jpg": "accept", "deep/c.jpg": "accept", "b.png": "reject", "deep/d.png": "later"}


def key_of(out: Path) -> str:
    with Snapshot(out / SNAPSHOT) as snapshot:
        return run_key(read_fingerprint(out) or {}, snapshot)


def write_decisions(path: Path, out: Path, decided: dict[str, str] | None = None, **more: Any) -> Path:
    value = {"format": FORMAT, "run": key_of(out), "decisions": DECIDED if decided is None else decided}
    path.write_text(json.dumps({**value, **more}))
    return path


@pytest.fixture
def out(photos: Path, bundle: Bundle, tmp_path: Path) -> Path:
    run_segment(photos, tmp_path / "out", bundle)
    return tmp_path / "out"


@pytest.mark.parametrize("writers", [("masks",), ("tar", "datumaro")])
def test_every_image_goes_where_it_was_decided(
    photos: Path, bundle: Bundle, tmp_path: Path, writers: tuple[str, ...]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "review"
    run_segment(photos, out, bundle, writers=writers)
    run_segment(photos, tmp_path / "plain", bundle)  # the same masks as files
    review = review_run(out, write_decisions(tmp_path / "d.json", out), folder, bundle)
    assert review.counts == {"accept": 2, "reject": 1, "later": 1, "undecided": 1}
    masks = {path.relative_to(folder / "corrections").as_posix() for path in (folder / "corrections").rglob("*.png")}
    assert masks == {"a.png", "deep/c.png"}
    for name in masks:
        assert (folder / "corrections" / name).read_bytes() == (tmp_path / "plain" / "masks" / name).read_bytes()
    assert (folder / "corrections/classes.txt").read_text().split("\n") == [*bundle.manifest.classes, ""]
    lists = {path.name: path.read_text() for path in folder.glob("*.txt")}
    assert lists == {"rejected.txt": "b.png\n", "later.txt": "deep/d.png\n", "undecided.txt": "turned.jpg\n"}
    with zipfile.ZipFile(folder / "cvat/000000.zip") as archive:
        assert archive.read("ImageSets/Segmentation/default.txt") == b"b\n"
    (task,) = json.loads((folder / "label-studio/000000.json").read_text())
    assert task["meta"] == {"id": "b.png"} and task["predictions"][0]["result"]
    assert not list(tmp_path.glob(".review*"))


def test_the_tasks_are_those_of_the_writers_of_a_run(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "review"
    run_segment(photos, out, bundle, writers=("masks", "cvat", "label-studio"))
    everything = {json.loads(line)["image"]: "reject" for line in (out / "labels.jsonl").read_text().splitlines()}
    review_run(out, write_decisions(tmp_path / "d.json", out, everything), folder, bundle)
    for name in ("cvat/000000.zip", "label-studio/000000.json", "label-studio/labeling_config.xml"):
        assert (folder / name).read_bytes() == (out / name).read_bytes(), name
    assert not (folder / "corrections").exists() and not (folder / "undecided.txt").exists()


def test_a_retry_keeps_the_key_and_another_run_has_another(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    run_segment(photos, first, bundle)
    key = key_of(first)
    assert f'data-run="{key}"' in (first / "report.html").read_text()
    run_segment(photos, first, bundle, retry_failed=True)
    assert key_of(first) == key
    run_segment(photos, again, bundle)  # the same images, settings and so masks
    run_segment(photos, other, bundle, min_area=0.1)
    run_label(photos, tmp_path / "labelled", bundle)
    assert key_of(again) == key and len({key, key_of(other), key_of(tmp_path / "labelled")}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "0" * 32}, "decisions about another run, or one that was started over"),
        ({"run": None}, "decisions about another run"),
        ({"format": "multisa decisions 9"}, "expected decisions that report.html exported"),
        ({"decisions": []}, "got other decisions than accept, reject, later by image id"),
        ({"decisions": {"a.jpg": "keep"}}, "got other decisions than accept, reject, later"),
        ({"decisions": {"a.jpg": ["accept"]}}, "got other decisions than accept, reject, later"),
        ({"decisions": {}}, "holds no decision: decide in report.html with the keys a, r and l"),
        ({"decisions": {"a.jpg": "accept", "z.jpg": "reject"}}, r"1 image without a mask in the run \(z.jpg\)"),
        ({"decisions": {"../../a": "accept"}}, r"without a mask in the run \(\.\./\.\./a\)"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    out: Path, bundle: Bundle, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_decisions(tmp_path / "d.json", out, **change)
    with pytest.raises(UsageError, match=message):
        review_run(out, path, tmp_path / "review", bundle)
    assert not (tmp_path / "review").exists() and not list(tmp_path.glob(".review*"))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": "multisa', b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(out: Path, bundle: Bundle, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"d\.json: "):
        review_run(out, path, tmp_path / "review", bundle)


def test_names_that_lead_out_of_the_run_are_refused(out: Path, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((out / "masks/a.png").read_bytes())
    with sqlite3.connect(out / SNAPSHOT) as rows:
        rows.execute("UPDATE items SET name = '../../secret' WHERE id = 'a.jpg'")
    rows.close()
    path = write_decisions(tmp_path / "d.json", out)
    with pytest.raises(UsageError, match="the list of its images was altered"):
        review_run(out, path, tmp_path / "review", bundle)
    assert not (tmp_path / "review").exists()


@pytest.mark.parametrize("change", [b"[]\n", b"{}\n", b"half a li", b'{"image": "a.jpg", "index": 99}\n'])
def test_damaged_records_are_told(out: Path, bundle: Bundle, tmp_path: Path, change: bytes) -> None:
    (out / "labels.jsonl").write_bytes((out / "labels.jsonl").read_bytes() + change)
    path = write_decisions(tmp_path / "d.json", out)
    with pytest.raises(UsageError, match=r"labels\.jsonl: got .*, expected the records of the run"):
        review_run(out, path, tmp_path / "review", bundle)


@pytest.mark.parametrize("place", ["masks/a.png", "masks/deep"])
def test_links_that_lead_out_of_the_run_are_refused(out: Path, bundle: Bundle, tmp_path: Path, place: str) -> None:
    shutil.move(out / place, tmp_path / "elsewhere")
    (out / place).symlink_to(tmp_path / "elsewhere")
    path = write_decisions(tmp_path / "d.json", out)
    with pytest.raises(UsageError, match=r"leads out of .*: remove the link"):
        review_run(out, path, tmp_path / "review", bundle)


def test_a_folder_with_files_is_left_alone(out: Path, bundle: Bundle, tmp_path: Path) -> None:
    path = write_decisions(tmp_path / "d.json", out)
    folder = tmp_path / "review"
    folder.mkdir()
    review_run(out, path, folder, bundle)  # empty
    (folder / "corrections/a.png").write_bytes(b"corrected by hand")
    with pytest.raises(UsageError, match="expected a new folder"):
        review_run(out, path, folder, bundle)
    assert (folder / "corrections/a.png").read_bytes() == b"corrected by hand"


def test_other_runs_and_bundles_are_told(out: Path, photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    path = write_decisions(tmp_path / "d.json", out)
    runner = CliRunner()

    def fails(*arguments: object) -> str:
        result = runner.invoke(root, ["review", *map(str, arguments), "--decisions", str(path)])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "give it with --bundle" in fails(out, "-o", tmp_path / "r")  # the packaged one
    assert "expected some of cvat, label-studio" in fails(out, "-o", tmp_path / "r", "--writer", "coco")
    assert "holds no finished run" in fails(photos, "-o", tmp_path / "r")
    run_segment(photos, tmp_path / "coco", bundle, writers=("coco",))
    assert "run it again with --writer masks" in fails(tmp_path / "coco", "-o", tmp_path / "r")
    (out / CONFIG).write_text("{")
    assert "is not JSON" in fails(out, "-o", tmp_path / "r")


def test_the_command_says_where_everything_is(out: Path, bundle: Bundle, tmp_path: Path) -> None:
    path, folder = write_decisions(tmp_path / "d.json", out), tmp_path / "review"
    words = ["review", out, "--decisions", path, "-o", folder, "--bundle", bundle.path, "--writer", "cvat"]
    result = CliRunner().invoke(root, [*map(str, words), "--image-prefix", "/data"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"2 images accepted: {folder}/corrections (for `multisa train --corrections`)",
        f"1 image rejected: {folder}/cvat",
        f"1 image later: {folder}/later.txt",
        f"1 image undecided: {folder}/undecided.txt",
    ]
    assert not (folder / "label-studio").exists()
    assert read_mask(folder / "corrections/a.png").shape == (40, 90)
