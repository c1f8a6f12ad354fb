"""The page in a real browser, from file://: filters, order and keys work, and it stands without scripts."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.report.report import ReportData, write_report

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")]

# Runs after the page's own script and leaves what it saw in the page.
DRIVER = """
const $ = (id) => document.getElementById(id);
const cards = () => [...document.querySelectorAll("article")].filter((card) => !card.hidden);
const shown = () => cards().map((card) => +card.id.slice(5));
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); return shown(); };
const press = (key, on = document.activeElement) =>
  on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const focused = (key) => { press(key); return document.activeElement.id; };
const seen = { start: shown(), tools: !document.querySelector(".tools").hidden };
seen.by_id = set("by-id", "SCRIPT"); set("by-id", "");
seen.red = set("by-class", "red thing"); set("by-class", "");
seen.uncertain = set("least", "0.5"); seen.between = set("most", "0.7"); seen.none = set("least", "0.69");
seen.told = !document.querySelector(".none").hidden;
$("reset").click(); seen.reset = shown();
$("only-missing").checked = true; seen.missing = set("only-missing", "on"); $("reset").click();
seen.sorted_by_id = set("sort", "id"); seen.by_confidence = set("sort", "confidence"); $("reset").click();
seen.back = shown();
seen.keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"].map(focused);
const pictures = () => ["photo", "overlay"].map((kind) => document.querySelector("." + kind).offsetWidth > 0);
seen.both = pictures(); press("o"); seen.o = pictures(); press("o"); seen.oo = pictures();
press("/"); seen.find = document.activeElement.id; press("o"); seen.typed = pictures();
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
"""


@pytest.fixture
def page(tmp_path: Path, manifest: Manifest) -> Path:
    facts = [
        ("c.jpg", 0.6, 0.7, {"green": 0.2}, []),
        ("a.jpg", 0.9, 0.8, {"green": 0.1, "red thing": 0.1}, []),
        ("</script><b>.jpg", 0.1, 0.9, {"background": 1.0}, ["red thing"]),
    ]
    records = [
        {"index": i, "image": image, "mask": None, "width": 80, "height": 60, "pixel_shares": shares}
        | {"uncertainty": uncertainty, "confidence": confidence, "disagreement": 0.1, "missing": missing}
        for i, (image, uncertainty, confidence, shares, missing) in enumerate(facts)
    ]
    write_report(
        tmp_path,
        ReportData(
            manifest,
            {},
            records=records,
            failures=(),
            read_image=lambda _: np.full((60, 80, 3), 90, np.uint8),
            read_mask=lambda _: np.ones((60, 80), np.uint8),
        ),
    )
    return tmp_path / "report.html"


def dom(page: Path) -> str:
    """The page's elements after a browser has opened it, as HTML."""
    command = [
        *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"),
        *(f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=2000"),
    ]
    result = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


def test_its_own_policy_lets_its_script_run(page: Path) -> None:
    assert "3 of 3 shown" in dom(page)


def test_without_scripts_the_gallery_stands(page: Path) -> None:
    page.write_text(re.sub(r"script-src 'sha256-[^']*'", "script-src 'none'", page.read_text()))
    text = dom(page)
    assert "3 of 3 shown" not in text and '<div class="tools" hidden' in text
    assert text.count("<article") == 3 and not re.search(r"<article[^>]* hidden", text)


def test_another_script_is_not_run(page: Path) -> None:
    page.write_text(page.read_text().replace("</body>", f"<script>{DRIVER}</script></body>"))
    assert 'id="seen"' not in dom(page)


def test_filters_order_and_keys(page: Path) -> None:
    text = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"))
    match = re.search(r'<pre id="seen">(.*?)</pre>', dom(page))
    assert match
    assert json.loads(match[1]) == {
        "start": [1, 0, 2],
        "tools": True,
        "by_id": [2],
        "red": [1, 2],
        "uncertain": [1, 0],
        "between": [0],
        "none": [],
        "told": True,
        "reset": [1, 0, 2],
        "missing": [2],
        "sorted_by_id": [2, 1, 0],
        "by_confidence": [0, 1, 2],
        "back": [1, 0, 2],
        # Three cards in one row: up and down have nowhere to go.
        "keys": ["card-1", "card-0", "card-1", "card-1", "card-1"],
        "both": [True, True],
        "o": [False, True],
        "oo": [True, False],
        "find": "by-id",
        "typed": [True, False],
    }
