"""Configuration, data readers, the loop, scoring, and the whole pipeline on a small synthetic data set."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from click.testing import CliRunner
from torch import nn

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import DatasetError, MultisaError, UsageError
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.training.augment import PADDING, AugmentedImages, jitter_colours, random_view
from multisa.training.config import AffinityLabelConfig, Schedule, TrainConfig, load_config, preset_names
from multisa.training.data import read_dataset
from multisa.training.inference import save_maps
from multisa.training.loop import BatchLoss, Epoch, LoopOptions, train_network
from multisa.training.models import with_taps
from multisa.training.pipeline import train
from multisa.training.run_record import load_run
from multisa.training.stage_functions import affinity_labels
from multisa.training.thresholds import ThresholdSweep

TINY = Path(__file__).with_name("tiny.toml")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    assert with_taps(load_config(name).cam).taps == (2, 3, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cam.epoch=3", "unknown key 'epoch'; valid keys: backbone"),
        ("more_seeds=[1, 1]", "more_seeds: got"),
        ("more_seeds=[0]", "that differ from seed"),
        ("cam.schedule.epochs=many", "expected int"),
        ("cam.schedule.epochs=1.5", "expected int"),
        ("affinity.head=edges", "expected one of 'features', 'boundary'"),
        ("cam.schedule.resize=[1]", "got 1 values, expected 2"),
        ("seed", "expected KEY=VALUE"),
        ("seed=99999999999999", "expected 0..4294967295"),
        ("affinity_labels.confidence=1.0", "got 1.0, expected above 0 and below 1"),
        ("affinity_labels={foreground=1.5, background=0.1}", "got 1.5, expected above 0 and below 1"),
        ("affinity_labels={foreground=0.4, background=0.6}", "got 0.6, expected above 0 and below foreground, 0.4"),
        ("affinity_labels.foreground=0.4", "got (0.4, None), expected both, or neither"),
        ("affinity.training_radius=1", "got 1, expected 2..32"),
        ("segmenter.dropout=2.0", "got 2.0, expected within 0..1, below 1"),
        ("segmenter.decoder_channels=0", "got 0, expected at least 1"),
        ("segmenter.atrous_rates=[6, 0]", "expected each at least 1"),
        ("cam.schedule.weight_decay=-0.1", "got -0.1, expected a finite number from 0"),
        ("cam.schedule.learning_rate=inf", "got inf, expected a finite number above 0"),
        ("cam.schedule.poly_power=nan", "got nan, expected a finite number from 0"),
        ("cam.beta_factor=inf", "expected a finite number above 0"),
        ("cam.taps=[3, 2]", "expected ascending levels"),
        ("cam.taps=[-1]", "expected ascending levels"),
        ("cam.schedule.ema=1.0", "ema: got 1.0, expected within 0..1, below 1"),
        ("cam.schedule.colour_jitter=-0.1", "colour_jitter: got -0.1, expected within 0..1, below 1"),
        ("segmenter.schedule.frozen_levels=-1", "frozen_levels: got -1, expected at least 0"),
        ("relabel.rounds=-1", "rounds: got -1, expected at least 0"),
        ("relabel.crf_share=1.5", "crf_share: got 1.5, expected within 0..1"),
        ("relabel.scales=[]", "scales: got (), expected one or more multiples of 1/16"),
        ("relabel.scales=[1.0, 0.0]", "expected one or more multiples of 1/16"),
        ("relabel.scales=[1.0, 1.3]", "expected one or more multiples of 1/16"),
        ("label_method=cam", "expected one of 'auto', 'segmenter', 'walk'"),
        ("min_area=1.0", "min_area: got 1.0, expected a share from 0, below 1"),
        ("background_from=masks", "expected one of 'yen', 'config', 'train-masks'"),
        (
            "relabel.teacher.backbone=resnet18",
            "relabel.teacher.backbone: got resnet18, expected cam.backbone, tf_efficientnet_lite2, because "
            "relabel.teacher.start_from_cam is true; make the two equal, or set it to false",
        ),
        ("segmenter.start_from_cam=true", "segmenter.backbone: got tf_efficientnet_lite0, expected cam.backbone"),
    ],
)
def test_bad_overrides_name_the_valid_ones(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config("lite0", [override])
    assert message in str(caught.value)


def test_a_teacher_is_checked_only_where_there_are_rounds() -> None:
    assert load_config("lite0", ["relabel.rounds=0", "relabel.teacher.backbone=resnet18"]).segmenters().keys() == {
        "segmenter"
    }


def test_overrides_change_one_value() -> None:
    config = load_config("lite0", ["cam.schedule.epochs=3", "affinity.head=features", "label.crf.iterations=4"])
    assert config.cam.schedule.epochs == 3
    assert config.affinity.head == "features"
    assert config.label.crf.iterations == 4
    assert replace(config.cam, schedule=load_config("lite0").cam.schedule) == load_config("lite0").cam


def test_unknown_preset_is_an_error() -> None:
    with pytest.raises(UsageError, match="expected one of lite0"):
        load_config("resnet9000")


LATIN_1 = "caf\xe9\n".encode("latin-1")


def test_a_preset_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "' + LATIN_1.strip() + b'"\n')
    with pytest.raises(UsageError, match=r"mine\.toml: is not UTF-8 text .*; save it as UTF-8"):
        load_config(str(path))
    path.write_text('\ufeffname = "café"\n', encoding="utf-8")  # some editors write a byte order mark
    assert load_config(str(path)).name == "café"


@pytest.mark.parametrize("name", ["classes.txt", "ImageSets/Segmentation/train_aug.txt"])
def test_a_data_set_that_is_not_utf_8_is_an_error(voc_folder: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    (root / name).write_bytes((root / name).read_bytes() + b"\n" + LATIN_1)
    with pytest.raises(DatasetError, match=rf"{name}: is not UTF-8 text .*; save it as UTF-8"):
        read_dataset(root)


def test_voc_layout(voc_folder: Path) -> None:
    dataset = read_dataset(voc_folder)
    assert (len(dataset.train_images), len(dataset.train), len(dataset.val)) == (8, 6, 4)
    assert dataset.train_images[2].classes == (1, 2)
    assert dataset.class_names == ("background", "square", "disc")


def test_labels_from_voc_annotations(voc_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    labels = json.loads((root / "labels.json").read_text())
    (root / "labels.json").unlink()
    (root / "Annotations").mkdir()
    for name, classes in labels.items():
        objects = "".join(f"<object><name>{c}</name></object>" for c in [*classes, *classes, "sofa"])
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    read, expected = read_dataset(root), read_dataset(voc_folder)
    assert [item.classes for item in read.train_images] == [item.classes for item in expected.train_images]


def test_plain_folder_with_a_table(voc_folder: Path, tmp_path: Path) -> None:
    for name in ("photo_00.jpg", "photo_01.jpg"):
        shutil.copy(voc_folder / "JPEGImages" / name, tmp_path / name)
    (tmp_path / "classes.txt").write_text("background\nsquare\ndisc\n")
    (tmp_path / "labels.csv").write_text("image,labels\nphoto_00.jpg,square\nphoto_01.jpg,disc square\n")
    dataset = read_dataset(tmp_path)
    assert [item.classes for item in dataset.train_images] == [(1,), (1, 2)]
    assert dataset.train == dataset.val == ()


def test_data_set_errors(voc_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a folder"):
        read_dataset(tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"no labels\.csv"):
        read_dataset(tmp_path)
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    (root / "JPEGImages" / "photo_03.jpg").unlink()
    with pytest.raises(DatasetError, match=r"photo_03\.jpg: listed"):
        read_dataset(root)
    (root / "labels.json").unlink()
    with pytest.raises(DatasetError, match="one is needed"):
        read_dataset(root)


def test_samples_depend_only_on_seed_epoch_and_index(voc_folder: Path) -> None:
    dataset = read_dataset(voc_folder)
    samples = AugmentedImages(dataset.train_images, Schedule(crop=64, resize=(48, 128)), TrainConfig(), n_classes=3)
    image, target = samples[2]
    assert image.shape == (64, 64, 3) and image.dtype == torch.uint8
    assert target.tolist() == [1.0, 1.0]
    assert torch.equal(samples[2][0], image)
    samples.set_epoch(1)
    assert not torch.equal(samples[2][0], image)


def test_masks_are_resized_to_the_grid_by_the_dataset(voc_folder: Path) -> None:
    dataset, folder = read_dataset(voc_folder), voc_folder / "SegmentationClass"
    schedule = Schedule(crop=66, resize=(48, 128))
    full, small = (
        AugmentedImages(dataset.train_images, schedule, TrainConfig(), n_classes=3, masks=folder, stride=stride)
        for stride in (1, 4)
    )
    for index in range(len(full)):
        image, mask = full[index]
        same_image, resized = small[index]
        assert torch.equal(image, same_image) and mask.shape == (66, 66)
        assert np.array_equal(resized.numpy(), resize_mask(mask.numpy(), (17, 17)))


@pytest.mark.parametrize("crop", [64, 90])
def test_a_view_is_the_same_for_image_mask_and_maps(crop: int) -> None:
    random = np.random.default_rng(0)
    values = np.arange(40 * 70, dtype=np.uint8).reshape(40, 70) % 200
    view = random_view(values.shape, Schedule(crop=crop, resize=(70, 70)), random)
    image = view.of_image(np.dstack([values] * 3), lambda resized: resized)
    mask, maps = view.of_mask(values), view.of_maps(values[None].astype(np.float32))
    assert image.shape == (crop, crop, 3) and mask.shape == (crop, crop) and maps.shape == (1, crop, crop)
    inside = mask != 255
    assert inside.sum() == 40 * min(70, crop)
    assert np.array_equal(image[..., 0][inside], mask[inside])
    assert np.array_equal(maps[0][inside], mask[inside].astype(np.float32))
    assert (image[~inside] == 128).all() and (maps[0][~inside] == 0).all()


def test_soft_targets_follow_the_classes_of_the_image(voc_folder: Path, tmp_path: Path) -> None:
    dataset = read_dataset(voc_folder)
    item = dataset.train_images[2]
    assert item.classes == (1, 2)
    height, width = item.mask.read().shape if item.mask else (96, 128)
    shares = np.array([0.25, 0.5, 0.25], np.float32)
    maps = np.broadcast_to(shares[:, None, None], (3, -(-height // 4), -(-width // 4)))
    save_maps(tmp_path / f"{item.id}.npy", maps)
    schedule = Schedule(crop=64, resize=(48, 48))
    samples = AugmentedImages((item,), schedule, TrainConfig(), n_classes=4, probabilities=tmp_path, stride=4)
    _, target = samples[0]
    assert target.shape == (4, 16, 16) and not target[3].any()
    total = target.sum(0)
    assert (total[total > 0.99]).numel() > 0 and (total == 0).any()  # cells around the image do not count
    full = target[:, total > 0.999]
    assert torch.allclose(full[:3], torch.from_numpy(shares)[:, None].expand_as(full[:3]), atol=1e-3)


def test_colours_change_within_the_strength_only() -> None:
    image = np.full((8, 8, 3), (100, 50, 25), np.uint8)
    assert jitter_colours(image, 0.0, np.random.default_rng(0)) is image
    changed = jitter_colours(image, 0.3, np.random.default_rng(0))
    assert changed.dtype == np.uint8 and changed.shape == image.shape and (changed != image).any()
    assert 0.7 * 0.7 * 58 - 2 <= changed.mean() <= 1.3 * 1.3 * 58 + 2


def test_colours_around_the_image_do_not_change(voc_folder: Path) -> None:
    # Every image is smaller than the crop.
    schedule = Schedule(crop=128, resize=(64, 64), colour_jitter=0.5)
    items = read_dataset(voc_folder).train
    samples = AugmentedImages(items, schedule, TrainConfig(), n_classes=3, masks=voc_folder / "SegmentationClass")
    for index in range(len(samples)):
        image, mask = samples[index]
        rows, columns = np.nonzero(mask.numpy() != 255)
        outside = np.ones(mask.shape, bool)
        outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        assert outside.any() and (image.numpy()[outside] == PADDING).all()


class Line(nn.Module):
    """A network with dropout, so that resuming must restore the random stream too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(self.drop(values)))


