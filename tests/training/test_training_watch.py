"""Following a training: metrics.csv, train.html, warnings, time left, trackers; nothing is changed or stopped by it."""

import csv
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.decode import write_mask
from multisa.training import pipeline, watch
from multisa.training.config import TrainConfig, load_config
from multisa.training.data import Dataset, read_dataset
from multisa.training.data_check import Estimate
from multisa.training.inference import save_maps
from multisa.training.loop import Epoch
from multisa.training.pipeline import PLAN, plan_run, train
from multisa.training.run_record import RunRecord, load_run
from multisa.training.stage_cache import StageCache
from multisa.training.stages import planned_stages
from multisa.training.train_page import PAGE, overlay_maps
from multisa.training.watch import METRICS, NUM_SAMPLES, SAMPLES, MetricsFile, Plan, RunWatch

TINY = Path(__file__).with_name("tiny.toml")
EMPTY = {"meta", "img", "input", "link", "br", "path"}  # elements without an end tag


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def keys_of(path: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in ("stage", "epoch", "step", "metric")) for row in rows_of(path)]


class Elements(HTMLParser):
    """Fails where end tags are missing; collects the attributes of every element, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_metrics_are_appended_once_and_half_a_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    metrics = MetricsFile(path)
    assert len(metrics.add("cam-0123456789", {"loss": 1 / 3, 'iou/a, "b"\nc': 50.0}, 1, 7)) == 2
    assert metrics.add("cam-0123456789", {"loss": 0.5}, 1, 7) == []  # an epoch that is repeated
    assert len(metrics.add("cam-0123456789", {"seconds": 2.0}, None, None)) == 1
    before = path.read_bytes()
    path.write_bytes(before + b"2026-01-01T00:00:00+00:00,cam-0123")
    again = MetricsFile(path)
    assert path.read_bytes() == before and again.rows == metrics.rows
    again.add("cam-0123456789", {"loss": 0.25, "seconds": 9.0}, 2, 14)
    rows = rows_of(path)
    assert [(r["epoch"], r["metric"], r["value"]) for r in rows] == [
        ("1", "loss", "0.333333"),
        ("1", 'iou/a, "b"\nc', "50.0"),
        ("", "seconds", "2.0"),
        ("2", "loss", "0.25"),
        ("2", "seconds", "9.0"),
    ]
    assert len(set(keys_of(path))) == len(rows)


def epoch(number: int, loss: float = 0.5, of: int = 4) -> Epoch:
    return Epoch(number, of, 10 * number, loss, 0.01, 3.0)


class Run:
    """A run whose stages only write what the page shows."""

    def __init__(self, root: Path, dataset: Dataset, config: TrainConfig) -> None:
        self.root, self.dataset, self.config = root, dataset, config
        names = ("cam", "cam-maps", "cam-maps-measured", "pseudo-masks", "segmenter", "segmenter-val")
        self.plan = Plan("2 CPU cores", dict.fromkeys(names, 100.0))

    def watch(self) -> RunWatch:
        return RunWatch(self.config, self.dataset, self.root, self.plan)

    def run(self, followed: RunWatch, val: float = 20.0) -> None:
        cache = StageCache(self.root, followed)
        n = len(self.dataset.class_names)

        def trained(folder: Path) -> Mapping[str, Any]:
            followed.epoch(epoch(1))
            followed.epoch(epoch(2, 0.25))
            return {"losses": [0.5, 0.25]}

        def maps(folder: Path) -> Mapping[str, Any]:
            for item in self.dataset.train_images:
                save_maps(folder / f"{item.id}.npy", np.full((len(item.classes), 6, 6), 0.5, np.float32))
            return {}

        def masks(folder: Path) -> Mapping[str, Any]:
            for item in self.dataset.train_images:  # class 2 has no pixel
                write_mask(
                    folder / f"{item.id}.png", np.full((24, 24), 1 if 1 in item.classes else 0, np.uint8), PALETTE
                )
            return {}

        def segmenter(folder: Path) -> Mapping[str, Any]:
            for number in (1, 2, 3):
                scores = {"miou": val, "iou": [80.0, 40.0, 0.0]}
                followed.epoch(epoch(number), lambda item: np.ones((24, 24), np.uint8), lambda scores=scores: scores)
            return {}

        cam = cache.stage("cam", {}, [], trained)
        found = cache.stage("cam-maps", {}, [cam], maps)
        cache.stage(
            "cam-maps-measured", {}, [found], lambda folder: {"best": {"miou": 50.0, "iou": [90.0, 60.0, None]}}
        )
        cache.stage("pseudo-masks", {}, [found], masks)
        trained_on = cache.stage("segmenter", {}, [cam], segmenter)
        cache.stage("segmenter-val", {}, [trained_on], lambda folder: {"miou": 40.0, "iou": [80.0, 40.0, 0.0][:n]})


PALETTE = np.zeros((256, 3), np.uint8)


@pytest.fixture
def run(voc_folder: Path, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", read_dataset(voc_folder), load_config(str(TINY), ["val_every=1"]))


def test_the_page_shows_the_run_and_loads_nothing(run: Run) -> None:
    with run.watch() as followed:
        run.run(followed)
        going = (run.root / PAGE).read_text(encoding="utf-8")
    page = (run.root / PAGE).read_text(encoding="utf-8")
    for text, state in ((going, "running"), (page, "finished")):
        elements = Elements(text)
        assert not re.search(r"https?:|//[a-z]", re.sub(r"data:image/[^\"]*", "", text).replace("</", ""))
        links = [a[name] for _, a in elements.found for name in ("src", "href") if name in a]
        assert links and all(str(link).startswith("data:image/") for link in links)
        assert ({"http-equiv": "refresh", "content": "20"} in [a for _, a in elements.found]) == (state == "running")
        assert state in elements.text and "default-src 'none'" in text
    articles = [a for tag, a in elements.found if tag == "article"]
    assert len(articles) == NUM_SAMPLES
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert captions[:4] == ["image", "CAM", "pseudo-masks", "segmenter, epoch 3"]
    assert page.count('<path class="loss"') == 2 and page.count('<path class="dashed"') == 1
    assert "6 of 6" in elements.text and "loss 0.25, axis 0 to 0.5" in elements.text
    for figure in ("<b>90.0</b>", "<b>60.0</b>", "segmenter, epoch 3</th>", "pseudo-masks: no pixel of disc"):
        assert figure in page
    assert {path.name for path in (run.root / SAMPLES).glob("*.png")} == {f"{a['aria-label']}.png" for a in articles}


def test_a_resumed_run_repeats_no_row_and_keeps_its_page(run: Run) -> None:
    with run.watch() as followed:
        run.run(followed)
    before = (run.root / METRICS).read_bytes()
    page = (run.root / PAGE).read_text(encoding="utf-8")
    with run.watch() as followed:
        run.run(followed)  # all stages are skipped
    shutil.rmtree(next(run.root.glob("segmenter-[0-9a-f]*")))
    with run.watch() as followed:
        run.run(followed)  # the segmenter is trained once more
    assert (run.root / METRICS).read_bytes() == before
    again = (run.root / PAGE).read_text(encoding="utf-8")
    assert again == page


def test_a_page_of_a_stopped_run_says_why(run: Run) -> None:
    for error, reason in (
        (ValueError("the loss became <nan>"), "the loss became <nan>"),
        (KeyboardInterrupt(), "interr"),
    ):
        with pytest.raises(type(error)), run.watch():
            raise error
        page = (run.root / PAGE).read_text(encoding="utf-8")
        assert f"Stopped: {reason}" in Elements(page).text and 'http-equiv="refresh"' not in page


def test_names_are_text(run: Run) -> None:
    name = "</script><img src=x>&'"
    run.dataset = replace(run.dataset, class_names=("background", name, "disc"))
    run.config = replace(run.config, name=name)
    with run.watch() as followed:
        run.run(followed)
    elements = Elements((run.root / PAGE).read_text(encoding="utf-8"))
    assert elements.text.count(name) >= 3
    assert "x" not in [a.get("src") for tag, a in elements.found if tag == "img"]
    assert len([tag for tag, _ in elements.found if tag == "script"]) == 0


def test_warnings_name_the_classes_that_stay_at_zero(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with run.watch() as followed:
        run.run(followed)
    lines = [line for line in capsys.readouterr().err.splitlines() if "check its image-level labels" in line]
    shows_disc = sum(2 in item.classes for item in run.dataset.train_images)
    assert [line.split(":")[0] + ":" + line.split(":")[1] for line in lines] == [
        f"pseudo-masks: no pixel of disc in the {shows_disc} images that show it",
        "segmenter: the IoU of disc on val stays at 0",
        "segmenter-val: the IoU of disc is 0",
    ]


def test_val_is_measured_as_val_every_says(run: Run) -> None:
    measured = []

    def measure() -> Mapping[str, Any]:
        measured.append(1)
        return {"miou": 1.0, "iou": [1.0, 1.0, 1.0]}

    for every, times in ((0, 0), (1, 4), (3, 1)):
        measured.clear()
        run.config = replace(run.config, val_every=every)
        followed = run.watch()
        followed.started("segmenter", run.root / "segmenter-0123456789")
        for number in (1, 2, 3, 4):
            followed.epoch(epoch(number), None, measure)
        assert len(measured) == times


def test_what_fails_is_said_once_and_stops_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def gone(*arguments: object) -> None:
        calls.append(arguments)
        raise ConnectionError("no route to host")

    calls: list[object] = []
    monkeypatch.setattr(watch, "write_train_page", full)
    monkeypatch.setattr(watch, "open_tracker", lambda name, *_: (gone, gone) if name == "mlflow" else full())
    run.config = replace(run.config, trackers=("mlflow", "wandb"))
    with run.watch() as followed:
        run.run(followed)
    messages = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert [line.partition(": ")[0] for line in messages] == ["tracker wandb", PAGE, "tracker mlflow"]
    assert "ConnectionError: no route to host); the training goes on without it" in messages[2]
    assert len(calls) == 1  # a server that does not answer would cost time at every epoch
    assert len(list(run.root.glob("*/stage.json"))) == 6 and rows_of(run.root / METRICS)


def test_metrics_that_cannot_be_written_stop_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.root / METRICS).mkdir(parents=True)
    with run.watch() as followed:
        run.run(followed)
    assert capsys.readouterr().err.count("metrics.csv: failed") == 1
    assert "finished" in (run.root / PAGE).read_text(encoding="utf-8")


def test_time_left_follows_the_estimate_and_what_was_measured(run: Run) -> None:
    followed = run.watch()
    assert followed.seconds_left() == 600
    assert followed.head_line() == (
        "tiny on 2 CPU cores, fp32: 8 images to train on, 4 in val, foreground classes: 2 (square, disc); "
        "6 of 6 stages left, about 10 min in all"
    )
    folder = run.root / "cam-0123456789"
    followed.started("cam", folder)
    followed.epoch(epoch(1))
    assert followed.seconds_left() == pytest.approx(500 + 3 * 3.0)
    followed.finished(watch.Stage("cam", folder, "", {}, seconds=200.0), skipped=False)
    assert followed.seconds_left() == 2 * 500  # twice as slow as estimated
    run.plan = replace(run.plan, seconds=dict.fromkeys(run.plan.seconds, 0.0), done=frozenset({"cam"}))
    assert run.watch().seconds_left() is None
    assert run.watch().head_line().endswith("; 5 of 6 stages left")


def test_maps_are_drawn_in_the_colours_of_their_classes() -> None:
    rgb = np.full((8, 8, 3), 100, np.uint8)
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0, :, :4] = 1
    drawn = overlay_maps(rgb, maps, (1, 2))
    assert (drawn[:, 6:] == 100).all() and (drawn[:, 1] != 100).any()
    assert np.array_equal(overlay_maps(rgb, maps[:0], ()), rgb)


def test_a_tracker_that_is_not_installed_is_an_error(voc_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "mlflow" else object())
    arguments = ["train", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(root_command, [*arguments, "--track", "tensorboard, mlflow"])
    assert result.exit_code == 5 and not (tmp_path / "run").exists()
    assert "error: tracker 'mlflow': the package mlflow is not installed: pip install mlflow, or leave" in result.stderr
    result = CliRunner().invoke(root_command, [*arguments, "--track", "clearml"])
    assert result.exit_code == 2 and "trackers[0]: got str 'clearml', expected one of 'tensorboard'" in result.stderr


def test_tensorboard_reads_its_event_files(run: Run) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    run.config = replace(run.config, trackers=("tensorboard",))
    for _ in range(2):  # a resumed run adds nothing
        with run.watch() as followed:
            run.run(followed)
    (folder,) = (run.root / "tensorboard").iterdir()
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("cam/loss")] == [(10, 0.5), (20, 0.25)]
    assert [event.step for event in events.Scalars("segmenter/val_miou")] == [10, 20, 30]


@pytest.mark.parametrize("settings", [["paper_rows=false"], ["more_seeds=[3]", "relabel.rounds=1"]])
def test_an_estimate_is_made_once_and_only_for_long_trainings(
    voc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    dataset, calls = read_dataset(voc_folder), []
    config = load_config(str(TINY), settings)
    names = planned_stages(config, dataset)

    def estimate(*arguments: object) -> object:
        calls.append(arguments)
        return Estimate(1.0, 1, "2 CPU cores", dict.fromkeys(names, 2.0))

    monkeypatch.setattr(pipeline, "estimate_training", estimate)
    report = pipeline.check_dataset(dataset)
    small = plan_run(config, dataset, tmp_path / "small", report)
    assert tuple(small.seconds) == names and not any(small.seconds.values()) and not calls
    monkeypatch.setattr(pipeline, "LEAST_SAMPLES", 1)
    first = plan_run(config, dataset, tmp_path, report)
    write_json_atomically(tmp_path / "cam-0123456789" / "stage.json", {})
    same = plan_run(replace(config, val_every=3, trackers=("wandb",)), dataset, tmp_path, report)
    assert len(calls) == 1 and set(first.seconds.values()) == {2.0} and same.seconds == first.seconds
    assert first.done == frozenset() and same.done == {"cam"}
    other = plan_run(replace(config, seed=9), dataset, tmp_path, report)
    assert len(calls) == 2 and other.done == frozenset() and other.identity != first.identity


def checkpoint_digest(run: RunRecord, folder: Path) -> str:
    return hashlib.sha256((run.folder(folder, "segmenter") / "checkpoint.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_plan_names_the_stages_of_the_run(tiny_run: Path, voc_folder: Path) -> None:
    run = load_run(tiny_run)
    assert set(planned_stages(run.config, read_dataset(voc_folder))) == {stage.name for stage in run.stages}


@pytest.mark.slow
def test_measuring_while_training_changes_no_weight(tiny_run: Path, voc_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = load_run(folder)
    for path in folder.glob("segmenter-*"):
        shutil.rmtree(path)
    (folder / METRICS).unlink()
    after = train(replace(before.config, val_every=1), read_dataset(voc_folder), folder)
    assert checkpoint_digest(after, folder) == checkpoint_digest(before, tiny_run)
    assert after.rows == before.rows
    measured = [float(row["value"]) for row in rows_of(folder / METRICS) if row["metric"] == "val_miou"]
    assert len(measured) == 2 and measured[-1] == pytest.approx(after.rows[-1].miou, abs=0.01)


@pytest.mark.slow
def test_a_killed_run_leaves_a_valid_page_and_metrics(tiny_run: Path, voc_folder: Path, tmp_path: Path) -> None:
    """Only the segmenter, which has another setting, is trained."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for name in (METRICS, PAGE, "run.json"):
        (folder / name).unlink()
    arguments = ["train", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(folder)]
    arguments += ["--set", "segmenter.schedule.epochs=3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "multisa.runtime.cli.main", *arguments],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not ((folder / METRICS).is_file() and any(row["metric"] == "loss" for row in rows_of(folder / METRICS))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    listed = CliRunner().invoke(root_command, ["runs", str(folder)]).stdout
    refused = CliRunner().invoke(root_command, ["runs", "clean", str(folder), "--yes"])
    os.killpg(process.pid, signal.SIGKILL)  # its loading processes too
    process.wait()
    assert "running" in listed and refused.exit_code == 2 and "a training is running in this folder" in refused.stderr
    early = rows_of(folder / METRICS)
    assert "loss" in [row["metric"] for row in early]
    assert "running" in Elements((folder / PAGE).read_text(encoding="utf-8")).text
    assert "unfinished" in CliRunner().invoke(root_command, ["runs", str(folder)]).stdout
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 0, result.output
    rows, keys = rows_of(folder / METRICS), keys_of(folder / METRICS)
    assert rows[: len(early)] == early and len(set(keys)) == len(keys)
    epochs = [row["epoch"] for row in rows if row["metric"] == "loss" and row["stage"].startswith("segmenter-")]
    assert epochs == ["1", "2", "3"]
    assert "finished" in Elements((folder / PAGE).read_text(encoding="utf-8")).text
    assert f"next: multisa export {folder} --data {voc_folder} -o bundles/tiny" in result.stdout
    assert "minutes in total: " in result.stdout and (folder / PLAN).is_file()
