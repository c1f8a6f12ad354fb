"""Labels without ground truth: Yen's criterion, rounds in which a segmenter labels again, the supervised bound."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multisa.runtime.errors import DatasetError
from multisa.runtime.imaging.decode import read_mask
from multisa.training import pipeline, stages
from multisa.training.augment import AugmentedImages
from multisa.training.balance import background_ratio
from multisa.training.config import AFFINITY_MARGIN, AffinityLabelConfig, Schedule, TrainConfig, load_config
from multisa.training.data import Item, read_dataset, read_working_image
from multisa.training.data_check import check_dataset
from multisa.training.estimate import estimate_training
from multisa.training.inference import load_maps, save_maps
from multisa.training.pipeline import train
from multisa.training.run_record import SEGMENTER, SUPERVISED, RunRecord, load_run
from multisa.training.stage_cache import Stage
from multisa.training.stage_functions import relabel
from multisa.training.thresholds import SCORE_BINS, around, score_masks, strongest_scores, yen_scores, yen_threshold

TINY = Path(__file__).with_name("tiny.toml")


def correlation(counts: np.ndarray, threshold: int) -> float:
    """Yen's criterion, written out: the entropic correlation of the bins on both sides of a threshold."""
    total = 0.0
    for side in (counts[:threshold], counts[threshold:]):
        if not side.any():
            return -np.inf
        shares = side / side.sum()
        total -= float(np.log((shares**2).sum()))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_yen_is_the_best_of_all_thresholds(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 20, 40) * (random.random(40) < 0.7)
    best = max(correlation(counts, threshold) for threshold in range(1, 40))
    # The middle of equally good thresholds can lie halfway between two bins.
    found = int(yen_threshold(counts) * 40 + 0.1)
    assert correlation(counts, found) == pytest.approx(best)


def test_yen_lies_between_two_modes() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(0.2, 0.05, 30_000), random.normal(0.7, 0.08, 10_000)]).clip(0, 0.999)
    counts = np.bincount((values * SCORE_BINS).astype(int), minlength=SCORE_BINS)
    assert 0.25 < yen_threshold(counts) < 0.5
    # Between two separate values every threshold is as good as another: the middle is taken.
    two = np.zeros(100, np.int64)
    two[[20, 69]] = 5, 1
    assert yen_threshold(two) == 0.45


def test_scores_of_the_strongest_class_give_a_background_score_for_each_class(tmp_path: Path) -> None:
    """Class 1 reaches high scores, class 2 only low ones, class 3 occurs nowhere."""
    maps = np.zeros((2, 4, 10), np.float32)
    maps[0, :2], maps[0, :2, :5] = 0.2, 0.9
    maps[1, 2:], maps[1, 2:, :5] = 0.1, 0.4
    save_maps(tmp_path / "both.npy", maps)
    save_maps(tmp_path / "none.npy", maps[:0])
    items = (Item("both", tmp_path, (1, 2), None), Item("none", tmp_path, (), None))
    counts = strongest_scores(tmp_path, items, 4)
    assert counts.sum(1).tolist() == [0, 20, 20, 0]
    found = yen_scores(tmp_path, items, 4)
    assert found["classes"] == [pytest.approx(0.55, abs=0.01), pytest.approx(0.25, abs=0.01), None]
    assert 0.2 < found["background"] < 0.9
    with pytest.raises(DatasetError, match="no image of the train list has a class"):
        yen_scores(tmp_path, items[1:], 4)


def test_affinity_thresholds_lie_around_the_background_score() -> None:
    config = AffinityLabelConfig(confidence=0.6)
    made = around(0.3, config)
    assert (made.foreground, made.background) == (round(0.3 + AFFINITY_MARGIN, 3), round(0.3 - AFFINITY_MARGIN, 3))
    assert made.confidence == 0.6
    for extreme in (0.005, 0.995):
        made = around(extreme, config)
        assert made.foreground is not None and made.background is not None
        assert 0 < made.background < extreme < made.foreground < 1


def test_the_truth_is_the_masks_of_the_items(voc_folder: Path) -> None:
    items, schedule = read_dataset(voc_folder).train, Schedule(crop=64, resize=(48, 128))
    truth, masks = (
        AugmentedImages(items, schedule, TrainConfig(), n_classes=3, **target)
        for target in ({"truth": True}, {"masks": voc_folder / "SegmentationClass"})
    )
    for index in range(len(items)):
        assert (truth[index][1] == masks[index][1]).all()