def fit(
    folder: Path,
    epochs: int,
    stop_after: int | None = None,
    ema: float = 0.0,
    seen: list[tuple[Epoch, float]] | None = None,
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Line()
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(values, values.sum(1, keepdim=True))
    calls = 0

    def step(batch: list[torch.Tensor]) -> BatchLoss:
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise KeyboardInterrupt
        return BatchLoss(torch.ones(()), lambda _: ((model(batch[0]) - batch[1]) ** 2).mean())

    schedule = Schedule(epochs=epochs, batch_size=4, learning_rate=0.01, new_layers_factor=1.0, ema=ema)

    def after_epoch(epoch: Epoch) -> None:
        model.eval()
        torch.rand(3)  # neither this nor the mode changes what is trained
        if seen is not None:
            seen.append((epoch, float(model.layer.bias.detach())))

    hook = None if seen is None else after_epoch
    options = LoopOptions(folder / "checkpoint.safetensors", seed=5, workers=0, title="line", after_epoch=hook)
    train_network(model, [], data, step, schedule, options)
    return dict(model.state_dict())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_every_epoch_is_reported_with_the_weights_that_would_be_kept(tmp_path: Path, ema: float) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, seen = fit(tmp_path / "a", epochs=3, ema=ema), []  # type: ignore[var-annotated]
    watched = fit(tmp_path / "b", epochs=3, ema=ema, seen=seen)
    assert all(torch.equal(value, watched[key]) for key, value in whole.items())
    assert [(epoch.number, epoch.of, epoch.step) for epoch, _ in seen] == [(1, 3, 3), (2, 3, 6), (3, 3, 9)]
    assert seen[0][0].learning_rate == pytest.approx(0.01 * (1 - 2 / 9) ** 0.9) and seen[0][0].loss > 0
    assert seen[-1][1] == float(whole["layer.bias"])
    stopped: list[tuple[Epoch, float]] = []
    (tmp_path / "c").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", epochs=3, stop_after=4, ema=ema, seen=stopped)
    with safetensors.safe_open(tmp_path / "c" / "checkpoint.safetensors", "pt") as file:
        kept = file.get_tensor(("average." if ema else "model.") + "layer.bias")
    assert stopped[0][1] == float(kept)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path: Path, ema: float) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(tmp_path / "a", epochs=4, ema=ema)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", epochs=4, stop_after=7, ema=ema)
    resumed = fit(tmp_path / "b", epochs=4, ema=ema)
    finished = fit(tmp_path / "b", epochs=4, ema=ema)  # everything is in the last checkpoint
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]) and torch.equal(value, finished[key]), key


