"""The page of `multisa tune`: its figures against their definitions, its pictures, names, refusals, the browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.files import write_json_atomically
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.predict.postprocess import resize_maps, with_gains
from multisa.runtime.records import record_to_dict
from multisa.runtime.report.page import script_hash
from multisa.training.config import load_config
from multisa.training.data import Dataset, read_dataset
from multisa.training.inference import load_maps
from multisa.training.run_record import RUN_RECORD, StageRecord, load_run
from multisa.training.stage_cache import StageCache
from multisa.training.stages import RunStages, make_pseudo_labels
from multisa.training.thresholds import SCORE_BINS
from multisa.training.tune import REACH, SCORES, write_tune_page

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny.toml")
BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
EMPTY = {"meta", "img", "input", "link", "br"}  # elements without an end tag


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text; fails where end tags are missing."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [found for name, found in self.found if name == tag and found.get("class", "") == kind]


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose background score comes from Yen's criterion; its segmenter is that of the other run."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("tune") / "run"))
    config = load_config(str(TINY), ["background_from=yen"])
    stages = RunStages(StageCache(folder), config, read_dataset(voc_folder))
    label = make_pseudo_labels(stages).label
    made = tuple(StageRecord(s.name, s.folder.name, s.digest, s.seconds) for s in stages.cache.stages)
    run = replace(load_run(folder), config=config, label=label, stages=made)
    write_json_atomically(folder / RUN_RECORD, record_to_dict(run))
    return folder


@pytest.fixture(scope="module")
def page(run_folder: Path, voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "tune.html"
    write_tune_page(run_folder, read_dataset(voc_folder), path, num_images=3, with_masks=True)
    return path.read_text(encoding="utf-8")


def facts_of(page: str) -> tuple[list[list[int]], dict[str, list[float | None]]]:
    (found,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page)
    colours, curves, reach = json.loads(found)
    assert reach == REACH
    return colours, curves


def gained_maps(folder: Path, dataset: Dataset) -> list[np.ndarray]:
    run = load_run(folder)
    walked = run.folder(folder, "walk")
    return [
        with_gains(load_maps(walked / f"{item.id}.npy"), item.classes, run.label.class_gain)
        for item in dataset.train_images
    ]


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    elements = Elements(page)
    articles = [found["aria-label"] for found in elements.all("article")]
    assert articles == ["photo_00", "photo_02", "photo_05"]
    assert len(elements.all("canvas", "heat")) == len(elements.all("canvas", "mask")) == 3
    assert not re.search(r"https?:", page)
    assert all(url.startswith("data:image/") for url in re.findall(r"(?:src|href)=\"([^\"]*)", page))
    assert all(url.startswith("data:image/jpeg;base64,") for url in re.findall(r"url\(([^)]*)", page))
    (policy,) = (found["content"] for found in elements.all("meta") if "http-equiv" in found)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert "default-src 'none'" in policy and f"script-src '{script_hash(script)}'" in policy


def test_the_page_tells_how_the_score_was_chosen(page: str, run_folder: Path) -> None:
    run = load_run(run_folder)
    text = "".join(Elements(page).text)
    assert f"The background score is {run.label.background:.3f}. Yen's criterion found it" in text
    assert "No mask was used." in text and "for comparison; not used" in text and "the regret is" in text
    assert "certain background below 0.200" in text and "certain foreground above 0.500" in text
    for name, gain in zip(run.classes[1:], run.label.class_gain, strict=True):
        own = run.label.background / gain
        (row,) = re.findall(
            rf">{name}</span></th><td class=\"number\">([\d.]+)</td><td class=\"number\">([\d.]+)", page
        )
        assert float(row[0]) == pytest.approx(own, abs=2e-3) and float(row[1]) == pytest.approx(gain, abs=0.005)
    (slider,) = (found for found in Elements(page).all("input") if found["type"] == "range")
    assert (slider["value"], slider["step"]) == (f"{run.label.background:.3f}", "0.001")


def test_curves_are_those_of_the_masks(page: str, run_folder: Path, voc_folder: Path) -> None:
    dataset = read_dataset(voc_folder)
    _, curves = facts_of(page)
    assert {len(curve) for curve in curves.values()} == {len(SCORES)}
    strengths = np.concatenate([maps.max(0).ravel() for maps in gained_maps(run_folder, dataset)])
    steps = np.floor(strengths.clip(0, 1 - 1e-6) * SCORE_BINS).astype(int)
    for place, score in enumerate(SCORES):
        low, at, high = (steps >= round((score + away) * SCORE_BINS) for away in (-REACH, 0.0, REACH))
        assert curves["foreground"][place] == pytest.approx(100 * at.mean(), abs=0.01)
        if score < REACH or score > 1 - REACH or not low.any():
            assert curves["change"][place] is None
        else:
            assert curves["change"][place] == pytest.approx(100 * (low & ~high).sum() / low.sum(), abs=0.01)
    for place in (19, 49, 79):
        confusion = np.zeros((3, 3), np.int64)
        for item, maps in zip(dataset.train, gained_maps(run_folder, dataset), strict=False):
            assert item.mask is not None
            truth = item.mask.read()
            full = resize_maps(maps, (truth.shape[0], truth.shape[1]))
            winner = np.array(item.classes, np.uint8)[full.argmax(0)]
            confusion += confusion_matrix(np.where(full.max(0) >= SCORES[place], winner, 0).astype(np.uint8), truth, 3)
        assert curves["miou"][place] == pytest.approx(100 * mean_iou(confusion), abs=0.5)  # scores in steps of 0.01


def test_pictures_hold_the_scores_the_classes_and_the_masks(page: str, run_folder: Path, voc_folder: Path) -> None:
    dataset, run = read_dataset(voc_folder), load_run(run_folder)
    colours, _ = facts_of(page)
    elements = Elements(page)
    for place, scores, mask in zip((0, 2, 5), elements.all("img", "scores"), elements.all("img", "run"), strict=True):
        item, maps = dataset.train_images[place], gained_maps(run_folder, dataset)[place]
        packed = picture(scores["src"])
        strength, winners = np.split(np.asarray(packed), 2)
        np.testing.assert_allclose(strength / 255, maps.max(0).clip(0, 1), atol=0.5 / 255 + 1e-6)
        assert np.array_equal(winners, np.array(item.classes, np.uint8)[maps.argmax(0)])
        drawn = picture(mask["src"])
        made = read_mask(run.folder(run_folder, "pseudo-masks") / f"{item.id}.png")
        assert drawn.size == made.shape[::-1] and np.array_equal(np.asarray(drawn), made)
        rgba = np.asarray(drawn.convert("RGBA"))
        assert not rgba[made == 0, 3].any() and (rgba[made > 0, :3] == np.array(colours)[made[made > 0]]).all()


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_names_are_text(run_folder: Path, voc_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    run, dataset = load_run(folder), read_dataset(voc_folder)
    name = "</script><img src=x>&'"
    items = (replace(dataset.train_images[0], id="a<b>&'\""), *dataset.train_images[1:])
    dataset = replace(dataset, class_names=("background", name, "disc"), train_images=items)
    for stage, suffix in (("walk", ".npy"), ("cam-maps", ".npy"), ("pseudo-masks", ".png")):
        there = run.folder(folder, stage)
        shutil.copy(there / f"photo_00{suffix}", there / f"{items[0].id}{suffix}")
    config, digest = replace(run.config, name=name), dataset.train_images_digest()
    run = replace(run, config=config, classes=dataset.class_names, data_digest=digest)
    write_json_atomically(folder / RUN_RECORD, record_to_dict(run))
    write_tune_page(folder, dataset, tmp_path / "tune.html", num_images=1)
    elements = Elements((tmp_path / "tune.html").read_text(encoding="utf-8"))
    assert [found["aria-label"] for found in elements.all("article")] == [items[0].id]
    text = "".join(elements.text)
    assert f"Background score of {name}" in text and text.count(name) >= 4
    assert len([tag for tag, _ in elements.found if tag == "script"]) == 2
    assert "x" not in [found.get("src") for tag, found in elements.found if tag == "img"]
    assert "mIoU on the train list" not in text  # no mask was read


def test_what_is_refused(run_folder: Path, voc_folder: Path, tmp_path: Path) -> None:
    dataset, path = read_dataset(voc_folder), tmp_path / "tune.html"
    with pytest.raises(UsageError, match=r"run\.json: missing; expected the output folder of a finished"):
        write_tune_page(tmp_path, dataset, path, num_images=1)
    (tmp_path / "run").mkdir()
    shutil.copy(run_folder / RUN_RECORD, tmp_path / "run")
    with pytest.raises(UsageError, match="got no finished stage, expected one; run `multisa train` again"):
        write_tune_page(tmp_path / "run", dataset, path, num_images=1)
    with pytest.raises(UsageError, match=r"got other images, classes or labels than .* was trained on"):
        write_tune_page(run_folder, replace(dataset, train_images=dataset.train_images[1:]), path, num_images=1)
    with pytest.raises(UsageError, match="got --masks, but no image of the train list has a mask; leave it out"):
        write_tune_page(run_folder, replace(dataset, train=()), path, num_images=1, with_masks=True)
    folder = Path(shutil.copytree(run_folder, tmp_path / "whole"))
    (load_run(folder).folder(folder, "walk") / "photo_03.npy").unlink()
    with pytest.raises(MultisaError, match=r"photo_03\.npy: missing, .*; run `multisa train` again"):
        write_tune_page(folder, dataset, path, num_images=1)
    assert not path.exists()


def test_only_earlier_pages_are_replaced(run_folder: Path, voc_folder: Path, tmp_path: Path) -> None:
    dataset, path = read_dataset(voc_folder), tmp_path / "tune.html"
    path.write_text("<!doctype html><title>mine</title>")
    for wrong, message in (
        (path, "exists and is no page of `multisa tune`"),
        (tmp_path / "tune.txt", r"got a name without \.html"),
        (voc_folder / "tune.html", "is inside the data set"),
    ):
        with pytest.raises(UsageError, match=message):
            write_tune_page(run_folder, dataset, wrong, num_images=1)
    assert path.read_text() == "<!doctype html><title>mine</title>" and not (voc_folder / "tune.html").exists()
    path.unlink()
    for count in (1, 2):
        write_tune_page(run_folder, dataset, path, num_images=count)
        assert len(Elements(path.read_text(encoding="utf-8")).all("article")) == count


@pytest.mark.parametrize(
    ("background_from", "told", "note"),
    [
        ("train-masks", "its masks have the highest mIoU on the train list", "the score was chosen on these masks"),
        ("config", "from the settings. Yen's criterion finds", "for comparison; not used"),
    ],
)
def test_the_command_tells_what_else_chose_the_score(
    tiny_run: Path, voc_folder: Path, tmp_path: Path, background_from: str, told: str, note: str
) -> None:
    folder, path = Path(shutil.copytree(tiny_run, tmp_path / "run")), tmp_path / "tune.html"
    run = load_run(folder)
    run = replace(run, config=replace(run.config, background_from=background_from))
    write_json_atomically(folder / RUN_RECORD, record_to_dict(run))
    arguments = ["tune", str(folder), "--data", str(voc_folder), "-o", str(path), "--masks", "--images", "50"]
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 0, result.output
    assert told in result.stdout and "the regret is" in result.stdout and f"written: {path}, 8 images" in result.stdout
    page = path.read_text(encoding="utf-8")
    assert note in page and len(Elements(page).all("article")) == 8


DRIVER = """
const slider = document.getElementById("score");
const painted = () => [...document.querySelectorAll(".mask")].map((canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let at = 3; at < data.length; at += 4) count += data[at] > 0;
  return count / (data.length / 4);
});
const at = (value) => { slider.value = value; slider.dispatchEvent(new Event("input")); return painted(); };
setTimeout(() => {
  const seen = { shown: document.getElementById("shown").value, masks: ["0.01", "0.3", "0.6", "0.99"].map(at) };
  document.getElementById("reset").click();
  seen.back = document.getElementById("shown").value;
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
}, 500);
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_slider_in_a_browser(page: str, run_folder: Path, voc_folder: Path, tmp_path: Path, width: int) -> None:
    text = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page)
    path = tmp_path / "tune.html"
    path.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    match = re.search(r'<pre id="seen">(.*?)</pre>', result.stdout)
    assert match
    seen = json.loads(match[1])
    assert seen["wide"] and seen["shown"] == seen["back"]
    assert seen["shown"].startswith(f"{load_run(run_folder).label.background:.3f}: foreground ")
    dataset = read_dataset(voc_folder)
    maps = [gained_maps(run_folder, dataset)[place] for place in (0, 2, 5)]
    for score, shares in zip((0.01, 0.3, 0.6, 0.99), seen["masks"], strict=True):
        # The browser enlarges the scores before it compares them.
        assert shares == pytest.approx([(one.max(0) > score).mean() for one in maps], abs=0.04)