def config_of_rounds() -> TrainConfig:
    """Everything that tiny.toml leaves out: Yen's criterion, two rounds, the supervised bound."""
    overrides = [
        "background_from=yen",
        "supervised=true",
        "more_seeds=[3]",
        "relabel.rounds=2",
        "relabel.teacher.start_from_cam=true",
        "segmenter.schedule.ema=0.9",
        "segmenter.schedule.colour_jitter=0.2",
        "segmenter.schedule.frozen_levels=1",
    ]
    config = load_config(str(TINY), overrides)
    return replace(config, affinity_labels=replace(config.affinity_labels, foreground=None, background=None))


@pytest.fixture(scope="module")
def rounds(tiny_run: Path, voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """A run with two rounds, interrupted in the second and resumed."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("rounds") / "run"))
    config, dataset = config_of_rounds(), read_dataset(voc_folder)
    with pytest.MonkeyPatch.context() as patch:
        relabel, calls = stages.relabel, []

        def interrupted(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return relabel(*arguments)  # type: ignore[arg-type]

        patch.setattr(stages, "relabel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, folder)
    made = stage_times(folder)
    run = train(config, dataset, folder)
    assert {path: stage_times(folder)[path] for path in made} == made
    return folder, run


def stage_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/stage.json")}


def stored(folder: Path, run: RunRecord, name: str) -> dict[str, dict[str, object]]:
    record: dict[str, dict[str, object]] = json.loads((run.folder(folder, name) / "stage.json").read_text())
    return record


@pytest.mark.slow
def test_every_round_has_a_row_and_finished_stages_are_skipped(
    rounds: tuple[Path, RunRecord], voc_folder: Path
) -> None:
    folder, run = rounds
    names = [row.stage.split(" (")[0] for row in run.rows]
    expected = ["CAM, k = 0", "Multi-SA CAM", "+ random walk", "+ dense CRF", "+ dense CRF, no mask used"]
    other = [f"{SEGMENTER}, seed 3", f"{SUPERVISED}, seed 3"]
    assert names == [*expected, "+ round 1", "+ round 2", SEGMENTER, SUPERVISED, *other]
    assert [row.measured_on for row in run.rows] == ["train"] * 7 + ["val"] * 4
    before = stage_times(folder)
    assert train(config_of_rounds(), read_dataset(voc_folder), folder) == run == load_run(folder)
    assert stage_times(folder) == before


@pytest.mark.slow
def test_seeds_share_everything_but_the_segmenters(rounds: tuple[Path, RunRecord]) -> None:
    folder, run = rounds
    names = [stage.name for stage in run.stages]
    assert len(names) == len(set(names)) and names.count("cam") == names.count("teacher-1") == 1
    for name in ("segmenter", "supervised"):
        first, second = (stored(folder, run, f"{name}{suffix}") for suffix in ("", "-seed-3"))
        assert (first["inputs"].pop("seed"), second["inputs"].pop("seed")) == (0, 3)
        assert first["inputs"] == second["inputs"]
        assert first["results"]["losses"] != second["results"]["losses"]


@pytest.mark.slow
def test_labels_of_a_round_are_balanced_by_what_its_teacher_learned_from(
    rounds: tuple[Path, RunRecord], voc_folder: Path, tmp_path: Path
) -> None:
    folder, run = rounds
    names = ("pseudo-masks", "relabelled-1", "relabelled-2")
    ratios = [stored(folder, run, f"{name}-balance")["results"]["background_ratio"] for name in names]
    labels = [stored(folder, run, f"relabelled-{number}")["inputs"]["label"] for number in (1, 2)]
    assert [label["background_ratio"] for label in labels] == ratios[:2]  # type: ignore[index]
    assert run.segmenter_label.background_ratio == ratios[2]
    dataset = read_dataset(voc_folder)
    items = dataset.train_images
    # The same teacher with another ratio leaves more to the background.
    again = tmp_path / "again"
    again.mkdir()
    teacher = Stage("teacher-1", run.folder(folder, "teacher-1"), "")
    parameters = replace(run.segmenter_label, background_ratio=ratios[0] / 4)
    relabel(run.config.relabel.teacher, parameters, run.config, dataset, teacher, again)
    behind = [
        sum(load_maps(made / f"{item.id}.npy")[0].sum() for item in items)
        for made in (again, run.folder(folder, "relabelled-1"))
    ]
    assert behind[0] > behind[1]
    assert ratios[0] == background_ratio(run.folder(folder, "pseudo-masks"), items, soft=False) != 1
    assert ratios[2] == background_ratio(run.folder(folder, "relabelled-2"), items, soft=True) != 1


@pytest.mark.slow
def test_labels_of_a_round_keep_to_the_classes_of_the_image(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    folder, run = rounds
    dataset = read_dataset(voc_folder)
    for name in ("relabelled-1", "relabelled-2"):
        stage = run.folder(folder, name)
        for item in dataset.train_images:
            assert item.mask is not None
            mask, targets = read_mask(stage / f"{item.id}.png"), load_maps(stage / f"{item.id}.npy")
            assert mask.shape == read_working_image(item.image, run.config.long_side).shape[:2]
            assert set(np.unique(mask)) <= {0, *item.classes}
            assert targets.shape == (1 + len(item.classes), -(-mask.shape[0] // 4), -(-mask.shape[1] // 4))
            assert targets.min() >= 0 and np.allclose(targets.sum(0), 1, atol=2e-3)
    scores = score_masks(run.folder(folder, "relabelled-2"), dataset.train, 3)
    assert run.rows[6].miou == scores["miou"]


@pytest.mark.slow
def test_a_changed_label_of_a_round_is_made_again(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    folder, run = rounds
    path = run.folder(folder, "relabelled-1") / "photo_03.npy"
    before = path.read_bytes()
    path.write_bytes(before[:-4])
    assert train(config_of_rounds(), read_dataset(voc_folder), folder, discard_edits=True).rows == run.rows
    assert path.read_bytes() == before


@pytest.mark.slow
def test_thresholds_come_from_the_maps_and_not_from_masks(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    folder, run = rounds
    items = read_dataset(voc_folder).train_images
    cams, walked = (yen_scores(run.folder(folder, name), items, 3) for name in ("cam-maps", "walk"))
    used = stored(folder, run, "affinity-labels")["inputs"]
    expected = around(cams["background"], run.config.affinity_labels)
    assert (used["foreground"], used["background"]) == (expected.foreground, expected.background)
    assert stored(folder, run, "walk-yen")["results"] == walked
    assert run.label.background == walked["background"]
    gains = [1 if score is None else walked["background"] / score for score in walked["classes"]]
    assert run.label.class_gain == pytest.approx(gains, abs=5e-4)


@pytest.mark.slow
def test_rounds_and_the_supervised_segmenter_are_estimated(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    folder, run = rounds
    config, dataset = config_of_rounds(), read_dataset(voc_folder)
    sizes = check_dataset(dataset).sizes
    whole = estimate_training(config, dataset, sizes)
    plain = estimate_training(
        replace(config, supervised=False, more_seeds=(), relabel=load_config(str(TINY)).relabel), dataset, sizes
    )
    assert whole is not None and plain is not None
    written = {
        stage.name: sum(path.stat().st_size for path in (folder / stage.folder).iterdir()) for stage in run.stages
    }
    assert whole.disk_bytes == pytest.approx(sum(written.values()), rel=0.03)
    more = sum(
        size
        for name, size in written.items()
        if name.startswith(("teacher", "relabelled", "supervised", "segmenter-seed"))
    )
    assert whole.disk_bytes - plain.disk_bytes == pytest.approx(more, rel=0.05)


@pytest.mark.slow
def test_the_plan_names_every_round(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    run = rounds[1]
    assert set(stages.planned_stages(run.config, read_dataset(voc_folder))) == {stage.name for stage in run.stages}


@pytest.mark.slow
def test_without_masks_the_labels_are_the_same(rounds: tuple[Path, RunRecord], voc_folder: Path) -> None:
    """Masks of the data set only measure: a run that has none finds the labels already made."""
    folder, run = rounds
    dataset = replace(read_dataset(voc_folder), train=(), val=())
    plain = pipeline.run_stages(config_of_rounds(), dataset, folder)
    assert plain.rows == () and plain.label == run.label
    for name in ("pseudo-masks", "relabelled-2", "segmenter"):
        assert plain.folder(folder, name) == run.folder(folder, name)