def test_the_last_checkpoint_holds_the_average_once(tmp_path: Path) -> None:
    fit(tmp_path, epochs=2, ema=0.9)
    last = (tmp_path / "checkpoint.safetensors").stat().st_size
    (tmp_path / "plain").mkdir()
    fit(tmp_path / "plain", epochs=2)
    assert last == pytest.approx((tmp_path / "plain" / "checkpoint.safetensors").stat().st_size, abs=64)


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(4, 8))
    model = Line()
    with pytest.raises(MultisaError, match="lower learning_rate"):
        train_network(
            model,
            [],
            data,
            lambda batch: BatchLoss(torch.ones(()), lambda _: model(batch[0]).sum() * float("nan")),
            Schedule(epochs=1, batch_size=4),
            LoopOptions(tmp_path / "c", 0, 0, "line"),
        )


def test_sweep_equals_thresholding_one_by_one() -> None:
    random = np.random.default_rng(0)
    sweep, masks = ThresholdSweep(4), []
    for _ in range(3):
        scores = random.random((2, 12, 15)).astype(np.float32)
        truth = random.choice(np.array([0, 1, 3, 255], np.uint8), (12, 15))
        sweep.add(scores, (1, 3), truth)
        masks.append((scores, truth))
    for background in (0.0, 0.3, 0.77):
        expected = np.zeros((4, 4), np.int64)
        for scores, truth in masks:
            winner = np.array([1, 3], np.uint8)[scores.argmax(0)]
            expected += confusion_matrix(np.where(scores.max(0) >= background, winner, 0).astype(np.uint8), truth, 4)
        assert np.array_equal(sweep.confusion(background), expected)
    results = sweep.results(0.3)
    assert results["best"]["miou"] >= results["configured"]["miou"]
    assert results["configured"]["miou"] == round(100 * mean_iou(sweep.confusion(0.3)), 2)


