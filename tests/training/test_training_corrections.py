"""Corrections: every mask is used or named, stages learn from them and no other stage runs again; edits are kept."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from multisa.export.bundle import ExportOptions, export_bundle
from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import DatasetError, UsageError
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.review import FORMAT
from multisa.runtime.writers.base import row_runs
from multisa.runtime.writers.label_studio import encode_label_studio_rle
from multisa.training.annotations.base import MaskFile
from multisa.training.balance import background_ratio
from multisa.training.config import load_config
from multisa.training.corrections import add_corrections
from multisa.training.data import Dataset, Item, read_dataset
from multisa.training.inference import load_maps
from multisa.training.pipeline import train
from multisa.training.run_record import load_run
from multisa.training.segmenter import soft_segmentation_loss
from multisa.training.stage_cache import StageCache
from multisa.training.stage_functions import one_hot_targets
from multisa.training.thresholds import score_masks

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture
def dataset(voc_folder: Path) -> Dataset:
    return read_dataset(voc_folder, quiet=True)


def write(folder: Path, name: str, mask: np.ndarray) -> Path:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)
    return path


def truth(voc_folder: Path, name: str) -> np.ndarray:
    return read_mask(voc_folder / "SegmentationClass" / f"{name}.png")


def findings(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {finding.text: finding.names for finding in dataset.findings}


def test_without_corrections_the_data_set_is_the_same_object(dataset: Dataset) -> None:
    assert add_corrections(dataset) is dataset
    assert dataset.corrections_input(dataset.train_images) == {}


def test_every_correction_is_used_or_named(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "corrections"
    write(masks, "photo_00", truth(voc_folder, "photo_00"))
    write(masks, "JPEGImages/photo_01", truth(voc_folder, "photo_01"))  # as `multisa review` names it
    write(masks, "photo_09", truth(voc_folder, "photo_09"))  # of val
    write(masks, "photo_77", truth(voc_folder, "photo_00"))
    write(masks, ".trash/photo_02", truth(voc_folder, "photo_02"))
    (masks / "notes.md").write_text("mine")
    added = add_corrections(dataset, masks)
    assert set(added.corrections) == {"photo_00", "photo_01"}
    assert findings(added) == {
        **findings(dataset),
        "2 of 8 images to train on corrected by corrections": ("photo_00", "photo_01"),
        "1 correction matched by file name": ("JPEGImages/photo_01 for photo_01",),
        "1 correction of val images, not used: val only measures": ("photo_09",),
        "1 correction of no image to train on, not used": ("photo_77",),
        "2 files of corrections other than masks (PNG), not used": (".trash/photo_02.png", "notes.md"),
    }
    assert [finding.names[0] for finding in added.findings if finding.is_warning] == ["photo_09", "photo_77"]
    item = dataset.train_images[0]
    assert np.array_equal(added.corrected_mask(item, (96, 96)), truth(voc_folder, "photo_00"))
    assert added.corrected_mask(dataset.train_images[5], (96, 96)) is None


def test_classes_of_a_correction_become_labels(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    both = truth(voc_folder, "photo_00")
    both[:5] = 2  # photo_00 shows class 1 alone
    write(tmp_path, "photo_00", both)
    write(tmp_path, "photo_02", np.where(truth(voc_folder, "photo_02") == 1, 255, truth(voc_folder, "photo_02")))
    added = add_corrections(dataset, tmp_path)
    classes = {item.id: item.classes for item in added.train_images}
    assert classes["photo_00"] == (1, 2) and classes["photo_02"] == (1, 2) and classes["photo_03"] == (1,)
    assert {item.id: item.classes for item in added.train}["photo_00"] == (1, 2)
    assert findings(added)["1 image given a class of the correction that the labels lack"] == ("photo_00 (disc)",)
    assert findings(added)["1 correction without a class that the labels name"] == ("photo_02 (square)",)
    assert added.train_images_digest() != dataset.train_images_digest()


def test_a_correction_of_a_val_image_is_not_used_for_another_of_its_name(
    dataset: Dataset, voc_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "val").mkdir()
    image = tmp_path / "val" / "photo_00.jpg"
    shutil.copy(voc_folder / "JPEGImages" / "photo_09.jpg", image)
    (first, *_), (last, *_) = dataset.train_images, dataset.val
    same = replace(dataset, train_images=(first,), train=(), val=(replace(last, id="val__photo_00", image=image),))
    assert first.id == "photo_00"
    masks = tmp_path / "corrections"
    write(masks, "val/photo_00", truth(voc_folder, "photo_00"))
    write(masks, "elsewhere/photo_00", truth(voc_folder, "photo_00"))  # of which of the two?
    with pytest.raises(DatasetError, match=r"none of the 2 corrections is of an image to train on"):
        add_corrections(same, masks)
    write(masks, "photo_00", truth(voc_folder, "photo_00"))
    added = add_corrections(same, masks)
    assert set(added.corrections) == {"photo_00"}
    assert findings(added)["2 corrections of val images, not used: val only measures"] == (
        "elsewhere/photo_00",
        "val/photo_00",
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((96, 96), 3), r"photo_00.png: got class id 3, which is no class of the data set, expected 0..2 of"),
        (np.full((96, 95), 1), "got a mask of 95 x 96 pixels, expected 96 x 96 as its upright image photo_00.jpg"),
        (np.full((48, 48), 1), "got a mask of 48 x 48 pixels"),
        (np.full((200, 200), 1), "or these sides resized by one factor"),
        (np.full((96, 96, 3), 1), "got a mask of mode RGB, expected a palette or 8-bit grey PNG"),
    ],
)
def test_masks_that_cannot_be_used_are_errors(dataset: Dataset, tmp_path: Path, mask: np.ndarray, message: str) -> None:
    write(tmp_path, "photo_00", mask)
    (tmp_path / "photo_01.png").write_bytes(b"half a fil")
    with pytest.raises(DatasetError, match=message) as caught:
        add_corrections(dataset, tmp_path)
    assert "got 2 corrections that cannot be used" in str(caught.value) and "photo_01.png" in str(caught.value)


def test_one_image_has_one_correction(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    for name in ("photo_00", "deep/photo_00"):
        write(tmp_path, name, truth(voc_folder, "photo_00"))
    with pytest.raises(DatasetError, match="got the corrections deep/photo_00 and photo_00 of the image photo_00"):
        add_corrections(dataset, tmp_path)


def test_sources_add_up_but_not_for_one_image(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    for folder, name in (("accepted", "photo_00"), ("drawn", "photo_01"), ("again", "photo_00")):
        write(tmp_path / folder, name, truth(voc_folder, name))
    added = add_corrections(dataset, tmp_path / "accepted", tmp_path / "drawn")
    assert set(added.corrections) == {"photo_00", "photo_01"}
    with pytest.raises(DatasetError, match=r"again: got 1 correction of images that another source .* \(photo_00\)"):
        add_corrections(added, tmp_path / "again")


@pytest.mark.parametrize("names", [(), ("photo_09", "other")])
def test_a_source_without_a_use_is_an_error(dataset: Dataset, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path, name, np.zeros((96, 96)))
    with pytest.raises(DatasetError, match=r"is of an image to train on, expected names such as photo_00\.png"):
        add_corrections(dataset, tmp_path)
    with pytest.raises(DatasetError, match="not found, expected a folder of masks"):
        add_corrections(dataset, tmp_path / "nowhere")


def test_ids_are_those_of_the_classes_in_the_folder(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    """A bundle can have the same classes in another order, and others besides."""
    (tmp_path / "classes.txt").write_text("background\nDISC\nhorse\nsquare\n")
    swapped = np.array([0, 3, 1], np.uint8)[truth(voc_folder, "photo_02")]
    swapped[:3] = 255
    write(tmp_path, "photo_02", swapped)
    with pytest.raises(DatasetError, match="class"):  # names are taken as they are
        add_corrections(dataset, tmp_path)
    (tmp_path / "classes.txt").write_text("background\ndisc\nhorse\nsquare\n")
    expected = truth(voc_folder, "photo_02")
    expected[:3] = 255
    added = add_corrections(dataset, tmp_path)
    assert np.array_equal(added.corrections["photo_02"].read(), expected)
    write(tmp_path, "photo_00", np.full((96, 96), 2))
    with pytest.raises(DatasetError, match=r"got class id 2 \(horse\), which is no class of the data set"):
        add_corrections(dataset, tmp_path)


def test_digests_follow_the_masks_and_nothing_else(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    mask = truth(voc_folder, "photo_00")
    folder = tmp_path / "a"
    write(folder, "photo_00", mask)
    used = add_corrections(dataset, folder).corrections_input(dataset.train_images)
    again = add_corrections(dataset, folder.rename(tmp_path / "b"))
    assert again.corrections_input(dataset.train_images) == used and list(used) == ["corrections"]
    assert again.corrections_input(dataset.val) == {} and again.train_images_digest() == dataset.train_images_digest()
    mask[0, 0] = 255
    write(tmp_path / "b", "photo_00", mask)
    assert add_corrections(dataset, tmp_path / "b").corrections_input(dataset.train_images) != used


def test_masks_of_a_stage_are_as_large_as_the_networks_see_images(voc_folder: Path, tmp_path: Path) -> None:
    """So a corrected copy of one may be smaller than its image."""
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    with Image.open(root / "JPEGImages/photo_01.jpg") as image:
        image.resize((416, 384)).save(root / "JPEGImages/photo_01.jpg")
    write(tmp_path / "masks", "photo_01", resize_mask(truth(voc_folder, "photo_01"), (118, 128)))
    added = add_corrections(read_dataset(root), tmp_path / "masks")
    mask = added.corrected_mask(added.train_images[1], (384, 416))
    assert mask is not None and mask.shape == (384, 416) and set(np.unique(mask)) == {0, 2}


def test_soft_targets_are_one_hot_and_unknown_pixels_do_not_count() -> None:
    mask = np.zeros((10, 12), np.uint8)
    mask[:, 4:8], mask[:8, 8:] = 2, 255
    targets = one_hot_targets(mask, (1, 2))
    assert targets.shape == (3, 3, 3)
    assert set(np.unique(targets)) <= {0.0, 1.0} | set(np.unique(targets[:, :, 2]))
    assert targets[0, :, 0].tolist() == [1, 1, 1] and targets[2, :, 1].tolist() == [1, 1, 1] and not targets[1].any()
    assert targets.sum(0)[:2, 2].tolist() == [0, 0]
    logits = torch.randn(1, 3, 3, 3, requires_grad=True)
    soft_segmentation_loss(logits, torch.from_numpy(targets)[None]).backward()
    assert logits.grad is not None and not logits.grad[..., :2, 2].any() and logits.grad[..., :2].any()


def test_unknown_pixels_of_a_correction_are_not_scored(tmp_path: Path) -> None:
    ground = np.zeros((8, 8), np.uint8)
    ground[:4] = 1
    mask = ground.copy()
    mask[2:6] = 255
    item = Item("a", tmp_path / "a.jpg", (1,), MaskFile(write(tmp_path / "truth", "a", ground)))
    write(tmp_path, "a", mask)
    assert score_masks(tmp_path, (item,), 2)["miou"] == 100
    assert background_ratio(tmp_path, (item,), soft=False) == 1


def stages_of(run: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(run.glob("*/stage.json"))}


@pytest.fixture
def corrections(voc_folder: Path, tmp_path: Path) -> Path:
    """Two images, one of them with unknown pixels."""
    folder = tmp_path / "corrections"
    write(folder, "photo_00", truth(voc_folder, "photo_00"))
    partial = truth(voc_folder, "photo_02")
    partial[:, :20] = 255
    write(folder, "photo_02", partial)
    return folder


@pytest.fixture
def run_folder(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.mark.slow
def test_corrections_supervise_every_stage_that_uses_masks(
    run_folder: Path, voc_folder: Path, corrections: Path
) -> None:
    dataset = add_corrections(read_dataset(voc_folder), corrections)
    config = load_config(str(TINY), ["relabel.rounds=1"])
    plain = train(config, read_dataset(voc_folder), run_folder)
    before = stages_of(run_folder)
    corrected = train(config, dataset, run_folder)
    new = {name.rpartition("-")[0] for name in stages_of(run_folder).keys() - before.keys()}
    again = {"cam", "cam-maps", "cam-maps-measured", "cam-baseline", "cam-baseline-maps", "cam-baseline-maps-measured"}
    assert {stage.name for stage in corrected.stages} - again == new  # what is before the first mask is reused
    assert {stage.name for stage in plain.stages if stage in corrected.stages} == again
    assert load_run(run_folder).images.corrected == 2
    for item in dataset.train_images:
        mask = dataset.corrected_mask(
            item, read_mask(corrected.folder(run_folder, "pseudo-masks") / f"{item.id}.png").shape
        )
        for stage in ("affinity-labels", "pseudo-masks", "relabelled-1"):
            made = read_mask(corrected.folder(run_folder, stage) / f"{item.id}.png")
            assert mask is None or np.array_equal(made, mask), stage
        soft = load_maps(corrected.folder(run_folder, "relabelled-1") / f"{item.id}.npy")
        if mask is not None:
            assert np.allclose(soft, one_hot_targets(mask, item.classes), atol=1e-3)
    # Without them, everything is as it was.
    finished = stages_of(run_folder)
    assert replace(train(config, read_dataset(voc_folder), run_folder), seconds=plain.seconds) == plain
    assert stages_of(run_folder) == finished


@pytest.mark.slow
def test_an_edited_file_stops_the_run_and_stays(run_folder: Path, voc_folder: Path, tmp_path: Path) -> None:
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    run = load_run(run_folder)
    folder = run.folder(run_folder, "pseudo-masks")
    edited = folder / "photo_02.png"
    made = edited.read_bytes()
    write(folder, "photo_02", truth(voc_folder, "photo_02"))
    mine = edited.read_bytes()
    (folder / "photo_03.png").unlink()  # and one is missing, which alone would be made again
    words = ["train", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(run_folder)]
    result = CliRunner().invoke(root_command, words)
    assert result.exit_code == 2 and edited.read_bytes() == mine and (folder / "stage.json").exists()
    for part in (str(folder), "(photo_02.png)", "give that with --corrections", "`multisa train --discard-edits`"):
        assert part in result.stderr
    # Kept: the copy supervises, in stages of its own.
    keep = tmp_path / "keep"
    keep.mkdir()
    shutil.copy(edited, keep)
    result = CliRunner().invoke(root_command, [*words, "--corrections", str(keep)])
    assert result.exit_code == 0, result.output
    assert "1 of 8 images to train on corrected by keep: photo_02" in result.stderr
    kept = load_run(run_folder).folder(run_folder, "pseudo-masks") / "photo_02.png"
    mask = read_mask(kept)
    assert kept.parent != folder and np.array_equal(mask, resize_mask(truth(voc_folder, "photo_02"), mask.shape))
    assert edited.read_bytes() == mine
    # Dropped: the stage makes it again.
    result = CliRunner().invoke(root_command, [*words, "--discard-edits"])
    assert result.exit_code == 0, result.output
    assert edited.read_bytes() == made and (folder / "photo_03.png").exists()
    assert train(config, dataset, run_folder).rows == run.rows


def test_an_edited_checkpoint_is_told_without_talk_of_masks(tmp_path: Path) -> None:
    def work(folder: Path) -> dict[str, int]:
        (folder / "network.bin").write_bytes(b"weights")
        return {"made": 1}

    StageCache(tmp_path).stage("net", {}, [], work)
    (path,) = tmp_path.glob("net-*/network.bin")
    path.write_bytes(b"others")
    with pytest.raises(UsageError, match=r"got 1 file changed after the stage was finished \(network\.bin\)") as caught:
        StageCache(tmp_path).stage("net", {}, [], work)
    assert "--corrections" not in str(caught.value) and path.read_bytes() == b"others"
    StageCache(tmp_path, discard_edits=True).stage("net", {}, [], work)
    assert path.read_bytes() == b"weights"


@pytest.mark.slow
def test_data_check_names_corrections(voc_folder: Path, corrections: Path) -> None:
    words = ["data", "check", str(voc_folder), "--preset", str(TINY), "--corrections", str(corrections), "--json"]
    result = CliRunner().invoke(root_command, words)
    assert result.exit_code == 0, result.output
    named = {finding["text"]: finding["names"] for finding in json.loads(result.stdout)["findings"]}
    assert named["2 of 8 images to train on corrected by corrections"] == ["photo_00", "photo_02"]
    write(corrections, "photo_01", np.full((96, 104), 9))
    result = CliRunner().invoke(root_command, words)
    assert result.exit_code == 1 and "got class id 9" in result.stderr


def coco_of(masks: dict[str, np.ndarray], names: tuple[str, ...]) -> dict[str, object]:
    """COCO's JSON of some masks, run by run."""
    images, annotations = [], []
    for number, (name, mask) in enumerate(masks.items(), 1):
        height, width = mask.shape
        images.append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
        for class_id in sorted(set(np.unique(mask).tolist()) - {0}):
            columns = np.flatnonzero(np.diff((mask == class_id).ravel("F"), prepend=0, append=2))
            counts = np.diff(columns, prepend=0).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 7 * class_id,  # any ids
                    "segmentation": {"size": [height, width], "counts": counts},
                    "area": int((mask == class_id).sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7 * class_id, "name": name} for class_id, name in enumerate(names) if class_id]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_exports_are_read_like_folders(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    masks = {name: truth(voc_folder, name) for name in ("photo_00", "photo_02", "photo_09")}
    masks["photo_04"] = np.zeros_like(truth(voc_folder, "photo_04"))  # nobody has drawn anything
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_of(masks, dataset.class_names)))
    added = add_corrections(dataset, path)
    assert set(added.corrections) == {"photo_00", "photo_02"}
    for name in added.corrections:
        assert np.array_equal(added.corrections[name].read(), masks[name])
    found = findings(added)
    assert found["1 correction without any shape though the labels name a class, not used"] == ("photo_04",)
    assert found["1 correction of val images, not used: val only measures"] == ("photo_09",)


