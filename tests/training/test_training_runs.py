"""Runs side by side, the list of runs, and removing stages that a run no longer uses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import UsageError
from multisa.runtime.files import sha256_of_file, write_json_atomically
from multisa.runtime.records import record_to_dict
from multisa.training.config import load_config
from multisa.training.data import read_dataset
from multisa.training.pipeline import train
from multisa.training.run_record import RUN_RECORD, SEGMENTER, ImageCounts, Row, RunRecord, StageRecord
from multisa.training.runs import LOCK, compare_runs, list_runs, run_lock, unused_stages

TINY = Path(__file__).with_name("tiny.toml")


def run_cli(*arguments: object, **options: str) -> Result:
    return CliRunner().invoke(root_command, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def add_stage(root: Path, name: str, results: dict[str, object] | None = None, *, finished: bool = True) -> StageRecord:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"x" * 1000)
    (folder / "clock.json").write_text("{}")
    if finished:
        files = {"a.png": sha256_of_file(folder / "a.png")}
        write_json_atomically(folder / "stage.json", {"digest": "", "results": results or {}, "files": files})
    return StageRecord(name.rpartition("-")[0], name, "", 90.0)


def make_run(root: Path, *settings: str, miou: float = 50.0) -> RunRecord:
    """A finished run of two stages."""
    stages = (
        add_stage(root, "cam-0123456789"),
        add_stage(root, "segmenter-val-0123456789", {"miou": miou, "iou": [miou, miou]}),
    )
    record = RunRecord(
        config=load_config(str(TINY), settings),
        classes=("background", "square"),
        palette=((0, 0, 0), (128, 0, 0)),
        images=ImageCounts(8, 6, 4),
        data_digest="0" * 64,
        label=LabelParameters(),
        segmenter_label=SegmenterLabelParameters(),
        score_thresholds=(0.5,),
        betas=(0.1,),
        rows=(Row(SEGMENTER, "val", miou, (miou, miou)),),
        stages=stages,
        seconds=180.0,
        torch="2",
        threads=2,
    )
    write_json_atomically(root / RUN_RECORD, record_to_dict(record))
    return record


def test_runs_are_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "cam.schedule.epochs=7", "more_seeds=[4]", miou=61.5)
    (tmp_path / "b" / "cam-0123456789" / "stage.json").unlink()
    found = json.loads(run_cli("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert found["settings"] == {"cam.schedule.epochs": [2, 7], "more_seeds": [[], [4]]}
    assert found["stages"] == [
        {"stage": "cam", "seconds": [90.0, 90.0], "miou": [None, None]},
        {"stage": "segmenter-val", "seconds": [90.0, 90.0], "miou": [50.0, 61.5]},
    ]
    assert found["results"] == [{"stage": SEGMENTER, "measured_on": "val", "miou": [50.0, 61.5]}]
    text = run_cli("compare", tmp_path / "a", tmp_path / "b").stdout
    lines = text.splitlines()
    assert lines[:2] == [f"run 1  {tmp_path / 'a'}", f"run 2  {tmp_path / 'b'}"]
    assert "cam.schedule.epochs       2      7" in lines
    assert any(line.split() == ["segmenter-val", "90.0", "s", "50.0", "90.0", "s", "61.5"] for line in lines)
    assert lines[-1].split() == [*SEGMENTER.split(), "(val)", "50.0", "61.5"]
    make_run(tmp_path / "c")
    assert "no setting differs" in run_cli("compare", tmp_path / "a", tmp_path / "c").stdout


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(UsageError, match="got 1 run, expected two or more"):
        compare_runs([tmp_path / "a"])
    with pytest.raises(UsageError, match=r"run\.json: missing; expected the output folder of a finished"):
        compare_runs([tmp_path / "a", tmp_path])


def test_runs_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "a", miou=61.5)
    add_stage(tmp_path / "runs" / "b", "cam-0123456789", finished=False)
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = [line.split() for line in run_cli("runs").stdout.splitlines()]
    assert rows[0][:3] == ["run", "state", "size"]
    assert {tuple(row[:2]) for row in rows[1:]} == {("runs/a", "finished"), ("runs/b", "unfinished")}
    values = {entry["folder"]: entry for entry in json.loads(run_cli("runs", "list", "runs", "--json").stdout)}
    assert values["runs/a"]["miou"] == 61.5 and values["runs/b"]["miou"] is None
    assert values["runs/a"]["bytes"] == sum(p.stat().st_size for p in Path("runs/a").rglob("*") if p.is_file())
    with run_lock(Path("runs/b")):
        assert run_cli("runs", "runs/b").stdout.splitlines()[1].split()[:2] == ["runs/b", "running"]
    assert run_cli("runs", "runs/notes").stdout == "no runs here\n"
    result = run_cli("runs", "elsewhere")
    assert result.exit_code == 2 and "elsewhere: not a folder, expected one with runs" in result.stderr


def test_only_unused_and_unchanged_stages_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make_run(root)
    add_stage(root, "cam-aaaaaaaaaa")
    add_stage(root, "walk-bbbbbbbbbb", finished=False)
    edited = root / "pseudo-masks-cccccccccc"
    add_stage(root, edited.name)
    (edited / "a.png").write_bytes(b"mended by hand")
    add_stage(root, "teacher-1-dddddddddd")
    (root / "teacher-1-dddddddddd" / "mine.txt").write_text("kept")
    kept = [root / "mine-eeeeeeeeee", root / "reproduce", root / "photos"]
    for path in kept:
        path.mkdir()
    outside = tmp_path / "elsewhere-ffffffffff"
    add_stage(tmp_path, outside.name)
    (root / "link-ffffffffff").symlink_to(outside)
    record = json.loads((root / RUN_RECORD).read_text())
    add_stage(root, "figure-9999999999")
    used = {"name": "figure", "folder": "figure-9999999999", "digest": "", "seconds": 1.0}
    write_json_atomically(root / "reproduce" / RUN_RECORD, {**record, "stages": [used]})
    before = sorted(path.name for path in root.iterdir())

    result = run_cli("runs", "clean", root, input="n\n")
    assert result.exit_code == 0 and sorted(path.name for path in root.iterdir()) == sorted([*before, LOCK])
    assert "cam-aaaaaaaaaa  0.0 MB" in result.stdout
    assert "kept: walk-bbbbbbbbbb, because it is not finished" in result.stdout
    assert "kept: pseudo-masks-cccccccccc, because a.png was changed or added by hand" in result.stdout
    assert "kept: teacher-1-dddddddddd, because mine.txt was changed" in result.stdout
    result = run_cli("runs", "clean", root, "--yes")
    assert result.exit_code == 0 and "removed: 1" in result.stdout
    gone = {"cam-aaaaaaaaaa"}
    assert {path.name for path in root.iterdir()} == ({*before} - gone) | {LOCK}
    assert (outside / "a.png").is_file() and (edited / "a.png").read_bytes() == b"mended by hand"
    assert "no stage to remove" in run_cli("runs", "clean", root, "--yes").stdout


def test_a_run_that_is_going_or_not_finished_is_not_cleaned(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    add_stage(tmp_path / "a", "cam-aaaaaaaaaa")
    with run_lock(tmp_path / "a"):
        result = run_cli("runs", "clean", tmp_path / "a", "--yes")
        assert result.exit_code == 2 and "a training is running in this folder; wait for its end" in result.stderr
        with pytest.raises(UsageError, match="a training is running in this folder"), run_lock(tmp_path / "a"):
            pass
    add_stage(tmp_path / "b", "cam-aaaaaaaaaa")
    result = run_cli("runs", "clean", tmp_path / "b", "--yes")
    assert result.exit_code == 2 and "expected the output folder of a finished `multisa train`" in result.stderr
    assert run_cli("runs", "clean", tmp_path / "nowhere").exit_code == 2 and not (tmp_path / "nowhere").exists()
    assert (tmp_path / "a" / "cam-aaaaaaaaaa").is_dir() and (tmp_path / "b" / "cam-aaaaaaaaaa").is_dir()


def test_two_trainings_in_one_folder_are_refused(voc_folder: Path, tmp_path: Path) -> None:
    dataset, config = read_dataset(voc_folder), load_config(str(TINY))
    with run_lock(tmp_path), pytest.raises(UsageError, match="stop it, or choose another folder"):
        train(config, dataset, tmp_path)
    assert not list(tmp_path.glob("cam-*"))


@pytest.mark.slow
def test_a_cleaned_run_is_still_finished(tiny_run: Path, voc_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    assert unused_stages(folder) == []
    first = train(config, dataset, folder)
    changed = replace(config, segmenter=replace(config.segmenter, decoder_channels=8))
    train(changed, dataset, folder)
    unused = {stage.path.name for stage in unused_stages(folder)}
    assert unused == {stage.folder for stage in first.stages if stage.name.startswith("segmenter")}
    assert run_cli("runs", "clean", folder, "--yes").exit_code == 0
    before = sorted(folder.iterdir())
    train(changed, dataset, folder)  # every stage is skipped
    assert sorted(folder.iterdir()) == before
    (entry,) = list_runs(folder)
    assert entry["state"] == "finished" and entry["miou"] is not None