def test_affinity_labels_are_unsure_between_the_two_thresholds() -> None:
    image = np.full((24, 32, 3), 128, np.uint8)
    image[:, :10], image[:, 22:] = 30, 220
    cam = np.zeros((1, 24, 32), np.float32)
    cam[0, :, :10], cam[0, :, 10:22] = 1.0, 0.2
    labels = affinity_labels(image, cam, (2,), AffinityLabelConfig(foreground=0.5, background=0.1))
    assert set(np.unique(labels[:, :8])) == {2}
    assert set(np.unique(labels[:, 12:20])) == {255}
    assert set(np.unique(labels[:, 24:])) == {0}
    assert not affinity_labels(image, cam[:0], (), AffinityLabelConfig()).any()


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("stages") / "run"))


@pytest.mark.slow
def test_pipeline_measures_every_stage(run_folder: Path, voc_folder: Path) -> None:
    run = load_run(run_folder)
    assert [row.measured_on for row in run.rows] == ["train"] * 4 + ["val"]
    assert len(run.betas) == 3 and len(run.score_thresholds) == 2
    assert "DeepLabV3+" in run.format_table()
    masks = run.folder(run_folder, "pseudo-masks")
    item = read_dataset(voc_folder).train_images[0]
    mask = read_mask(masks / f"{item.id}.png")
    assert mask.shape == (128, 128)  # the working size
    assert set(np.unique(mask)) <= {0, *item.classes}


