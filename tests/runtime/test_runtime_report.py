"""report.html: which images it pictures, what it counts, and that no name becomes markup."""

import json
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.png import overlay_mask
from multisa.runtime.report.page import json_for_script, shown_shares
from multisa.runtime.report.report import ReportData, write_report
from multisa.runtime.report.summary import collect_statistics

HOSTILE = "\"><script>alert(1)</script>&'</script><!--.jpg"
CLASSES = ("background", "red thing", "green")
RUN = {
    "command": "label",
    "images": 3,
    "failures": 2,
    "seconds": 2.0,
    "images_per_second": 1.5,
    "workers": 1,
    "skipped": 1_234,
    "stage_seconds": {"cam": 1.9, "decode": 0.1},
    "bundle": {"name": "tiny", "sha256": "0" * 64},
    "backends": {"cam": {"backend": "onnxruntime-cpu", "precision": "fp32", "reason": "<no GPU>"}},
}


class Tags(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def links(self) -> list[str]:
        return [value for _, attrs in self.tags for key in ("src", "href") if (value := attrs.get(key))]


def record(index: int, uncertainty: float, **more: object) -> dict:
    shares = {"background": 0.75, "green": 0.25}
    facts = {"index": index, "image": f"{index}.jpg", "mask": f"masks/{index}.png", "width": 80, "height": 60}
    rates = {"confidence": 0.9, "disagreement": 0.1, "uncertainty": uncertainty}
    return {**facts, "classes": ["green"], "pixel_shares": shares, **rates, **more}


def report(
    out: Path, manifest: Manifest, records: list[dict], *, gone: int = -1, report_images: int = 200, **more: object
) -> str:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 2
    (out / "masks").mkdir(parents=True, exist_ok=True)
    for item in records:
        Image.fromarray(mask).save(out / str(item["mask"]))
    write_report(
        out,
        ReportData(
            manifest,
            RUN,
            records=iter(records),
            failures=more.get("failures", ()),
            read_image=lambda r: None if r["index"] == gone else np.full((60, 80, 3), 90, np.uint8),
            read_mask=lambda r: mask,
        ),
        report_images=report_images,
    )
    return (out / "report.html").read_text(encoding="utf-8")


def facts_of(page: str) -> list[dict]:
    start = page.index('id="facts">') + len('id="facts">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_most_uncertain_are_pictured_first(tmp_path: Path, manifest: Manifest) -> None:
    page = report(tmp_path, manifest, [record(0, 0.2), record(1, 0.9), record(2, 0.9), record(3, 0.5)])
    assert [fact["index"] for fact in facts_of(page)] == [1, 2, 3, 0]  # ties by index
    positions = [page.index(f'id="card-{i}"') for i in (1, 2, 3, 0)]
    assert positions == sorted(positions)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(
        f"{i:06d}.{kind}.jpg" for i in range(4) for kind in ("photo", "overlay")
    )


def test_links_lead_to_files_beside_the_page(tmp_path: Path, manifest: Manifest) -> None:
    odd = record(0, 0.3, mask="masks/100%#? &\"'.png")
    page = Tags(report(tmp_path, manifest, [odd, record(1, 0.4)]))
    assert len(page.links) == 2 * 5
    for link in page.links:
        assert (tmp_path / unquote(link)).is_file() and not link.startswith(("/", "http"))


@pytest.mark.parametrize("mask", ["/etc/hostname", "masks/../../secret.png", "masks/none.png", None])
def test_masks_that_are_no_files_of_the_run_have_no_link(tmp_path: Path, manifest: Manifest, mask: str | None) -> None:
    (tmp_path / "secret.png").touch()
    (tmp_path / "out" / "masks").mkdir(parents=True)
    found = collect_statistics([record(0, 0.5, mask=mask)], CLASSES, 1)
    write_report(
        tmp_path / "out",
        ReportData(
            manifest,
            RUN,
            records=found.report_images,
            failures=(),
            read_image=lambda _: None,
            read_mask=lambda _: np.zeros((60, 80), np.uint8),
        ),
    )
    links = Tags((tmp_path / "out/report.html").read_text()).links
    assert links == ["report/000000.overlay.jpg"] * 2


def test_nothing_from_data_becomes_markup(tmp_path: Path, manifest: Manifest) -> None:
    hostile = record(0, 0.3, image=HOSTILE, missing=[HOSTILE], labels_from=HOSTILE)
    failures = [{"image": HOSTILE, "reason": "<img src=x onerror=alert(1)>"}]
    text = report(tmp_path, manifest, [hostile], failures=failures)
    page = Tags(text)
    assert [tag for tag, _ in page.tags].count("script") == 2 and text.count("</script>") == 2
    assert not any(tag == "img" and attrs.get("src") == "x" for tag, attrs in page.tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert facts_of(text)[0]["id"] == HOSTILE  # whole, inside JSON
    assert page.text.count(HOSTILE) >= 2 and "onnxruntime-cpu, fp32, <no GPU>" in page.text


def test_json_cannot_end_its_script() -> None:
    text = json_for_script([{"id": "</script><!--\u2028&"}])
    assert not set("<>&\u2028") & set(text) and json.loads(text) == [{"id": "</script><!--\u2028&"}]
    with pytest.raises(ValueError, match="JSON"):
        json_for_script([float("nan")])


def test_what_the_page_says(tmp_path: Path, manifest: Manifest) -> None:
    failures = [{"image": f"{i}.jpg", "reason": f"cut at byte {i}"} for i in range(25)]
    records = [record(0, 0.3, missing=["red thing"]), record(1, 1.0, labels_from="scores")]
    text = report(tmp_path, manifest, records, failures=failures, gone=1)
    words = " ".join(Tags(text).text)
    for part in (
        *("multisa label", "tiny · onnxruntime-cpu", "skipped", "labelled, not found", "labels from scores"),
        *(
            "The bottleneck is cam",
            "95%",
            "cut at byte …",
            "25 images",
            "1,234",
            "and 5 more",
            "the image can no longer be read",
        ),
        *("25.00%", "uncertainty", "Gallery: 2 images"),
    ):
        assert part in words, part
    assert not (tmp_path / "report/000001.photo.jpg").exists()
    assert "prefers-color-scheme: dark" in text and "http://" not in text.replace('http-equiv="', "")


def test_one_pass_and_an_even_sample() -> None:
    passes = []

    def records() -> Iterator[dict]:
        passes.append(1)
        for index in range(10_000):
            yield record(index, (index * 7919 % 10_000) / 10_000)

    found = collect_statistics(records(), CLASSES, 200)
    assert len(passes) == 1 and found.images == 10_000 and len(found.report_images) == 200
    assert len(found.samples) == 20
    uncertain = [r for r in found.report_images if r["index"] not in found.samples]
    assert {r["uncertainty"] for r in uncertain} == {1 - (i + 1) / 10_000 for i in range(180)}
    places = np.array(sorted(found.samples))
    assert (np.diff(places) > 250).all() and (np.diff(places) < 750).all()
    assert found.uncertainties == [500] * 20 and found.uncertainty == pytest.approx(0.49995)


@pytest.mark.parametrize("images", [0, 1, 9, 10, 11, 19, 20, 21, 300])
@pytest.mark.parametrize("most", [0, 1, 10])
def test_never_more_and_never_twice(images: int, most: int) -> None:
    found = collect_statistics((record(i, 0.5) for i in range(images)), CLASSES, most)
    indices = [r["index"] for r in found.report_images]
    assert len(set(indices)) == len(indices) == min(images, most)
    assert len(found.samples) == (most // 10 if images > most else 0)


def test_memory_does_not_grow_with_the_run() -> None:
    peaks = []
    for images in (2_000, 20_000):
        tracemalloc.start()
        collect_statistics((record(i, i % 97 / 97) for i in range(images)), CLASSES, 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_balance_counts_images_and_pixels() -> None:
    records = [
        record(0, 0.0, pixel_shares={"background": 1.0}, missing=["green"]),
        record(1, 0.0, pixel_shares={"red thing": 0.5, "green": 0.5}, width=160, height=120),
    ]
    found = collect_statistics(records, CLASSES, 0)
    assert found.images_of_class == {"red thing": 1, "green": 1} and found.report_images == []
    assert found.pixel_shares == {"background": 0.2, "red thing": 0.4, "green": 0.4}
    assert found.missing_of_class == {"red thing": 0, "green": 1}


def test_shares_that_round_to_nothing_are_not_shown() -> None:
    shares = {"background": 0.9991, "red thing": 0.0005, "green": 0.0004}
    assert shown_shares(record(0, 0.1, pixel_shares=shares), "background") == {"red thing": 0.0005}


def test_pictures_of_an_earlier_report_go_and_nothing_else_does(tmp_path: Path, manifest: Manifest) -> None:
    report(tmp_path, manifest, [record(i, 0.5) for i in range(3)])
    (tmp_path / "report" / "mine.jpg").touch()
    first = (tmp_path / "report/000000.overlay.jpg").read_bytes()
    report(tmp_path, manifest, [record(0, 0.5)])
    left = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert left == ["000000.overlay.jpg", "000000.photo.jpg", "mine.jpg"]
    assert (tmp_path / "report/000000.overlay.jpg").read_bytes() == first


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / "000000.photo.jpg"
    kept.touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        report(tmp_path / "out", manifest, [record(0, 0.5)])
    assert kept.exists()


def test_pictures_are_shrunk(tmp_path: Path, manifest: Manifest) -> None:
    write_report(
        tmp_path,
        ReportData(
            manifest,
            RUN,
            records=[record(12, 0.5, width=1280, height=960)],
            failures=(),
            read_image=lambda _: np.zeros((960, 1280, 3), np.uint8),
            read_mask=lambda _: np.ones((960, 1280), np.uint8),
        ),
    )
    for kind in ("photo", "overlay"):
        with Image.open(tmp_path / f"report/000012.{kind}.jpg") as image:
            assert image.size == (640, 480)


def test_overlay_blends_regions_and_outlines_them() -> None:
    rgb = np.full((9, 9, 3), 100, np.uint8)
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    result = overlay_mask(rgb, mask, np.array([[9, 9, 9], [200, 0, 0]], np.uint8))
    assert result[0, 0].tolist() == [100, 100, 100]
    assert result[4, 4].tolist() == [150, 50, 50]
    assert result[2, 4].tolist() == [228, 128, 128]
    mask[:, 8] = 255  # without a colour
    again = overlay_mask(rgb, mask, np.array([[9, 9, 9], [200, 0, 0]], np.uint8))
    np.testing.assert_array_equal(again, result)
