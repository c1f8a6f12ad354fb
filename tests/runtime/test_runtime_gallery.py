"""The page: overlays are right, links lead to files, names cannot become markup."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.bulk import RunOptions
from multisa.runtime.bundle import Bundle, Manifest
from multisa.runtime.gallery import overlay, write_gallery
from multisa.runtime.segment import segment_images

ODD_NAME = "<script>alert('x')</script>&\" 100%#?.png".replace("/", "∕")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def page(tmp_path: Path, photos: Path, bundle: Bundle) -> Path:
    (photos / "b.png").rename(photos / ODD_NAME)
    segment_images(photos, tmp_path / "out", bundle=bundle, options=RunOptions(gallery=True))
    return tmp_path / "out" / "index.html"


def test_links_lead_to_files_in_the_folder(page: Path) -> None:
    parser = Links()
    parser.feed(page.read_text(encoding="utf-8"))
    assert len(parser.links) == 5 * 5
    for link in parser.links:
        assert (page.parent / unquote(link)).is_file()
        assert not link.startswith(("/", "http"))


def test_names_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    parser = Links()
    parser.feed(text)
    assert "script" not in parser.tags
    assert ODD_NAME in parser.text


def test_page_is_complete(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("5 images", "red thing", "rgb(200 40 40)", "prefers-color-scheme: dark", "confidence"):
        assert part in text


def test_shares_that_round_to_nothing_are_not_shown(tmp_path: Path, manifest: Manifest) -> None:
    facts = {"image": "a.jpg", "mask": "masks/a.png", "width": 9, "height": 9, "confidence": 0.9}
    shares = {"background": 0.9991, "red thing": 0.0005, "green": 0.0004}
    write_gallery(tmp_path, [{**facts, "pixel_shares": shares}], manifest, title="t")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "red thing <b>0.1%</b>" in text and text.count("red thing") == 2  # in the legend, too
    assert "green" not in text and ">0.0%" not in text


def test_pictures_are_shrunk(tmp_path: Path, bundle: Bundle) -> None:
    Image.new("RGB", (1280, 960), (255, 0, 0)).save(tmp_path / "large.png")
    segment_images(tmp_path / "large.png", tmp_path / "out", bundle=bundle, options=RunOptions(gallery=True))
    for kind in ("photo", "overlay"):
        with Image.open(tmp_path / f"out/overlays/large.{kind}.jpg") as image:
            assert image.size == (640, 480)


def test_overlay_blends_regions_and_outlines_them() -> None:
    rgb = np.full((9, 9, 3), 100, np.uint8)
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    palette = np.array([[9, 9, 9], [200, 0, 0]], np.uint8)
    result = overlay(rgb, mask, palette)
    assert result.dtype == np.uint8
    assert result[0, 0].tolist() == [100, 100, 100]
    assert result[4, 4].tolist() == [150, 50, 50]
    assert result[2, 4].tolist() == [228, 128, 128]
