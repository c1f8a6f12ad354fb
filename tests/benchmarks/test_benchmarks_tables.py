"""benchmarks/tables.py on the stored results, on changed copies of them, and with quick runs."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks import tables
from multisa.benchmarks.harness import RESULTS

Files = dict[str, Any]
README = f"# multisa\n\n{tables.BEGIN}\nold\n{tables.END}\n\nmore\n"


@pytest.fixture(scope="module")
def stored() -> Files:
    return {name: json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in tables.SUBJECTS}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the template, a README with markers, and its own results."""
    (tmp_path / "docs").mkdir()
    shutil.copy(tables.ROOT / "docs" / "benchmarks.in.md", tmp_path / "docs")
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


def run(root: Path, *arguments: str) -> int:
    return tables.main([*arguments, "--results", str(root / "results")], root=root)


def test_check_fails_until_it_is_written_and_when_a_figure_changes(root: Path) -> None:
    assert run(root, "--check") == 1
    assert not (root / "docs" / "benchmarks.md").exists() and (root / "README.md").read_text() == README
    assert run(root) == 0 and run(root, "--check") == 0
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# multisa\n") and readme.endswith(f"{tables.END}\n\nmore\n") and "old" not in readme
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert 4 <= len(rows) - 2 <= 8  # without head and ruler
    path = root / "results" / "start_up.json"
    results = json.loads(path.read_text())
    results["ways"]["multisa inspect"]["median_ms"] = 7777.0
    path.write_text(json.dumps(results))
    assert run(root, "--check") == 1
    assert run(root) == 0 and "7,777" in (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", ["# no markers\n", f"{tables.BEGIN}\n", README + README])
def test_a_readme_without_its_markers_is_reported(root: Path, readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").write_text(readme, encoding="utf-8")
    assert run(root) == 1  # the page is written all the same
    assert run(root, "--check") == 1
    printed = capsys.readouterr().out
    assert tables.BEGIN in printed and "benchmarks.md is not" not in printed
    assert (root / "README.md").read_text(encoding="utf-8") == readme


def test_a_missing_file_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "results" / "pipeline.json").unlink()
    assert run(root, "--check") == 1
    assert "pipeline missing" in capsys.readouterr().out


def test_the_page_names_every_file_and_says_where_it_was_measured(stored: Files) -> None:
    template = (tables.ROOT / "docs" / "benchmarks.in.md").read_text(encoding="utf-8")
    page = tables.document(stored, template)
    for name in tables.SUBJECTS:
        assert f"(../benchmarks/results/{name}.json)" in page
    environment = stored["segmenting"]["environment"]
    assert f"commit {environment['commit']}, {environment['started'][:10]}" in page
    assert "{{" not in page
    with pytest.raises(KeyError, match="table nothing"):
        tables.document(stored, "{{table nothing}}")


def test_a_quick_run_lacks_figures_and_says_so(stored: Files) -> None:
    files = deepcopy(stored)
    for name in ("segmenting", "labelling", "start_up", "kernels"):
        files[name]["environment"]["quick"] = True
    row = files["segmenting"]["segment"][0]
    row["latency_ms"]["p99"] = None
    del row["loop"], row["peak_mib"], row["cores"]
    rows = files["kernels"]["kernels"]
    files["kernels"]["kernels"] = [row for row in rows if not row["way"].startswith("dense")]
    del files["start_up"]["ways"]["torch.compile, one image"]
    page = tables.document(files, "{{table segmenting}}{{table walk}}{{source segmenting}}")
    assert "| - |" in page and "dense squaring" not in page and "quick run" in page
    assert "dense squaring" in tables.summary(files) and "| - |" in tables.summary(files)


def test_only_rows_of_the_papers_recipe_have_its_figures(stored: Files) -> None:
    files = deepcopy(stored)
    rows = files["voc-animals"]["rows"]
    own, others = {row["stage"] for row in rows}, ("+ dense CRF, no mask used", "DeepLabV3+ on ground truth")
    rows += [{**rows[0], "stage": f"{name} (background 0.12)"} for name in ("+ dense CRF", *others)]
    cells = [line.strip("| ").split(" | ") for line in tables.stages(files).splitlines()[2:]]
    paper = {stage: figure for stage, _, _, figure, *_ in cells}
    assert paper.keys() > own and paper["DeepLabV3+ on pseudo-masks"] == "69.70"
    assert paper["+ dense CRF (background 0.12)"] == "68.07"
    assert all(paper[f"{name} (background 0.12)"] == "-" for name in others)


def test_the_summary_compares_each_method_of_label_with_its_own_recipe(stored: Files) -> None:
    files = deepcopy(stored)
    rows = files["labelling"]["label"]
    for recipe, times in (("multisa label --method walk", 2.0), ("PyTorch eager, sparse walk, pydensecrf", 9.0)):
        next(row for row in rows if row["recipe"] == recipe).update(default_times_as_fast=times, images_per_second=1.5)
    lines = [line for line in tables.summary(files).splitlines() if line.startswith("| `label")]
    assert len(lines) == 2 and "segmenter" in lines[0].split("|")[1] and "PyTorch eager, segmenter" in lines[0]
    walk = [cell.strip() for cell in lines[1].split("|")]
    assert walk[1:5] == [
        "`label --method walk`, file to file",
        "1.50 images/s",
        "PyTorch eager, sparse walk, pydensecrf, 1.50 images/s",
        "4.50",
    ]


def test_the_stored_results_agree(stored: Files) -> None:
    assert tables.disagreements(stored) == []


def test_results_of_an_earlier_bundle_say_so(stored: Files) -> None:
    files = deepcopy(stored)
    tables.mark_earlier_bundles(files, files["segmenting"]["environment"]["bundle"]["sha256"])
    assert "earlier bundle" not in tables.summary(files) + tables.document(files, "{{source segmenting}}")
    tables.mark_earlier_bundles(files, "other")
    assert "with an earlier bundle than the packaged one" in tables.summary(files)
    assert "with an earlier bundle" in tables.document(files, "{{source segmenting}} {{source labelling}}")


def eager(**changes: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        next(r for r in files["segmenting"]["segment"] if r["backend"] == "pytorch-eager").update(changes)

    return change


def without_default(files: Files) -> None:
    for row in files["labelling"]["label"]:
        row["default"] = False


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (eager(miou=62.4, images=223), "pytorch-eager has mIoU 62.4, the run's val row"),
        (eager(miou=40.0, images=48), ""),  # of fewer images
        (eager(label_agreement=0.99), "99.0000% of pytorch-eager's labels agree, expected 99.9%"),
        (eager(miou=None), "segmenting has no miou of pytorch-eager"),
        (eager(problem="no torch"), "segmenting has no miou, label_agreement, images of pytorch-eager"),
        (without_default, "labelling has no row of the default backend that ran"),
    ],
)
def test_results_that_disagree(stored: Files, change: Callable[[Files], None], problem: str) -> None:
    files = deepcopy(stored)
    change(files)
    found = tables.disagreements(files)
    assert len(found) == bool(problem) and all(problem in text for text in found)
