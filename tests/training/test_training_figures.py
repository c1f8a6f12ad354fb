"""The paper's figures from a small run: levels, heat maps, sheets, columns with and without ground truth."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.imaging.png import voc_palette
from multisa.training.backbones import Backbone
from multisa.training.config import load_config
from multisa.training.data import Dataset, read_dataset, read_working_image
from multisa.training.multi_sa import MultiSACAM, SingleLevel, shares_at_peak
from multisa.training.reproduce.command import reproduce_paper
from multisa.training.reproduce.figures import FIGURES, choose_images
from multisa.training.reproduce.pictures import PANEL, Legend, Strip, coloured, draw_sheet, fitted, heat_map, sheet_size
from multisa.training.run_record import load_run

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("figures") / "run"))


def without_masks(dataset: Dataset) -> Dataset:
    images = tuple(replace(item, mask=None) for item in dataset.train_images)
    return replace(dataset, train_images=images, train=(), val=())


def network(taps: tuple[int, ...]) -> MultiSACAM:
    torch.manual_seed(0)
    made = MultiSACAM(Backbone("test_efficientnet", weights="none"), taps=taps, n_classes=3).double().eval()
    for beta in made.beta_parameters():
        beta.data.fill_(0.6)
    made.level_gain.copy_(torch.arange(1, 6))
    return made


@pytest.mark.parametrize("taps", [(4,), (1, 4), (2, 3, 4)])
def test_levels_add_up_to_the_whole_network(taps: tuple[int, ...]) -> None:
    whole = network(taps)
    parts = [SingleLevel(whole, index) for index in range(len(taps))]
    image = torch.randn(2, 3, 65, 70, dtype=torch.float64)
    with torch.inference_mode():
        terms = [part(image) for part in parts]
        expected = whole(image)
    assert all(term.shape == expected.shape and term.abs().max() > 1e-6 for term in terms)
    torch.testing.assert_close(sum(terms), expected, rtol=1e-9, atol=1e-12)


def test_shares_are_those_at_the_highest_point() -> None:
    whole = network((2, 3, 4))
    parts = [SingleLevel(whole, index) for index in range(3)]
    image = torch.randint(0, 256, (1, 65, 70, 3), dtype=torch.uint8)
    with torch.inference_mode():
        shares = shares_at_peak(parts, image, (1, 3))
        normalised = whole.backbone.normalise(image)
        row = whole(normalised)[0, 2].flatten()
        first = parts[0](normalised)[0, 2].flatten()[row.argmax()] / row.max()
    assert shares.shape == (2, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(shares[1, 0], first)


def test_heat_goes_from_blue_to_red_over_the_image() -> None:
    rgb = np.full((8, 12, 3), 100, np.uint8)
    scores = np.zeros((8, 12), np.float32)
    scores[:, 4:8], scores[:, 8:] = 0.5, 1.0
    heat = heat_map(rgb, scores)
    cold, warm, hot = heat[0, 0].tolist(), heat[0, 6].tolist(), heat[0, 11].tolist()
    assert cold == [50, 50, 114] and warm == [114, 178, 114] and hot == [114, 50, 50]
    # The image stays visible, and maps of another size are resized to its size.
    assert not np.array_equal(heat_map(rgb // 2, scores), heat)
    assert heat_map(rgb, scores[::2, ::2]).shape == rgb.shape


def test_panels_lie_in_their_columns() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    wide = tuple(fitted(np.full((50, 100, 3), colour, np.uint8)) for colour in colours)
    tall = tuple(fitted(np.full((300, 60, 3), colour, np.uint8)) for colour in colours)
    strips = [Strip("wide", wide), Strip("tall" * 500, tall)]
    legend = [Legend(f"class number {i}", colours[i % 3]) for i in range(40)]
    sheet = np.array(Image.open(io.BytesIO(draw_sheet(("a", "b", "c"), strips, legend))))
    width, height = sheet_size(3, strips, legend)
    assert sheet.shape == (height, width, 3) and height > 2 * PANEL[1] // 2 + PANEL[1]
    for column, colour in enumerate(colours):
        part = sheet[:, column * width // 3 : (column + 1) * width // 3]
        others = [c for c in colours if c != colour]
        above_legend = part[: sheet_size(3, strips)[1]]
        # 240 x 120 pixels of the wide panel and 48 x 240 of the tall one, and none of the other columns'.
        assert abs((above_legend == colour).all(-1).sum() - (240 * 120 + 48 * 240)) < 50
        assert not any((above_legend == c).all(-1).any() for c in others)
    assert (sheet[:30] < 100).any(), "no captions"
    assert sheet_size(3, strips, legend)[1] > sheet_size(3, strips, legend[:1])[1], "one line of colours"


def test_masks_are_in_the_palettes_colours() -> None:
    mask = np.array([[0, 1, 255]], np.uint8)
    assert coloured(mask, voc_palette()).tolist() == [[[0, 0, 0], [128, 0, 0], [224, 224, 192]]]


def test_figure4_has_a_map_for_each_level_and_class(voc_folder: Path, run_folder: Path) -> None:
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    items = dataset.train_images[1:3]  # one class and two
    figure = FIGURES["figure4"](config, dataset, run_folder, items)
    assert [strip.name for strip in figure.strips] == ["photo_01: disc", "photo_02: square", "photo_02: disc"]
    assert figure.captions[1:4] == ("SA1 (stride 8)", "SA2 (stride 16)", "SA3 (stride 16)")
    for strip in figure.strips:
        assert len(strip.panels) == len(figure.captions) == 6
        assert {panel.shape for panel in strip.panels} == {strip.panels[0].shape}
        maps = strip.panels[1:]
        for one in range(len(maps)):
            for other in range(one):
                different = np.abs(maps[one].astype(int) - maps[other]).max(-1) > 8
                assert different.mean() > 0.02, (strip.name, one, other)


def test_figure5_shows_the_masks_of_the_run(voc_folder: Path, run_folder: Path) -> None:
    config, dataset, run = load_config(str(TINY)), read_dataset(voc_folder), load_run(run_folder)
    figure = FIGURES["figure5"](config, dataset, run_folder, dataset.train[:3])
    assert figure.captions[3:] == ("mask without dCRF", "mask with dCRF", "ground truth")
    unlike = 0
    for item, strip in zip(dataset.train, figure.strips, strict=False):
        assert item.mask is not None
        made = read_mask(run.folder(run_folder, "pseudo-masks") / f"{item.id}.png")
        assert np.array_equal(strip.panels[4], fitted(dataset.mask_palette[made]))
        truth = resize_mask(item.mask.read(), made.shape)
        assert np.array_equal(strip.panels[5], fitted(dataset.mask_palette[truth]))
        unlike += int((strip.panels[3] != strip.panels[4]).any())
    assert unlike, "the dense CRF changed nothing anywhere"
    assert figure.shown >= {1, 2}


def test_figure6_shows_what_the_run_measured(voc_folder: Path, run_folder: Path) -> None:
    config, dataset, run = load_config(str(TINY)), read_dataset(voc_folder), load_run(run_folder)
    figure = FIGURES["figure6"](config, dataset, run_folder, dataset.val)
    assert figure.captions == ("image", "DeepLabV3+", "ground truth")
    for item, strip in zip(dataset.val, figure.strips, strict=True):
        made = read_mask(run.folder(run_folder, "segmenter-val") / f"{item.id}.png")
        assert item.mask is not None and made.shape == item.mask.read().shape
        made = resize_mask(made, read_working_image(item.image, config.long_side).shape[:2])
        assert np.array_equal(strip.panels[1], fitted(dataset.mask_palette[made]))


def test_figures_are_written_with_what_they_are_of(voc_folder: Path, run_folder: Path, tmp_path: Path) -> None:
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    before = {path.parent.name for path in run_folder.glob("*/stage.json")}
    chosen = tmp_path / "ids.txt"
    chosen.write_text("photo_11\nphoto_08\nphoto_11\n")
    text = reproduce_paper("figure6", config, dataset, run_folder, image_list=chosen)
    assert {path.parent.name for path in run_folder.glob("*/stage.json")} == before
    assert str(run_folder / "reproduce" / "figure6.png") in text
    with Image.open(run_folder / "reproduce" / "figure6.png") as picture:
        assert picture.format == "PNG" and picture.width == 3 * (PANEL[0] + 6) + 6
    record = json.loads((run_folder / "reproduce" / "figure6.json").read_text())
    assert record["rows"] == ["photo_11", "photo_08"] and record["config"]["name"] == "tiny"


@pytest.mark.parametrize("name", FIGURES)
def test_without_masks_there_is_no_ground_truth(voc_folder: Path, run_folder: Path, name: str) -> None:
    dataset = without_masks(read_dataset(voc_folder))
    config = load_config(str(TINY), ["segmenter.schedule.epochs=1"])
    figure = FIGURES[name](config, dataset, run_folder, choose_images(name, dataset, 2, None))
    assert "ground truth" not in figure.captions
    assert all(len(strip.panels) == len(figure.captions) for strip in figure.strips)


def test_images_are_spread_over_the_list(voc_folder: Path, tmp_path: Path) -> None:
    dataset = read_dataset(voc_folder)
    assert [i.id for i in choose_images("figure5", dataset, 3, None)] == ["photo_00", "photo_02", "photo_04"]
    assert len(choose_images("figure6", dataset, 32, None)) == 4
    classless = replace(dataset, train=tuple(replace(item, classes=()) for item in dataset.train))
    with pytest.raises(UsageError, match="expected at least one"):
        reproduce_paper("figure4", load_config(str(TINY)), classless, tmp_path / "run")
    ids = tmp_path / "ids.txt"
    for text, message in (
        ("photo_08", "'photo_08' is not one of the 6 train images"),
        ("", "got 0 images, expected 1..32"),
    ):
        ids.write_text(text)
        with pytest.raises(UsageError, match=message):
            choose_images("figure4", dataset, 4, ids)