def test_cvat_images_without_a_shape_are_named(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    polygon = '<polygon label="{}" points="10.0,10.0;60.0,10.0;60.0,60.0;10.0,60.0" z_order="0"></polygon>'
    images = [
        f'<image id="0" name="JPEGImages/photo_00.jpg" width="96" height="96">{polygon.format("square")}</image>',
        '<image id="1" name="photo_01.jpg" width="104" height="96"></image>',
    ]
    path.write_text(f"<annotations>{''.join(images)}</annotations>")
    added = add_corrections(dataset, path)
    mask = added.corrections["photo_00"].read()
    assert set(np.unique(mask)) == {0, 1} and mask[30, 30] == 1 and mask[80, 80] == 0
    assert findings(added)["1 correction without a mask, not used"] == ("photo_01.jpg",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>", "a document type"),
        ("a.csv", "image,labels", "got none of the known kinds of annotations"),
    ],
)
def test_damaged_exports_are_errors(dataset: Dataset, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        add_corrections(dataset, tmp_path / name)


def test_an_export_without_any_shape_is_an_error(dataset: Dataset, voc_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_of({"photo_00": np.zeros((96, 96), np.uint8)}, dataset.class_names)))
    with pytest.raises(DatasetError, match="got no shape in any image to train on"):
        add_corrections(dataset, path)
    (tmp_path / "labels.jsonl").touch()
    with pytest.raises(UsageError, match=r"is the output of a job, .* that `multisa review` writes"):
        add_corrections(dataset, tmp_path)


