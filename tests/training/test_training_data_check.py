"""The check of a data set: what it counts, what it refuses before any training, and what it does not do twice."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import DatasetError, UsageError
from multisa.training import data_check, estimate
from multisa.training.annotations import base
from multisa.training.config import load_config
from multisa.training.data import Dataset, Finding, read_dataset
from multisa.training.data_check import CACHE, DatasetReport, Estimate, check_dataset
from multisa.training.estimate import estimate_training
from multisa.training.pipeline import train

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture
def root(voc_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(voc_folder, tmp_path / "voc"))


def save(root: Path, name: str, size: tuple[int, int], class_id: int = 0) -> None:
    """Write the mask of an image; size: (H, W)."""
    Image.fromarray(np.full(size, class_id, np.uint8)).save(root / "SegmentationClass" / f"{name}.png")


def test_what_is_counted(root: Path) -> None:
    labels = json.loads((root / "labels.json").read_text())
    (root / "labels.json").write_text(json.dumps({**labels, "photo_00": []}))
    turned = Image.new("RGB", (130, 70))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying on its side
    turned.save(root / "JPEGImages" / "photo_09.jpg", exif=exif)
    save(root, "photo_09", (130, 70))
    report = check_dataset(read_dataset(root))
    assert report.images == {"trained_on": 8, "train": 6, "val": 4}
    assert report.classes == {"square": 4, "disc": 5}
    assert report.labels == {"0": 1, "1": 5, "2": 2, "3+": 0}
    assert report.sizes["photo_09"] == (130, 70) and len(report.sizes) == 12
    assert report.size_range() == {"smallest": (130, 70), "median": (96, 112), "largest": (96, 120)}
    assert report.unusable == ()
    assert [str(finding) for finding in report.findings] == [
        "4 images labelled in labels.json but not trained on: JPEGImages/photo_08.jpg, JPEGImages/photo_09.jpg, "
        "JPEGImages/photo_10.jpg and 1 more",
        "2 masks besides those of train.txt and val.txt, not used: photo_06.png, photo_07.png",
        "1 image to train on without any class: photo_00",
    ]


def test_notes_of_images_and_masks(root: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (96, 96), (9, 9, 9, 9)).save(root / "JPEGImages" / "photo_00.png")
    (root / "JPEGImages" / "photo_00.jpg").unlink()
    save(root, "photo_00", (96, 96), 255)
    binary = np.zeros((96, 104), np.uint8)
    binary[:9] = 255
    Image.fromarray(binary).save(root / "SegmentationClass" / "photo_01.png")
    expected = {
        "1 image: transparency laid on white": ("photo_00",),
        "2 images: its mask holds no class, only 255 (ignored) and perhaps 0; write ids 0, 1, .. if 255 is a class": (
            "photo_00",
            "photo_01",
        ),
    }
    for _ in range(2):  # the second time from what the first has stored
        report = check_dataset(read_dataset(root), tmp_path / "run")
        assert report.unusable == ()
        assert {f.text: f.names for f in report.findings if ": " in f.text} == expected


def test_every_bad_file_is_reported_at_once(root: Path) -> None:
    (root / "JPEGImages" / "photo_00.jpg").write_text("<html>")
    (root / "JPEGImages" / "photo_11.jpg").write_bytes(b"")
    save(root, "photo_01", (104, 96))
    save(root, "photo_02", (96, 112), class_id=3)
    save(root, "photo_07", (1, 1), class_id=9)  # of no image in train.txt: never read
    (root / "SegmentationClass" / "photo_08.png").write_text("<html>")
    report = check_dataset(read_dataset(root))
    names = [problem.partition(": ")[0].rpartition("/")[2] for problem in report.unusable]
    assert names == ["photo_00.jpg", "photo_01.png", "photo_02.png", "photo_08.png", "photo_11.jpg"]
    assert "photo_01.png: got a mask of 96 x 104 pixels, expected 104 x 96 as its upright image" in report.unusable[1]
    assert "photo_02.png: got class id 3, expected 0..2 or 255" in report.unusable[2]
    with pytest.raises(DatasetError, match="got 5 files that cannot be used, expected none") as caught:
        report.require_usable()
    assert str(caught.value).splitlines()[1:] == [f"  {problem}" for problem in report.unusable]
    many = replace(report, unusable=tuple(f"{n}.jpg: bad" for n in range(30)))
    with pytest.raises(DatasetError, match="got 30 files") as caught:
        many.require_usable()
    assert len(str(caught.value).splitlines()) == 22 and str(caught.value).endswith("  19.jpg: bad\n  and 10 more")


def test_bad_files_and_unsuitable_folders_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    config, output = load_config(str(TINY)), tmp_path / "run"
    (root / "JPEGImages" / "photo_11.jpg").write_text("<html>")
    with pytest.raises(DatasetError, match=r"photo_11\.jpg: not an image"):
        train(config, read_dataset(root), output)
    assert not output.exists()
    for inside in (root / "runs" / "multisa", root):
        with pytest.raises(UsageError, match=r"is inside the data set .* choose another folder with -o"):
            train(config, read_dataset(root), inside)
    assert not (root / "runs").exists()


def test_the_default_output_in_the_current_folder_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    result = CliRunner().invoke(root_command, ["train", "--data", ".", "--preset", str(TINY)])
    assert result.exit_code == 2 and "runs/multisa: is inside the data set ., expected" in result.stderr
    assert not (root / "runs").exists()


def test_images_with_the_same_bytes(root: Path) -> None:
    images = root / "JPEGImages"
    for source, copy in ((0, 3), (0, 6), (1, 8)):
        shutil.copy(images / f"photo_{source:02d}.jpg", images / f"photo_{copy:02d}.jpg")
    for name, like in (("photo_03", (96, 96)), ("photo_08", (96, 104))):
        save(root, name, like)
    report = check_dataset(read_dataset(root))
    assert report.findings[-2:] == (
        Finding("1 image several times in the train list (same bytes)", ("photo_00 = photo_03 = photo_06",), True),
        Finding("1 image trained on and in val (same bytes), so val scores too high", ("photo_01 = photo_08",), True),
    )


def test_unchanged_files_are_decoded_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, output = read_dataset(root), tmp_path / "run"
    decoded: list[Path] = []
    for module, name in ((data_check, "read_image"), (base, "read_mask")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, plain=plain: decoded.append(path) or plain(path))
    first = check_dataset(dataset, output)
    assert len(decoded) == 12 + 10  # masks of the six in train.txt and the four in val.txt
    assert check_dataset(dataset, output) == first and len(decoded) == 22
    assert check_dataset(dataset) == first and len(decoded) == 44
    mask = root / "SegmentationClass" / "photo_00.png"
    whole = mask.read_bytes()
    save(root, "photo_00", (10, 10))
    for _ in range(2):  # a check with bad files is not stored
        decoded.clear()
        assert len(check_dataset(dataset, output).unusable) == 1 and len(decoded) == 22
    mask.write_bytes(whole)
    assert check_dataset(dataset, output) == first and len(decoded) == 22
    (output / CACHE).write_text("{half a fil")
    assert check_dataset(dataset, output) == first and len(decoded) == 44


@pytest.mark.parametrize("count", [6, 21, 81, 254])
def test_the_table_is_readable_at_any_number_of_classes(count: int) -> None:
    classes = {f"class number {n}": n * n for n in range(1, count)}
    images, sizes = {"trained_on": 9, "train": 4, "val": 2}, {"a": (375, 500), "b": (64, 70), "c": (400, 500)}
    report = DatasetReport(
        "data", images, classes, {"0": 1, "1": 5, "2": 2, "3+": 1}, sizes, (), (Finding("1 note", ("a",)),)
    )
    lines = report.table().splitlines()
    assert "sizes     smallest 70 x 64, median 500 x 375, largest 500 x 400" in lines
    assert "labels    images by their number of labels: 0: 1, 1: 5, 2: 2, 3 or more: 1" in lines
    assert lines[-2:] == ["notes", "  1 note: a"]
    grid = lines[5:-2]
    assert max(map(len, lines)) <= 100 and len(grid) <= -(-count // 3)
    cells = {name: int(number) for line in grid for name, number in re.findall(r"(class number \d+) +(\d+)", line)}
    assert cells == classes
    width = len(grid[0]) // grid[0].count("class")
    assert all(len(line) % width == 0 for line in grid)  # columns stand below each other


@pytest.mark.parametrize(
    ("seconds", "size", "text"),
    [
        (40.4, 2_000, "less than 5 min on this machine (2 CPU cores), and 1 MB in the run folder"),
        (7_810, 94_400_000, "about 2 h 10 min on this machine (2 CPU cores), and 94 MB in the run folder"),
        (1_500, 1_260_000_000, "about 25 min on this machine (2 CPU cores), and 1.3 GB in the run folder"),
    ],
)
def test_estimates_in_words(seconds: float, size: int, text: str) -> None:
    assert str(Estimate(seconds, size, "2 CPU cores")) == text


@pytest.mark.slow
def test_the_command(root: Path, tiny_run: Path) -> None:
    arguments = ["data", "check", str(root), "--preset", str(TINY)]
    result = CliRunner().invoke(root_command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["images"] == {"trained_on": 8, "train": 6, "val": 4} and report["classes"] == {"square": 5, "disc": 5}
    assert report["sizes"]["largest"] == [96, 120]
    assert report["findings"][1]["names"] == ["photo_06.png", "photo_07.png"]
    stages = [path.parent for path in tiny_run.glob("*/stage.json")]  # the page of the training is small
    written = sum(path.stat().st_size for folder in stages for path in folder.iterdir())
    assert report["estimate"]["disk_bytes"] == pytest.approx(written, rel=0.03)
    assert report["estimate"]["seconds"] > 0
    assert "photo_06.png" not in result.stderr  # the report has it
    (root / "JPEGImages" / "photo_05.jpg").write_text("<html>")
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 1
    assert "cannot be used: 1 file\n" in result.stdout and "training" not in result.stdout
    assert "photo_05.jpg: not an image" in result.stdout
    assert result.stderr.splitlines()[-1] == f"error: {root}: 1 file cannot be used, listed above"


def test_no_estimate_where_a_gpu_has_too_little_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(estimate, "create_model", fail)
    assert estimate_training(load_config(str(TINY)), read_dataset(root), {}) is None
    assert "lower batch_size or crop" in capsys.readouterr().err


def test_a_data_set_without_masks(root: Path) -> None:
    dataset: Dataset = replace(read_dataset(root), train=(), val=())
    report = check_dataset(dataset)
    assert report.images == {"trained_on": 8, "train": 0, "val": 0} and len(report.sizes) == 8
