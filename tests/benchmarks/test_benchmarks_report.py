"""The report of made-up figures: what its files say, what they never let through; the same bytes always."""

import csv
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest

from multisa.benchmarks.report import summary_lines, write_report
from multisa.benchmarks.report.cells import number, plain
from multisa.benchmarks.report.charts import Chart, all_charts, pareto
from multisa.benchmarks.report.svg import draw
from multisa.benchmarks.report.text import markdown, markdown_text, tidy_csv

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


def written(bench: Bench, folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in write_report(bench, folder)}


def figures(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed; whole pages take seconds with it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_the_three_files_and_their_bytes(made_up: Bench, tmp_path: Path) -> None:
    paths = write_report(made_up, tmp_path / "one")
    assert [path.name for path in paths] == ["bench.csv", "bench.md", "bench.html"]
    assert sorted((tmp_path / "one").iterdir()) == sorted(paths)  # and no temporary files
    table, text, html = (path.read_text(encoding="utf-8") for path in paths)
    again = deepcopy(made_up)
    assert (tidy_csv(again), markdown(again)) == (table, text)
    charts = [chart for _, chart in all_charts(again)]
    assert len(charts) == html.count("<svg ") == 11
    one_of_each = [next(chart for chart in charts if isinstance(chart, kind)) for kind in get_args(Chart)]
    assert all(drawing in html for drawing in draw(one_of_each))
    page = Page(html)
    assert "No plots" not in html
    # Several drawings in one page: what one refers to must not be found in another.
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    refs = {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'xlink:href="#([^"]+)"', html)}
    assert refs and refs <= set(ids)
    # Nothing is loaded, and colours follow the page.
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "image")]
    assert set(re.findall(r"https?://[^\"' <)]+", html)) <= {"http://www.w3.org/1999/xlink"}
    for drawing in re.findall(r"<svg .*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert not re.search(r"(fill|stroke): #", drawing), "a colour that dark pages do not change"
    # Text stays text, what is written at the bars included.
    assert "OpenVINO fp32" in page.text and "31.2  (2.60×)" in html and "26,000×" in page.text


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_page_says_so(made_up: Bench, tmp_path: Path) -> None:
    html = written(made_up, tmp_path)["bench.html"]
    assert "<svg" not in html
    assert "matplotlib is not installed, which draws the plots: pip install matplotlib" in html
    assert "26,000×" in html and "117×" in html


def test_what_did_not_run_has_its_reason_everywhere(
    made_up: Bench, tmp_path: Path, no_matplotlib: None
) -> None:
    texts = written(made_up, tmp_path)
    assert "<td" in texts["bench.html"] and "no C++ compiler: apt install g++" in texts["bench.html"]
    assert "| torch.compile fp32 | no C++ compiler: apt install g++ |" in texts["bench.md"]
    (row,) = (row for row in figures(texts["bench.csv"]) if row["engine"] == "tensorrt")
    assert (row["metric"], row["value"], row["unit"]) == ("problem", "no GPU is here", "")
    assert "segment: TensorRT fp16: not measured: no GPU is here" in summary_lines(made_up)


@pytest.mark.usefixtures("no_matplotlib")
def test_the_csv_has_every_figure_once(made_up: Bench, tmp_path: Path) -> None:
    rows = figures(written(made_up, tmp_path)["bench.csv"])
    names = [tuple(value for key, value in row.items() if key not in ("value", "unit")) for row in rows]
    assert len(names) == len(set(names))
    found = {
        (row["stage"], row["engine"], row["precision"], row["way"], row["metric"], row["at"]): row["value"]
        for row in rows
    }
    assert found["segment", "openvino", "fp32", "", "latency_ms.p50", ""] == "41.5"
    assert found["segment", "onnxruntime-cpu", "int8", "", "miou", ""] == "60.88"
    assert found["segment", "pytorch-eager", "fp32", "", "images_per_second", "cores 2"] == "12.0"
    assert found["label", "onnxruntime-cpu", "fp32", "", "stages_ms", "decode"] == "2.0"
    assert found["kernels", "", "", "pydensecrf", "times_ours", ""] == "5.9"
    assert {row["unit"] for row in rows} == {"", "1", "1/s", "ms", "s", "MiB", "B", "%"}


def test_names_are_never_markup(made_up: Bench, tmp_path: Path) -> None:
    for stage, keys in (
        ("segment", ("engine", "precision", "device")),
        ("label", ("recipe",)),
        ("kernels", ("kernel", "way", "size")),
    ):
        for index, row in enumerate(made_up[stage]):
            row.update(dict.fromkeys(keys, f"{HOSTILE}{index}"))
            row.get("limit", {}).update(text=HOSTILE)
    made_up["segment"][5]["problem"] = made_up["kernels"][1]["threads"] = HOSTILE
    made_up["label"][0]["stages_ms"][HOSTILE] = 5.0
    made_up["environment"].update(
        processor=HOSTILE, gpus=[HOSTILE], started=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    texts = written(made_up, tmp_path)
    page = Page(texts["bench.html"])
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "figure", "div"),
        *("h1", "h2", "h3", "p", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td"),
        *("svg", "g", "defs", "path", "use", "text", "tspan", "clippath", "rect"),
    }
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    drawings = re.findall(r"<svg .*?</svg>", texts["bench.html"], re.DOTALL)
    assert any(re.search(r"<text[^>]*>[^<]*\$x_1\$", drawing) for drawing in drawings)  # it is no formula
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    for name, text in texts.items():
        assert "\x1b" not in text and "\u202e" not in text, name
    assert not re.search(r"(?<!\\)<script|(?<!\\)`|^# head", texts["bench.md"], re.MULTILINE)
    tables = [line for line in texts["bench.md"].splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "alert" in line} > {3}
    assert all("\x1b" not in line and "\n" not in line for line in summary_lines(made_up))


def test_a_subject_without_its_packages(made_up: Bench, no_matplotlib: None, tmp_path: Path) -> None:
    made_up["kernels"] = [{"kernel": "dense CRF", "way": "", "problem": "pydensecrf is not installed"}]
    assert "| dense CRF | pydensecrf is not installed |" in written(made_up, tmp_path)["bench.md"]
    assert "kernels: dense CRF: not measured: pydensecrf is not installed" in summary_lines(made_up)


def test_cells_of_the_csv_are_no_formulas(made_up: Bench, tmp_path: Path, no_matplotlib: None) -> None:
    made_up["segment"][0]["engine"] = "=HYPERLINK(1)"
    made_up["segment"][5]["problem"] = "+1"
    rows = figures(written(made_up, tmp_path)["bench.csv"])
    assert {row["engine"] for row in rows if "HYPER" in row["engine"]} == {"'=HYPERLINK(1)"}
    assert [row["value"] for row in rows if row["metric"] == "problem"] == ["'+1", "no GPU is here"]


@pytest.mark.parametrize("stage", ["segment", "label", "kernels"])
def test_one_stage_alone(made_up: Bench, tmp_path: Path, no_matplotlib: None, stage: str) -> None:
    bench = {key: made_up[key] for key in ("schema_version", "environment", stage)}
    texts = written(bench, tmp_path)
    assert re.findall(r'<h2 id="(\w+)"', texts["bench.html"]) == [stage, "how", "environment"]
    assert {row["stage"] for row in figures(texts["bench.csv"])} == {stage}
    assert summary_lines(bench)


def test_rows_of_names_alone(made_up: Bench, tmp_path: Path) -> None:
    """Everything but names may be missing or null."""
    kept = {"engine", "precision", "recipe", "kernel", "way"}
    bench: Bench = {"schema_version": 1, "environment": {}}
    for stage in ("segment", "label", "kernels"):
        bench[stage] = [
            {key: value if key in kept else None for key, value in row.items()} for row in made_up[stage][:1]
        ]
    texts = written(bench, tmp_path)
    assert "<svg" not in texts["bench.html"]
    assert "ONNX Runtime, CPU fp32" in texts["bench.md"] and "random walk" in texts["bench.md"]
    assert figures(texts["bench.csv"]) == []
    write_report({"schema_version": 1, "environment": {}}, tmp_path)


def test_single_points_are_drawn(made_up: Bench) -> None:
    """One engine, one latency, one size: axes without a range."""
    del made_up["segment"][1:]
    charts = [chart for stage, chart in all_charts(made_up) if stage == "segment"][3:5]
    assert [chart.title for chart in charts] == ["Latency against mIoU", "Segmenting: scaling with size"]
    for drawing in draw(charts):
        ElementTree.fromstring(drawing)


def test_letters_that_the_font_lacks_are_drawn(made_up: Bench) -> None:
    made_up["kernels"][1]["way"] = "稠密平方"
    (chart,) = (chart for _, chart in all_charts(made_up) if chart.title == "Kernels against others")
    (drawing,) = draw([chart])
    assert "稠密平方" in drawing


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(1.0, 5.0)], [0]),
        ([(2.0, 5.0), (1.0, 5.0)], [1]),  # as accurate, but slower
        ([(1.0, 4.0), (2.0, 5.0), (3.0, 4.5)], [0, 1]),
        ([(3.0, 6.0), (1.0, 4.0), (2.0, 5.0)], [1, 2, 0]),
        ([(1.0, 5.0), (1.0, 6.0), (1.0, 6.0)], [1]),
    ],
)
def test_pareto(found: list[tuple[float, float]], best: list[int]) -> None:
    assert pareto(found) == best


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (25349.4, "25,349"),
        (999.96, "1,000"),
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
    assert plain("a\x1b[2J\tb\r\nc\u202e\x00\u2028d") == "a[2J b c d"
    assert markdown_text("a|b*`_[x](y)") == r"a\|b\*\`\_\[x\](y)"


def test_importing_the_report_loads_nothing_heavy() -> None:
    program = (
        "import sys, multisa.benchmarks.report\n"
        "assert not {'matplotlib', 'numpy', 'torch', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
