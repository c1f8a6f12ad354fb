"""The paper's tables from a small run: figures beside the paper's, stages reused, resumed, refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import DatasetError, UsageError
from multisa.training import stages
from multisa.training.commands import PAPER_ITEMS
from multisa.training.config import load_config
from multisa.training.data import VOC_CLASSES, read_dataset
from multisa.training.reproduce import paper
from multisa.training.reproduce.command import reproduce_paper
from multisa.training.reproduce.figures import FIGURES
from multisa.training.reproduce.tables import TABLES, attention_counts, per_class_rows, protocol, reproduce_table
from multisa.training.run_record import (
    AS_CONFIGURED,
    DENSE_CRF,
    MULTI_SA_CAM,
    PLAIN_CAM,
    RANDOM_WALK,
    SEGMENTER,
    SUPERVISED,
    WITH_GAINS,
    WITHOUT_CRF,
    WITHOUT_TRUTH,
    Row,
    load_run,
)

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture
def run_folder(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def stage_folders(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/stage.json")}


def written(root: Path, name: str) -> dict[str, object]:
    made: dict[str, object] = json.loads((root / "reproduce" / f"{name}.json").read_text())
    return made


def test_the_papers_figures_agree_with_each_other() -> None:
    assert paper.TABLE3.keys() == paper.TABLE3_MIOU.keys()
    for method, figures in paper.TABLE3.items():
        # The paper prints one decimal, sometimes cut and sometimes rounded.
        assert abs(sum(figures) / paper.CLASSES - paper.TABLE3_MIOU[method]) < 0.06, method
    assert list(paper.TABLE2) == [PLAIN_CAM, MULTI_SA_CAM, RANDOM_WALK, DENSE_CRF]


def test_classes_are_matched_by_any_spelling() -> None:
    assert tuple(map(paper.paper_class, VOC_CLASSES)) == paper.TABLE3_CLASSES
    coco = ("airplane", "dining table", "Potted-Plant", "couch", "tv", "motorcycle", "bicycle")
    expected = ["aero", "table", "plant", "sofa", "tv", "mbk", "bike"]
    assert list(map(paper.paper_class, coco)) == expected
    assert paper.paper_class("zebra") is None and paper.table3_figure("SEAM", "zebra") is None
    assert paper.table3_figure("SEAM", "person") == 75.2


def test_only_classes_of_both_are_compared() -> None:
    val = Row("DeepLabV3+", "val", 40.0, (90.0, 60.0, 10.0, None))
    *classes, means, own = per_class_rows(("background", "tv monitor", "zebra", "cow"), val)
    assert [row.paper for row in classes] == [89.6, 41.0, None, 87.1]
    assert [row.difference for row in classes] == [0.4, 19.0, None, None]
    assert (means.ours, means.paper) == (75.0, 65.3)
    assert means.other_methods[0] == round((90.0 + 52.9) / 2, 2)
    assert (own.ours, own.paper, own.difference) == (40.0, 69.7, None)


def test_with_the_papers_classes_its_own_mean_stands_beside_ours() -> None:
    val = Row("DeepLabV3+", "val", 70.5, tuple(float(i) for i in range(21)))
    rows = per_class_rows(VOC_CLASSES, val)
    assert len(rows) == 22
    assert (rows[-1].paper, rows[-1].difference) == (69.7, 0.8)


def test_the_supervised_segmenter_stands_beside_ours() -> None:
    val = Row(SEGMENTER, "val", 40.0, (90.0, 60.0, 10.0, None))
    bound = Row(SUPERVISED, "val", 50.0, (92.0, 70.0, 20.0, None))
    rows = per_class_rows(("background", "tv monitor", "zebra", "cow"), val, bound)
    assert [row.supervised for row in rows] == [92.0, 70.0, 20.0, None, 81.0, 50.0]
    assert [row.ours for row in rows[-2:]] == [75.0, 40.0]


def test_differences_from_the_paper_are_noted(voc_folder: Path) -> None:
    dataset, config = read_dataset(voc_folder), load_config("paper-resnest101")
    others = replace(dataset, class_names=VOC_CLASSES)
    assert "its classes and images are different" in protocol(config, dataset, "val", "ResNeSt-101")[-1]
    assert "its images are different" in protocol(config, others, "val", "ResNeSt-101")[-1]
    assert "its backbone and images are" in protocol(config, others, "train", "ResNet-50")[-1]
    alike = replace(others, train_images=dataset.train_images[:1] * paper.TRAINED_ON, val=dataset.val[:1] * paper.VAL)
    assert not any("comparison" in note for note in protocol(config, alike, "val", "ResNeSt-101"))


def test_table1_trains_what_is_missing_and_resumes(
    voc_folder: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    before = stage_folders(run_folder)
    train, trained_taps = stages.train_cam, []

    def train_or_stop(cam, *rest, **options):  # type: ignore[no-untyped-def]
        if len(trained_taps) == 1:
            raise KeyboardInterrupt
        trained_taps.append(cam.taps)
        return train(cam, *rest, **options)

    monkeypatch.setattr(stages, "train_cam", train_or_stop)
    with pytest.raises(KeyboardInterrupt):
        reproduce_table("table1", config, dataset, run_folder)
    assert trained_taps == [(4,)]  # the run has trained the CAM without attention
    trained_taps.append(())
    table = reproduce_table("table1", config, dataset, run_folder)
    assert trained_taps == [(4,), (), (3, 4)]
    assert [row.paper for row in table.rows] == [46.30, 47.60, 47.01, 47.93]
    names = [row.name for row in table.rows]
    assert names == ["CAM without SA", "1 SA (level 4)", "2 SAs (levels 3, 4)", "3 SAs (levels 2, 3, 4)"]
    run = load_run(run_folder)
    assert (table.rows[0].ours, table.rows[3].ours) == (run.rows[0].miou, run.rows[1].miou)
    new = sorted(name.rsplit("-", 1)[0] for name in stage_folders(run_folder) - before)
    made = ["cam-baseline", "cam-baseline-maps", "cam-baseline-maps-measured"]
    assert new == sorted(2 * made)
    record = written(run_folder, "table1")
    rows = record["rows"]
    assert isinstance(rows, list) and rows[2]["difference"] == round(rows[2]["ours"] - 47.01, 2)
    assert rows[0]["iou"].keys() == {"background", "square", "disc"}
    notes = record["notes"]
    assert isinstance(notes, list) and any("seed 0" in note for note in notes)


def test_taps_are_counted_from_the_deepest() -> None:
    assert attention_counts((1, 3, 4)) == [(), (4,), (3, 4), (1, 3, 4)]


def test_tables_of_a_finished_run_make_no_stage(voc_folder: Path, run_folder: Path) -> None:
    config, dataset, run = load_config(str(TINY)), read_dataset(voc_folder), load_run(run_folder)
    before = stage_folders(run_folder)
    second, third = (reproduce_table(name, config, dataset, run_folder) for name in ("table2", "table3"))
    assert stage_folders(run_folder) == before
    assert [row.ours for row in second.rows] == [row.miou for row in run.rows[:4]]
    assert [row.paper for row in second.rows] == [50.64, 51.49, 67.54, 68.07]
    assert [row.ours for row in third.rows[:3]] == list(run.rows[-1].iou)
    assert [row.paper for row in third.rows[:3]] == [89.6, None, None]
    markdown = (run_folder / "reproduce" / "table2.md").read_text().splitlines()
    assert f"| + dense CRF | {run.label.background:.2f} | {run.rows[3].miou:.2f} | 68.07 |" in "".join(markdown)


def test_other_settings_leave_the_record_of_the_run(voc_folder: Path, run_folder: Path) -> None:
    dataset, kept = read_dataset(voc_folder), (run_folder / "run.json").read_bytes()
    reproduce_table("table3", load_config(str(TINY), ["name=other"]), dataset, run_folder)
    assert (run_folder / "run.json").read_bytes() == kept
    beside = run_folder / "reproduce"
    assert load_run(beside).config.name == "other"
    (beside / "run.json").unlink()
    reproduce_table("table3", load_config(str(TINY)), dataset, run_folder)
    assert not (beside / "run.json").exists()


@pytest.mark.parametrize(
    ("overrides", "name", "note"),
    [
        (["background_from=config"], AS_CONFIGURED, "are those of the settings"),
        (["background_from=yen"], WITHOUT_TRUTH, "come from Yen's criterion"),
        (["background_from=yen", "label.use_crf=false"], WITHOUT_CRF, "come from Yen's criterion"),
        (["label.class_gain=[1.0, 0.9]"], WITH_GAINS, "the gains of classes are those of the settings"),
    ],
)
def test_table2_keeps_the_papers_protocol_beside_other_masks(
    voc_folder: Path, run_folder: Path, overrides: list[str], name: str, note: str
) -> None:
    plain = reproduce_table("table2", load_config(str(TINY)), read_dataset(voc_folder), run_folder)
    config = load_config(str(TINY), [*overrides, "paper_rows=false"])
    table = reproduce_table("table2", config, read_dataset(voc_folder), run_folder)
    assert [(row.name, row.ours) for row in table.rows[:4]] == [(row.name, row.ours) for row in plain.rows]
    assert [row.name for row in table.rows[4:]] == [f"{name} (ours)"]
    assert table.rows[4].paper is None and table.notes[: len(plain.notes)] == plain.notes
    assert note in table.notes[-2] and table.notes[-1] == "The segmenter trains on the last row."


def test_tables_show_rounds_and_the_supervised_segmenter(voc_folder: Path, run_folder: Path) -> None:
    config, dataset = load_config(str(TINY), ["relabel.rounds=1", "supervised=true"]), read_dataset(voc_folder)
    third = reproduce_table("table3", config, dataset, run_folder)
    before = stage_folders(run_folder)
    second = reproduce_table("table2", config, dataset, run_folder)
    assert stage_folders(run_folder) == before
    run = load_run(run_folder / "reproduce")
    assert second.rows[-1].name == "+ round 1 (ours)" and second.rows[-1].background is None
    assert second.rows[-1].ours == run.rows[-3].miou
    assert [row.supervised for row in third.rows[:3]] == list(run.rows[-1].iou)
    header = (run_folder / "reproduce" / "table3.md").read_text().splitlines()[2]
    assert header.startswith("| class | ours | supervised | paper (Multi-SA) |")
    record = written(run_folder, "table3")["rows"]
    assert isinstance(record, list) and record[0]["supervised"] == third.rows[0].supervised
    assert any(note.startswith("Supervised: ") and "6 train images" in note for note in third.notes)


@pytest.mark.parametrize("name", TABLES)
def test_tables_without_masks_are_refused_before_any_training(voc_folder: Path, tmp_path: Path, name: str) -> None:
    dataset = replace(read_dataset(voc_folder), train=(), val=())
    with pytest.raises(DatasetError, match=f"has a mask, but {name} needs masks; expected a VOC layout"):
        reproduce_table(name, load_config(str(TINY)), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["table1", "figure4"])
def test_without_attention_there_is_no_number_of_it(voc_folder: Path, tmp_path: Path, name: str) -> None:
    config = load_config(str(TINY), ["cam.taps=[]"])
    with pytest.raises(UsageError, match="expected at least one level"):
        reproduce_paper(name, config, read_dataset(voc_folder), tmp_path)


def test_the_command_prints_ours_beside_the_papers(voc_folder: Path, run_folder: Path) -> None:
    arguments = ["reproduce", "table2", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(run_folder)]
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()[2:7]
    assert header.split() == ["stage", "background", "ours", "paper", "difference"]
    assert [row.split()[-2] for row in rows] == ["50.64", "51.49", "67.54", "68.07"]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert "other settings" not in result.stderr
    result = CliRunner().invoke(root_command, [*arguments, "--set", "label.walk_steps=8"])
    assert result.exit_code == 0, result.output
    assert "label.walk_steps 8 (there: 16)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--num-images", "3"], "expected a figure"),
        (["figure6", "--num-images", "3", "--list", "ids.txt"], "got both"),
        (["figure6", "--num-images", "0"], "got 0 images, expected 1..32"),
        (["figure5", "--list", "nowhere.txt"], "nowhere.txt: not found"),
        (["figure7"], "'figure7' is not one of 'table1', 'table2'"),
    ],
)
def test_command_errors(voc_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    rest = ["--data", str(voc_folder), "--preset", str(TINY), "-o", str(tmp_path)]
    result = CliRunner().invoke(root_command, ["reproduce", *arguments, *rest])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_knows_every_table_and_figure() -> None:
    assert (*TABLES, *FIGURES) == PAPER_ITEMS
