"""Mistakes that are reported before the first stage, and not hours into the run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multisa.runtime.errors import CheckpointError, DatasetError, UsageError
from multisa.training import pipeline
from multisa.training.config import load_config, preset_names
from multisa.training.data import read_dataset
from multisa.training.loop import MovingAverage, load_checkpoint, save_checkpoint
from multisa.training.pipeline import check_networks, check_run, train
from multisa.training.weights import in_order

TINY = Path(__file__).with_name("tiny.toml")


@pytest.mark.parametrize("name", preset_names())
def test_presets_name_networks_that_can_be_built(name: str) -> None:
    before = torch.get_rng_state()
    check_networks(load_config(name), 21)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["segmenter.backbone=no_such_net"], "not a timm model"),
        (["segmenter.weights=packaged"], "no packaged weights"),
        (["segmenter.weights=lost.pth"], "no such file"),
        (["segmenter.weights=magic"], "expected 'packaged', 'timm', 'none', or a file ending in"),
        (["cam.taps=[2, 9]"], r"expected ascending levels of the backbone, 0\.\.4, .*; set cam\.taps=\[2, 3, 4\]"),
        (["affinity.backbone=mixer_s16_224"], "does not take images of every size .*; choose another"),
        (["label.class_gain=[1.0]"], "got 1 numbers, expected 2"),
        (["label.class_gain=[1.0, 2.0]", "background_from=yen"], "expected none with background_from=yen"),
        (["segmenter_label.background_ratio=2.0"], "expected the default, 1, with balance_background=true"),
        (["label.background=0.4", "background_from=yen"], r"got 0\.4, expected the default, 0\.3, with"),
        (["relabel.rounds=1", "relabel.teacher.backbone=no_such_net"], "not a timm model"),
        (["cam.schedule.frozen_levels=6"], r"cam\.schedule\.frozen_levels: got 6, expected at most 5, the levels of"),
        (["affinity.schedule.frozen_levels=6"], r"affinity\.schedule\.frozen_levels: got 6, expected at most 5"),
        (
            ["relabel.rounds=1", "relabel.teacher.schedule.frozen_levels=9"],
            r"relabel\.teacher\.schedule\.frozen_levels: got 9",
        ),
    ],
)
def test_configurations_that_cannot_go_to_the_end(
    voc_folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(load_config(str(TINY), overrides), read_dataset(voc_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("photo_01.png", "L", r"photo_01\.png: got class id 7, expected 0\.\.2 or 255"),
        ("photo_09.png", "L", r"photo_09\.png: got class id 7"),
        ("photo_09.png", "RGB", r"photo_09\.png: got a mask of mode RGB"),
    ],
)
def test_ground_truth_of_other_classes(voc_folder: Path, tmp_path: Path, name: str, mode: str, message: str) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    mask = np.full((96, 96), 255, np.uint8)
    mask[0, 0] = 7
    Image.fromarray(mask).convert(mode).save(root / "SegmentationClass" / name)
    with pytest.raises(DatasetError, match=message):
        check_run(load_config(str(TINY)), read_dataset(root))


def write_list(root: Path, name: str, *numbers: int) -> None:
    lines = "".join(f"photo_{number:02d}\n" for number in numbers)
    (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(lines)


def test_lists_that_contradict_each_other(voc_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    write_list(root, "val", 7, 8)
    with pytest.raises(DatasetError, match=r"val\.txt: 1 names are also trained on, for example photo_07"):
        read_dataset(root)
    write_list(root, "val", 10, 11)
    write_list(root, "train", 0, 9)
    with pytest.raises(DatasetError, match=r"train\.txt: 1 names are not in train_aug.*photo_09"):
        read_dataset(root)


def test_images_without_a_mask_are_reported(
    voc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    for number in (1, 2, 8):
        (root / "SegmentationClass" / f"photo_{number:02d}.png").unlink()
    dataset = read_dataset(root)
    assert (len(dataset.train_images), len(dataset.train), len(dataset.val)) == (8, 4, 3)
    errors = capsys.readouterr().err
    assert "train: 2 of 6 images have no mask" in errors
    assert "val: 1 of 4 images have no mask" in errors


def test_the_pipeline_checks_first(voc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("checked")

    monkeypatch.setattr(pipeline, "check_run", refuse)
    with pytest.raises(UsageError, match="checked"):
        train(load_config(str(TINY)), read_dataset(voc_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    path, model = tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match="missing, expected a trained network; run `multisa train`"):
        load_checkpoint(path, model)
    save_checkpoint(path, model, None, {"losses": []})
    with pytest.raises(CheckpointError, match="of another network"):
        load_checkpoint(path, torch.nn.Linear(4, 3))
    whole = path.read_bytes()
    for damaged in (whole[:-5], b"", b"no tensors here"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged .*; delete it and run `multisa train` again"):
            load_checkpoint(path, model)


def test_a_checkpoint_without_the_whole_average_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 3)
    average = MovingAverage(model, 0.9)
    save_checkpoint(path, model, None, {"losses": []})
    with pytest.raises(CheckpointError, match="got no whole moving average of the weights, expected one; delete it"):
        load_checkpoint(path, model, None, average)
    part = MovingAverage(model, 0.9)
    del part.state["bias"]
    save_checkpoint(path, model, None, {"losses": []}, part)
    with pytest.raises(CheckpointError, match="got no whole moving average"):
        load_checkpoint(path, model, None, average)
    average.updates = 7
    save_checkpoint(path, model, None, {"losses": []}, average)
    restored = MovingAverage(model, 0.9)
    load_checkpoint(path, model, None, restored)
    assert restored.updates == 7


def test_packaged_weights_are_matched_by_order_kind_and_shape() -> None:
    one, two, head = torch.ones(3), torch.zeros(3), torch.ones(7)
    target = {"bn1.weight": one, "bn1.bias": one}
    stored = {"stem.1.weight": one, "stem.1.bias": two, "head.weight": head}
    assert in_order(target, stored, "file") == {"bn1.weight": one, "bn1.bias": two}
    swapped = {"stem.1.bias": two, "stem.1.weight": one, "head.weight": head}
    with pytest.raises(UsageError, match=r"file: got stem\.1\.bias \(3,\), expected bn1\.weight \(3,\)"):
        in_order(target, swapped, "file")
    with pytest.raises(UsageError, match="got 1 tensors, expected at least 2"):
        in_order(target, {"stem.1.weight": one}, "file")
    with pytest.raises(UsageError, match=r"got stem\.1\.weight \(7,\)"):
        in_order(target, {**stored, "stem.1.weight": head}, "file")
