"""The correction curve on a few images with tiny networks: every point is there, and a second run trains nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from multisa.benchmarks import corrections
from multisa.benchmarks.corrections import Curve, measure
from multisa.runtime.errors import UsageError
from multisa.training.data import read_dataset

TINY = Path(__file__).parents[1] / "training" / "tiny.toml"


@pytest.mark.slow
def test_the_curve_has_every_point_and_resumes(
    voc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrections, "SHARES", (0.15,))
    words = ["--data", voc_folder, "--preset", TINY, "--seeds", 4, "-o", tmp_path / "runs", "--results", tmp_path]
    for setting in ("cam.schedule.epochs=1", "segmenter.schedule.epochs=1"):
        words += ["--set", setting]
    corrections.main([*map(str, words)])
    results = json.loads((tmp_path / "corrections.json").read_text())
    assert results["seeds"] == [4] and results["train"] == 6 and len(results["none"]["seeds"]) == 1
    (row,) = results["curve"]
    assert (row["share"], row["images"]) == (0.15, 1)
    assert len(row["uncertain"]["seeds"]) == len(row["random"]["seeds"]) == 1
    # The first of the ranking is the most uncertain of the labels.
    lines = (tmp_path / "runs/seed-4-labels/labels.jsonl").read_text().splitlines()
    first = max(map(json.loads, lines), key=lambda record: record["uncertainty"])["image"]
    (chosen,) = (tmp_path / "runs/seed-4-uncertain-1").iterdir()
    assert chosen.stem == Path(first).stem
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("seed-4*/*/stage.json")}
    corrections.main([*map(str, words)])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("seed-4*/*/stage.json")} == made
    again = json.loads((tmp_path / "corrections.json").read_text())
    assert again["curve"] == results["curve"] and again["none"] == results["none"]


def test_rows_hold_mean_and_spread_of_the_seeds(voc_folder: Path) -> None:
    dataset = read_dataset(voc_folder, quiet=True)
    row = corrections._row(0.5, {(0.5, "uncertain"): [60.0, 62.0], (0.5, "random"): [59.0, 58.0]}, dataset)
    assert row["images"] == 3 and row["uncertain"] == {"seeds": [60.0, 62.0], "mean": 61.0, "spread": 1.41}
    assert row["uncertain_ahead_by"] == {"seeds": [1.0, 4.0], "mean": 2.5, "spread": 2.12}


def test_masks_are_needed(voc_folder: Path, tmp_path: Path) -> None:
    dataset = read_dataset(voc_folder, quiet=True)
    for without in ({"val": ()}, {"train": ()}):
        with pytest.raises(UsageError, match="got no masks of train or val"):
            measure(Curve(replace(dataset, **without), str(TINY), (), (0,), tmp_path))