@pytest.mark.slow
def test_background_score_is_chosen_by_the_masks_it_makes(run_folder: Path, voc_folder: Path) -> None:
    dataset, run = read_dataset(voc_folder), load_run(run_folder)
    stage = json.loads((run.folder(run_folder, "calibration") / "stage.json").read_text())
    curve = {float(score): miou for score, miou in stage["results"]["curve"].items()}
    assert len(curve) >= 3 and run.label.class_gain == ()
    assert len(list(run.folder(run_folder, "calibration").glob("*.npy"))) == len(dataset.train)
    assert run.label.background == stage["results"]["background"]
    assert curve[run.label.background] == max(curve.values())
    # With all train images in the sample, the winner's score is that of the pseudo-masks themselves.
    assert run.rows[-2].miou == curve[run.label.background]


@pytest.mark.slow
def test_pipeline_skips_what_is_made_and_redoes_what_changed(run_folder: Path, voc_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_folder.glob("*/stage.json")}
    first = load_run(run_folder)
    again = train(load_config(str(TINY)), read_dataset(voc_folder), run_folder)
    assert again == first
    changed = train(load_config(str(TINY), ["segmenter.decoder_channels=8"]), read_dataset(voc_folder), run_folder)
    after = {path: path.stat().st_mtime_ns for path in run_folder.glob("*/stage.json")}
    assert {path: after[path] for path in before} == before
    assert sorted(path.parent.name.rsplit("-", 1)[0] for path in after.keys() - before.keys()) == [
        "segmenter",
        "segmenter-val",
    ]
    assert changed.folder(run_folder, "walk") == first.folder(run_folder, "walk")