def corrected_by_hand(tasks: Path, masks: dict[str, np.ndarray], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What Label Studio exports when a person has replaced the predictions of the tasks by these masks."""
    found = json.loads(tasks.read_text())
    for task in found:
        mask = masks[task["meta"]["id"]]
        height, width = mask.shape
        brushes = [
            {
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": list(encode_label_studio_rle(runs, mask.size)),
                    "brushlabels": [names[runs.class_id]],
                },
            }
            for runs in row_runs(mask)
            if runs.class_id
        ]
        task["annotations"] = [{"was_cancelled": False, "result": brushes}]
    return list(found)


@pytest.mark.slow
def test_from_the_report_to_a_better_training(run_folder: Path, voc_folder: Path, tmp_path: Path) -> None:
    """label, decide, review, annotate, train: as docs/corrections.md says."""
    dataset = read_dataset(voc_folder, quiet=True)
    export_bundle(run_folder, dataset, tmp_path / "bundle", ExportOptions(num_images=2))
    out, review, run = tmp_path / "out", tmp_path / "review", CliRunner()

    def multisa(*words: object) -> str:
        result = run.invoke(root_command, [*map(str, words)])
        assert result.exit_code == 0, result.output
        return result.stdout

    labels = ("--labels", voc_folder / "labels.json", "--bundle", tmp_path / "bundle")
    multisa("label", voc_folder / "JPEGImages", "-o", out, *labels)
    (key,) = re.findall(r'data-run="(\w+)"', (out / "report.html").read_text())
    decisions = {"photo_00.jpg": "accept", "photo_01.jpg": "reject", "photo_02.jpg": "later"}
    (tmp_path / "d.json").write_text(json.dumps({"format": FORMAT, "run": key, "decisions": decisions}))
    told = multisa("review", out, "--decisions", tmp_path / "d.json", "-o", review, "--bundle", tmp_path / "bundle")
    assert "1 image accepted" in told and "1 image rejected" in told and "9 images undecided" in told
    drawn = {"photo_01.jpg": truth(voc_folder, "photo_01")}
    tasks = corrected_by_hand(review / "label-studio/000000.json", drawn, dataset.class_names)
    (tmp_path / "annotated.json").write_text(json.dumps(tasks))
    sources = ("--corrections", review / "corrections", "--corrections", tmp_path / "annotated.json")
    multisa("train", "--data", voc_folder, "--preset", TINY, "-o", run_folder, *sources)
    record = load_run(run_folder)
    masks = record.folder(run_folder, "pseudo-masks")
    assert record.images.corrected == 2
    for name, mask in (("photo_01", drawn["photo_01.jpg"]), ("photo_00", read_mask(out / "masks/photo_00.png"))):
        used = read_mask(masks / f"{name}.png")
        assert np.array_equal(used, resize_mask(mask, used.shape))
