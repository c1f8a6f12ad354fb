"""The programs of benchmarks/ and their shared parts."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest

from multisa.benchmarks import kernels, start_up
from multisa.benchmarks.harness import Times, environment, interleave, make_parser, save_results
from multisa.benchmarks.suite.candidates import Candidate
from multisa.benchmarks.suite.context import Roofline, peak_of_all_cores
from multisa.kernels.cpu import native
from multisa.runtime.bundle import default_bundle_path

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_has_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert not stopped.value.code
    assert "usage" in capsys.readouterr().out


def test_the_programs_are_all_there() -> None:
    wanted = {"cam_head", "start_up"}
    wanted |= {"crash_recovery", "engines", "gpu_kernels", "tables"}
    assert wanted <= {path.stem for path in PROGRAMS}


def test_cases_are_interleaved_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "slow": lambda: time.sleep(0.01)}
    times = interleave(cases, repeats=3, slow={"slow": 1})
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert [len(times[name].seconds) for name in cases] == [3, 3, 1]
    assert times["slow"].median >= 0.01
    assert Times((1.0, 3.0, 2.0)).to_json() == {"median_ms": 2000.0, "min_ms": 1000.0, "max_ms": 3000.0, "repeats": 3}


def test_results_go_where_they_are_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("", quick="less")
    assert parser.parse_args([]).results.resolve() == (FOLDER / "results").resolve()
    save_results("made_up", {"a": 1}, parser.parse_args(["--results", f"{tmp_path}/new"]).results)
    assert json.loads((tmp_path / "new" / "made_up.json").read_text()) == {"a": 1}
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_the_peak_of_all_cores_is_at_least_one_cores() -> None:
    assert peak_of_all_cores() > 0.5 * native.peak_multiply_adds(0.2)


def test_the_roofline_is_only_for_fp32_on_the_cpu() -> None:
    roofline = Roofline(0.010)
    limit = roofline.limit(Candidate("onnxruntime-cpu", "fp32", "cpu"), 0.040)
    assert limit is not None and (limit["roofline_ms"], limit["share"]) == (10.0, 0.25)
    assert roofline.limit(Candidate("onnxruntime-cpu", "int8", "cpu"), 0.040) is None  # another peak
    assert roofline.limit(Candidate("tensorrt", "fp32", "cuda"), 0.040) is None
    unknown = Roofline(None, "torch is not installed").limit(Candidate("onnxruntime-cpu", "fp32", "cpu"), 0.040)
    assert unknown is not None and unknown["share"] is None and "torch is not installed" in unknown["text"]


def test_starting_takes_longer_than_the_interpreter(tmp_path: Path) -> None:
    measured = start_up.measure(1, default_bundle_path(), tmp_path, compiled=False)
    ways = measured["ways"]
    assert ways[start_up.OURS]["times_ours"] == 1.0
    assert ways[start_up.EAGER_START]["median_ms"] > ways[start_up.INTERPRETER]["median_ms"]
    assert 0 < measured["limit"]["share"] < 1


def test_the_roofline_of_the_walk_is_the_longer_time() -> None:
    for rate, of in ((1e6, "multiply-adds"), (1e18, "bytes")):
        found = kernels.walk_roofline(16, 1.0, {"multiply_adds_per_second": rate})
        assert found["text"].startswith(of) and found["roofline_ms"] > 0
    assert kernels.walk_roofline(16, 2.0, {"multiply_adds_per_second": 1e6})["share"] > 0.5


def test_every_way_of_a_kernel_is_a_row() -> None:
    machine = {"multiply_adds_per_second": 1e11, "copied_bytes_per_second": 1e10}
    walk = list(kernels.walk_rows(machine, 16, True, 1))
    crf = list(kernels.crf_rows(machine, "psa", 3, 3, 1))
    assert [row["way"] for row in walk][:2] == ["multisa", "multisa, every step"]
    assert [row["threads"] for row in walk] == [1, 1, 1, "all", "all"]
    assert all(row["max_error"] < 1e-3 for row in walk[:-1]) and walk[-1]["max_error"] is None
    assert crf[0]["label_agreement"] > 0.999 and crf[-1]["way"] == "pydensecrf"
    enlarge, absorb = (
        list(rows(machine, 3, (6, 8), (48, 64), 1)) for rows in (kernels.enlarge_rows, kernels.absorb_rows)
    )
    assert enlarge[0]["label_agreement"] > 0.999 and len(enlarge) == len(absorb) == 2
    for rows in (walk, crf, enlarge, absorb):
        assert rows[0]["times_ours"] == 1.0 and rows[0]["limit"]["roofline_ms"] > 0 and rows[1]["limit"] is None


def test_the_environment_describes_machine_and_commit() -> None:
    described = environment("numpy", "no-such-package", quick=True)
    assert described["quick"] is True and "no-such-package" not in described["versions"]
    assert {"processor", "cores", "instruction_set", "commit", "load_at_start"} <= described.keys()
    commit = described["commit"]
    assert commit is None or int(commit.removesuffix("+"), 16) >= 0