@pytest.mark.slow
def test_a_missing_output_is_made_again(run_folder: Path, voc_folder: Path) -> None:
    run = load_run(run_folder)
    gone = [run.folder(run_folder, "cam-maps") / f"photo_0{n}" for n in ("1.npy", "2.scores.npy")]
    gone.append(run.folder(run_folder, "pseudo-masks") / "photo_01.png")
    before = {path: path.read_bytes() for path in gone}
    for path in gone:
        path.unlink()
    assert train(load_config(str(TINY)), read_dataset(voc_folder), run_folder).rows == run.rows
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_columns_of_the_table_stand_below_each_other(run_folder: Path) -> None:
    run = load_run(run_folder)
    long = replace(run, rows=(replace(run.rows[0], stage="a stage with a name of over forty characters"), *run.rows))
    header, *rows = long.format_table().splitlines()
    assert {row.index(mark) for row in rows for mark in (" train ", " val ") if mark in row} == {header.index(" list ")}


@pytest.mark.slow
def test_other_images_or_labels_train_again_other_masks_do_not(voc_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc_folder, root)
    dataset = read_dataset(root)
    mask = root / "SegmentationClass" / "photo_00.png"
    shutil.copy(root / "SegmentationClass" / "photo_01.png", mask)
    assert read_dataset(root).train_images_digest() == dataset.train_images_digest()
    assert read_dataset(root).masks_digest(dataset.train) != dataset.masks_digest(read_dataset(voc_folder).train)
    labels = json.loads((root / "labels.json").read_text())
    (root / "labels.json").write_text(json.dumps({**labels, "photo_00": ["disc"]}))
    assert read_dataset(root).train_images_digest() != dataset.train_images_digest()


@pytest.mark.slow
def test_a_plain_folder_goes_all_the_way(voc_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rows = ["image,labels"]
    labels = json.loads((voc_folder / "labels.json").read_text())
    for name in sorted(labels)[:4]:
        shutil.copy(voc_folder / "JPEGImages" / f"{name}.jpg", images / f"{name}.jpg")
        rows.append(f"{name}.jpg,{' '.join(labels[name])}")
    (images / "labels.csv").write_text("\n".join(rows))
    (images / "classes.txt").write_text("background\nsquare\ndisc\n")
    settings = ["cam.schedule.epochs=1", "segmenter.schedule.epochs=1", "affinity.head=features"]
    arguments = ["train", "--data", str(images), "--preset", str(TINY), "-o", str(tmp_path / "run")]
    for setting in settings:
        arguments += ["--set", setting]
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 0, result.output
    assert "nothing was measured" in result.stdout
    assert "background_from=train-masks: the train list has no masks" in result.stderr
    assert load_run(tmp_path / "run").rows == ()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere"], 1, "not a folder"),
        (["--data", ".", "--preset", "huge"], 2, "expected one of lite0"),
        (["--data", ".", "--set", "cam.scales=[0.35]"], 2, "multiples of 1/16"),
        (["--data", ".", "--set", "workers=0"], 2, "at least 1"),
        (["--data", ".", "--set", "name.x=1"], 2, "is a value, not a table"),
    ],
)
def test_train_command_errors(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(root_command, ["train", *arguments])
    assert result.exit_code == code
    assert message in result.stderr
