"""The made-up report: its page and figures, what they never let through, and files that are no report."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.bench_file import number, one_line, read_bench, validate_bench
from multisa.benchmarks.report import summary_lines, write_report
from multisa.runtime.errors import UsageError

Bench = dict[str, Any]
HOSTILE = "</style><script>alert(1)</script>\" onload='x' $x_1$ |`*_<b>&\x1b[31m\u202e\n# head"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it; drawing takes seconds."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def written(bench: Bench, folder: Path) -> str:
    return write_report(bench, folder).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_has_tables_and_figures(made_up: Bench, tmp_path: Path) -> None:
    page = Page(written(made_up, tmp_path / "one"))
    images = [str(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(set(images)) == 10
    for image in images:
        path = tmp_path / "one" / image
        ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert path.stat().st_size > 5000
    assert {path.name for path in (tmp_path / "one" / "figures").iterdir()} == {Path(i).name for i in images}
    assert {"ONNX Runtime, CPU fp32 (default)", "31.2", "61.23", "26,000", "117"} <= set(page.text)
    # Nothing is loaded from elsewhere, no script runs, and a phone shows it at its own width.
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    # The same report gives the same bytes.
    write_report(deepcopy(made_up), tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_page_says_so(made_up: Bench, tmp_path: Path) -> None:
    html = written(made_up, tmp_path)
    assert "<img" not in html and "install matplotlib" in html and "26,000" in html


@pytest.mark.usefixtures("no_matplotlib")
def test_what_did_not_run_has_its_reason(made_up: Bench, tmp_path: Path) -> None:
    made_up["kernels"] = [{"kernel": "dense CRF", "way": "", "problem": "pydensecrf is not installed"}]
    texts = set(Page(written(made_up, tmp_path)).text)
    assert {"no C++ compiler: apt install g++", "no GPU is here", "batches: not enough memory"} <= texts
    lines = summary_lines(made_up)
    assert "segment: TensorRT fp16: not measured: no GPU is here" in lines
    assert "kernels: dense CRF:: not measured: pydensecrf is not installed" in lines


def test_names_are_never_markup(made_up: Bench, tmp_path: Path) -> None:
    for stage, keys in (
        ("segment", ("backend", "precision", "device")),
        ("label", ("recipe",)),
        ("kernels", ("kernel", "way", "size")),
    ):
        for index, row in enumerate(made_up[stage]):
            row.update(dict.fromkeys(keys, f"{HOSTILE}{index}"))
            row.get("limit", {}).update(text=HOSTILE)
    made_up["segment"][5]["problem"] = made_up["kernels"][1]["threads"] = HOSTILE
    made_up["label"][0]["stages_ms"][HOSTILE] = 5.0
    made_up["environment"] = {HOSTILE: HOSTILE}
    html = written(made_up, tmp_path)
    page = Page(html)
    allowed = "html head meta title style body h1 h2 h3 p div table thead tbody tr th td figure img"
    assert {tag for tag, _ in page.tags} <= set(allowed.split(" "))
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "\x1b" not in html and "\u202e" not in html
    for path in (tmp_path / "figures").iterdir():
        ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert all("\x1b" not in line and "\n" not in line for line in summary_lines(made_up))


@pytest.mark.parametrize("stage", ["segment", "label", "kernels"])
@pytest.mark.usefixtures("no_matplotlib")
def test_one_stage_alone(made_up: Bench, tmp_path: Path, stage: str) -> None:
    bench = {key: made_up[key] for key in ("schema_version", "environment", stage)}
    titles = re.findall(r"<h2>(\w+)</h2>", written(bench, tmp_path))
    assert titles == [{"segment": "Segmenting", "label": "Labelling", "kernels": "Kernels"}[stage], "Environment"]
    assert summary_lines(bench)


def test_rows_of_names_alone(made_up: Bench, tmp_path: Path) -> None:
    """Everything but names may be missing or null."""
    kept = {"backend", "precision", "recipe", "kernel", "way"}
    bench: Bench = {"schema_version": 2, "environment": {}}
    for stage in ("segment", "label", "kernels"):
        bench[stage] = [
            {key: value if key in kept else None for key, value in row.items()} for row in made_up[stage][:1]
        ]
    html = written(bench, tmp_path)
    assert "<img" not in html and "ONNX Runtime, CPU fp32" in html
    write_report({"schema_version": 2, "environment": {}}, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 1, "schema_version: got 1, expected 2"),
        (("schema_version",), True, "schema_version: got True, expected 2"),
        (("environment",), [], "environment: got a list, expected an object"),
        (("segment",), {}, "segment: got an object, expected a list"),
        (("segment", 0), None, "segment[0]: got None, expected an object"),
        (("segment", 0, "backend"), None, "segment[0].backend: got None, expected a text"),
        (("segment", 0, "precision"), 3, "segment[0].precision: got 3, expected a text"),
        (("label", 0, "recipe"), [], "label[0].recipe: got a list, expected a text"),
        (("kernels", 0, "way"), None, "kernels[0].way: got None, expected a text"),
    ],
)
def test_what_is_no_report_is_refused(made_up: Bench, path: tuple[str | int, ...], value: object, message: str) -> None:
    inside: Any = made_up
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(UsageError) as error:
        validate_bench(made_up)
    assert message in str(error.value)
    assert "give a bench.json written by this version" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "the file: got a list, expected an object"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_reports(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_bench(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.usefixtures("no_matplotlib")
def test_values_of_the_wrong_type_are_missing_values(made_up: Bench, tmp_path: Path) -> None:
    made_up["later"] = {"a": [[[]]]}  # a key of a later version
    made_up["segment"][0].update(miou="high", latency_ms=[], batches={}, images_per_second=float("nan"))
    (tmp_path / "bench.json").write_text(json.dumps(made_up), encoding="utf-8")
    assert "nan" not in written(read_bench(tmp_path / "bench.json"), tmp_path)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (25349.4, "25,349"),
        (104.7, "105"),
        (31.16, "31.2"),
        (2.6, "2.60"),
        (0.0476, "0.0476"),
        (1e-5, "1.0e-05"),
        (0.0, "0"),
        (None, "–"),
    ],
)
def test_numbers(figure: float | None, text: str) -> None:
    assert number(figure) == text


def test_texts_become_one_harmless_line() -> None:
    assert one_line("a\x1b[2J\tb\r\nc\u202e\x00\u2028d") == "a [2J b c d"


def test_importing_the_report_loads_nothing_heavy() -> None:
    program = (
        "import sys, multisa.benchmarks.report\n"
        "assert not {'matplotlib', 'numpy', 'torch', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
