"""Decisions on the page of a run, in a real browser: by key and by button, kept, exported, and taken by `review`."""

import json
from pathlib import Path

import pytest
from job_runs import run_segment
from web_driver import BROWSER, DRIVER, Browser, open_browser, wait_for

from multisa.runtime.bundle import Bundle
from multisa.runtime.review import review_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs Chromium and chromedriver on the PATH"),
]

RIGHT = "\ue014"
DECIDED = "Object.fromEntries([...document.querySelectorAll('article')].map((c) => [c.ariaLabel, c.dataset.decision]))"
SHOWN = "[...document.querySelectorAll('article:not([hidden])')].map((card) => card.ariaLabel)"


@pytest.fixture
def out(photos: Path, bundle: Bundle, tmp_path: Path) -> Path:
    run_segment(photos, tmp_path / "out", bundle)
    return tmp_path / "out"


def choose(browser: Browser, selector: str, value: str) -> None:
    event = "dispatchEvent(new Event('input'))"
    browser.run(f"((field) => {{ field.value = '{value}'; field.{event}; }})(document.querySelector('{selector}'))")


def export(browser: Browser, folder: Path) -> Path:
    path = folder / "downloads" / "decisions.json"
    path.unlink(missing_ok=True)
    browser.click("#export")
    wait_for(path.is_file)
    return path


def test_decisions_are_made_kept_and_exported(out: Path, bundle: Bundle, tmp_path: Path) -> None:
    with open_browser(tmp_path) as browser:
        browser.open(out / "report.html")
        first, second, third, fourth, fifth = browser.run(SHOWN)
        browser.press("a")  # no card has the focus yet
        assert set(browser.run(DECIDED).values()) == {"undecided"}
        browser.press(RIGHT, "a", RIGHT, "r", RIGHT, "l", RIGHT, "a", "a")  # the same key again takes it back
        browser.click(f"article[aria-label='{fifth}'] .decide button[value=reject]")
        browser.press("l", "r")  # keys work where a button has the focus, too
        expected = {first: "accept", second: "reject", third: "later", fourth: "undecided", fifth: "reject"}
        assert browser.run(DECIDED) == expected
        assert browser.run("document.getElementById('decided').value") == "1 accepted, 2 rejected, 1 later"
        pressed = "[...document.querySelectorAll('.decide [aria-pressed=true]')].map((one) => one.value).sort()"
        assert browser.run(pressed) == ["accept", "later", "reject", "reject"]
        browser.do("refresh")
        assert browser.run(DECIDED) == expected
        choose(browser, "#by-decision", "undecided")
        assert browser.run(SHOWN) == [fourth]
        browser.click(f"article[aria-label='{fourth}']")
        choose(browser, "#by-decision", "reject")
        browser.run(f"document.querySelector(\"article[aria-label='{second}']\").focus()")
        browser.press("a")  # it leaves the filter, and the next one has the focus
        assert browser.run(SHOWN) == [fifth] and browser.run("document.activeElement.ariaLabel") == fifth
        browser.click("#by-id")
        browser.press("a", "r", "l")  # typed
        assert browser.run("document.getElementById('by-id').value") == "arl"
        exported = export(browser, tmp_path)
        assert browser.run("document.getElementById('unkept').hidden")
    expected |= {second: "accept"}
    del expected[fourth]
    assert json.loads(exported.read_text())["decisions"] == expected
    review = review_run(out, exported, tmp_path / "review", bundle)
    assert review.counts == {"accept": 2, "reject": 1, "later": 1, "undecided": 1}
    with open_browser(tmp_path) as browser:  # the browser was closed
        browser.open(out / "report.html")
        assert browser.run(DECIDED) == {**expected, fourth: "undecided"}


def test_decisions_belong_to_their_run(out: Path, photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run_segment(photos, tmp_path / "other", bundle, min_area=0.2)
    with open_browser(tmp_path) as browser:
        browser.open(out / "report.html")
        browser.press(RIGHT, "a")
        browser.open(tmp_path / "other" / "report.html")
        assert set(browser.run(DECIDED).values()) == {"undecided"}
        slot = "'multisa-decisions:' + document.querySelector('main').dataset.run"
        browser.run(f'localStorage.setItem({slot}, \'{{"a.jpg": "burn", "b.png": "reject", "__proto__": 3\')')
        browser.do("refresh")  # damaged
        assert set(browser.run(DECIDED).values()) == {"undecided"}
        assert not browser.run("document.getElementById('unkept').hidden")
        browser.run(f'localStorage.setItem({slot}, \'{{"a.jpg": "burn", "b.png": "reject", "__proto__": 3}}\')')
        browser.do("refresh")  # altered: what is no decision is dropped
        assert [name for name, one in browser.run(DECIDED).items() if one != "undecided"] == ["b.png"]
        assert json.loads(export(browser, tmp_path).read_text())["decisions"] == {"b.png": "reject"}


def test_a_page_without_a_key_takes_no_decisions(out: Path, tmp_path: Path) -> None:
    """Such as the page of `multisa demo`, which is about two runs."""
    page = out / "report.html"
    text = page.read_text()
    start = text.index('data-run="') + len('data-run="')
    page.write_text(text[:start] + text[text.index('"', start) :])
    with open_browser(tmp_path) as browser:
        browser.open(page)
        browser.press(RIGHT, "a")
        assert browser.run("document.querySelectorAll('.decide').length") == 0
        assert browser.run("[...document.querySelectorAll('.decisions')].every((one) => one.hidden)")
        assert "5 of 5 shown" in browser.run("document.getElementById('shown').value")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(out: Path, tmp_path: Path, width: int) -> None:
    with open_browser(tmp_path) as browser:
        browser.resize(width, 900)
        browser.open(out / "report.html")
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.run("document.querySelector('article').focus()")
        browser.press("a", RIGHT, "r", RIGHT, "l")
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.getElementById('decided').value") == "1 accepted, 1 rejected, 1 later"
