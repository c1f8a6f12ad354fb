"""The stages of the suite on two images: every figure is there, and what can be known is right."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from multisa.benchmarks import labelling, segmenting
from multisa.benchmarks.bench_file import read_bench
from multisa.benchmarks.harness import CLI
from multisa.benchmarks.suite.candidates import PYTORCH, Candidate, baseline_of, list_candidates
from multisa.benchmarks.suite.context import BenchContext
from multisa.benchmarks.suite.images import read_plainly
from multisa.benchmarks.suite.segment_candidate import SegmentCandidate
from multisa.runtime.backends.base import CAM, SEGMENTER
from multisa.runtime.backends.registry import BACKENDS
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.cli.main import root
from multisa.runtime.errors import UsageError

pytestmark = pytest.mark.slow

MakeContext = Callable[..., BenchContext]


def row_of(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return row


def test_every_backend_and_pytorch_are_listed_and_the_reference_is_first() -> None:
    listed = list_candidates(load_bundle(default_bundle_path()), SEGMENTER, (), gpu=False)
    assert listed[0] == Candidate("onnxruntime-cpu", "fp32", "cpu")
    assert {candidate.backend for candidate in listed} == {*BACKENDS, *PYTORCH}
    assert Candidate("onnxruntime-cpu", "int8", "cpu") in listed
    with pytest.raises(UsageError, match=r"got the backend 'fast', expected some of tensorrt"):
        list_candidates(load_bundle(default_bundle_path()), CAM, ("fast",), gpu=False)


def test_on_a_gpu_pytorch_is_compared_with_pytorch_on_the_gpu() -> None:
    listed = list_candidates(load_bundle(default_bundle_path()), SEGMENTER, (), gpu=True)
    on_gpu = Candidate("pytorch-eager", "fp32", "cuda")
    assert on_gpu in listed
    assert baseline_of(Candidate("tensorrt", "fp16", "cuda"), listed) == on_gpu
    assert baseline_of(listed[0], listed) == Candidate("pytorch-eager", "fp32", "cpu")
    assert baseline_of(on_gpu, listed[:1]) == listed[0]  # the only one


def test_segmenting(make_tiny: MakeContext) -> None:
    rows = segmenting.measure(make_tiny("onnxruntime-cpu", "pytorch-eager", "tensorrt"))
    default = row_of(rows, backend="onnxruntime-cpu", precision="fp32")
    assert default["default"] and default["problem"] is None
    assert default["miou"] == 100.0 and default["label_agreement"] == 1.0  # its own masks are the ground truth
    eager, small = row_of(rows, backend="pytorch-eager"), row_of(rows, precision="int8")
    assert eager["baseline"] and eager["times_baseline"] == 1.0
    assert 0.99 < eager["label_agreement"] <= 1.0 and 0.9 < small["label_agreement"] <= 1.0
    for row in (default, eager, small):
        latency = row["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["max"]
        assert latency["p99"] is None  # of four
        assert latency["count"] == 4 and len(latency["repeats"]) == 2
        assert row["images_per_second"] > 0 and row["startup_seconds"] > 0
        assert row["peak_mib"]["host"] > 50 and row["model_bytes"] > 1_000_000
        assert [point["batch"] for point in row["batches"]] == [1, 2]
        assert [point["long_side"] for point in row["sizes"]] == [96, 128]
        assert row["sizes"][0]["pixels"] < row["sizes"][1]["pixels"]
        assert row["cores"][0]["images_per_second"] > 0
        assert len(row["end_to_end"]["images_per_second"]) == len(row["loop"]["images_per_second"]) == 2
        assert "notes" not in row
    assert default["end_to_end"]["by"] == "multisa segment" and eager["end_to_end"]["by"] == "loop"
    expected = eager["latency_ms"]["p50"] / default["latency_ms"]["p50"]
    assert default["times_baseline"] == pytest.approx(expected, rel=0.01)
    assert 0 < default["limit"]["share"] < 1 and small["limit"] is None
    absent = row_of(rows, backend="tensorrt")
    assert absent["problem"] is None or "no NVIDIA driver" in absent["problem"]


def test_labelling(make_tiny: MakeContext) -> None:
    rows = labelling.measure(make_tiny("onnxruntime-cpu", "pytorch-eager"))
    assert all(row["problem"] is None for row in rows)
    (default,) = (row for row in rows if row["default"])
    assert default["recipe"] == "multisa label --method segmenter" and default["precision"] == "fp32"
    assert default["label_agreement"] == 1.0
    for method, (_, recipes) in labelling.METHODS.items():
        ours = row_of(rows, recipe=f"multisa label --method {method}", precision="fp32")
        key = next(iter(recipes))
        eager = row_of(rows, recipe=recipes[key])
        # The same method computed differently: only rounding differs, and small parts that ours removes.
        assert eager["label_agreement"] > 0.99 and eager["miou"] == pytest.approx(ours["miou"], abs=1.5)
        assert eager["baseline"] and not ours["baseline"] and ours["times_baseline"] > 0
        expected = eager["default_times_as_fast"] / ours["default_times_as_fast"]
        assert ours["times_baseline"] == pytest.approx(expected, rel=0.3)  # medians over few rounds
        steps = {"segmenter", "crf"} if method == "segmenter" else {"cam", "affinity", "walk", "crf"}
        for row in (ours, eager):
            assert steps <= set(row["stages_ms"]) and row["images_per_second"] > 0 and row["peak_mib"]["host"] > 50
            assert 0 < row["limit"]["share"] < 1
    dense = row_of(rows, recipe=labelling.METHODS["walk"][1]["dense"])
    assert dense["images"] == 1 and dense["mean_pixels"] <= 64 * 64 and dense["default_times_as_fast"] > 0
    int8 = row_of(rows, precision="int8")
    assert int8["recipe"] == default["recipe"] and 0.9 < int8["label_agreement"] <= 1.0


def test_pytorch_makes_the_labels_and_confidences_of_the_runtime(make_tiny: MakeContext) -> None:
    context = make_tiny("onnxruntime-cpu", "pytorch-eager")
    assert not context.pytorch_problem
    image = context.val[0].path
    found = []
    for backend in ("onnxruntime-cpu", "pytorch-eager", "pytorch-channels-last-autocast"):
        candidate = Candidate(backend, "fp32", "cpu")
        opened = SegmentCandidate(context.bundle.path, candidate, None, image, context.weights)
        rgb, size = read_plainly(image, 128)
        ((labels, confidence),) = opened.segment(rgb[None], size)
        assert labels.dtype == confidence.dtype == np.uint8 and labels.shape == confidence.shape == size
        found.append((labels, confidence))
    (ours, sure), (eager, also), (rounded, _) = found
    assert (ours == eager).mean() > 0.999 and np.abs(sure.astype(int) - also).max() <= 1
    assert (ours == rounded).mean() > 0.98  # bf16


def test_a_data_set_of_other_classes_is_refused(voc_folder: Path, tmp_path: Path) -> None:
    words = ["bench", "--data", str(voc_folder), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(root, words)
    assert result.exit_code == 2
    assert "expected those of the bundle" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("make_tiny")
def test_the_command_writes_the_report_and_compares(demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["bench", "--data", str(demo_data), "-o", str(out), "--quick", "--stages", "segment"]
    words += ["--backends", "onnxruntime-cpu"]
    result = CliRunner().invoke(root, words)
    assert result.exit_code == 0, result.stderr
    bench = read_bench(out / "bench.json")
    assert set(bench) == {"schema_version", "environment", "segment"}
    assert {"bench.html", "bench.json"} <= {path.name for path in out.iterdir()}
    faster = json.loads((out / "bench.json").read_text())
    for row in faster["segment"]:
        row["images_per_second"] *= 10
        row["end_to_end"]["images_per_second"] = [10 * rate for rate in row["end_to_end"]["images_per_second"]]
    (tmp_path / "old.json").write_text(json.dumps(faster))
    worse = CliRunner().invoke(root, [*words, "--compare", str(tmp_path / "old.json")])
    assert worse.exit_code == 3, worse.stderr
    assert "worse than before" in worse.stderr


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 7}', "[" * 100_000])
def test_a_wrong_old_report_is_refused_before_measuring(text: str, demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(text)
    words = ["bench", "--data", str(demo_data), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(root, [*words, "--compare", str(tmp_path / "old.json")])
    assert result.exit_code == 2, result.stderr
    assert "old.json" in result.stderr and not (tmp_path / "out").exists()


def test_a_failing_curve_keeps_the_other_figures(make_tiny: MakeContext) -> None:
    context = make_tiny("onnxruntime-cpu")
    context = replace(context, effort=replace(context.effort, batches=(1, 0)))
    row = row_of(segmenting.measure(context), precision="fp32")
    assert row["problem"] is None and row["latency_ms"]["p50"] > 0 and row["cores"]
    assert "batches" not in row
    (note,) = row["notes"]
    assert note.startswith("batches: segmenter: got uint8 [0, ")


def test_without_torch_the_backends_are_measured(make_tiny: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BenchContext, "pytorch_problem", "torch is not installed")
    rows = labelling.measure(make_tiny("onnxruntime-cpu", "pytorch-eager"))
    ours = [row for row in rows if row["recipe"].startswith("multisa label")]
    assert [row["baseline"] for row in ours] == [True, False, True]  # fp32 of each method, and int8
    assert all(row["problem"] is None and row["images_per_second"] > 0 for row in ours)
    assert {row["problem"] for row in rows if row not in ours} == {"torch is not installed"}


def test_sigterm_ends_a_run_and_leaves_no_files(demo_data: Path, tmp_path: Path) -> None:
    words = ["bench", "--data", str(demo_data), "-o", str(tmp_path / "out"), "--quick", "--stages", "segment"]
    process = subprocess.Popen(
        [sys.executable, *CLI, *words, "--backends", "onnxruntime-cpu"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("multisa-bench-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("multisa-bench-*/*")), "nothing was started"
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert not list(tmp_path.glob("multisa-bench-*"))
