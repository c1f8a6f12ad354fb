"""benchmarks/engines.py: what is passed through, and which failures end the run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from multisa.benchmarks import engines
from multisa.export.fp16 import fp16_candidates, fp16_graph, model_bytes, read_fp32_graph
from multisa.export.tensorrt.build import BuildOptions, BuildResult
from multisa.runtime.backends.tensorrt_runtime import Library, import_library
from multisa.runtime.bundle import default_bundle_path, load_bundle, write_bundle
from multisa.runtime.errors import BackendUnavailable

pytestmark = pytest.mark.slow


def run(monkeypatch: pytest.MonkeyPatch, work: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["engines.py", "--work", str(work), "--results", str(work), *options])
    try:
        engines.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_turing_fails_for_cam_as_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        import_library("tensorrt-rtx")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert "sm75" in engines.TARGETS
    packaged = load_bundle(default_bundle_path())
    plain = read_fp32_graph(packaged.read_file("segmenter.onnx"))
    files = {name: packaged.read_file(name) for name in packaged.manifest.files}
    files["segmenter.fp16.onnx"] = model_bytes(fp16_graph(plain, fp16_candidates(plain)))
    # Of the smallest images the three default profiles are one.
    parameters = replace(packaged.manifest.parameters, long_side=64)
    write_bundle(tmp_path / "bundle", replace(packaged.manifest, parameters=parameters), files)
    words = ("--bundle", str(tmp_path / "bundle"), "--targets", "sm75")
    assert run(monkeypatch, tmp_path, *words) == 0
    assert run(monkeypatch, tmp_path, *words, "--precision", "fp16") == 0
    entries = json.loads((tmp_path / "engines.json").read_text())["bundles"]
    cam, affinity, segmenter = entries[packaged.manifest.name]["engines"]
    assert cam["known"] is True and "FP32 GEMM is not supported" in cam["failure"]
    assert (affinity["graph"], segmenter["graph"]) == ("affinity", "segmenter")
    assert affinity["megabytes"] > 1 and "failure" not in segmenter
    (half,) = entries[f"{packaged.manifest.name}, fp16"]["engines"]
    assert (half["graph"], half["precision"]) == ("segmenter", "fp16")


@pytest.mark.parametrize(
    ("target", "failure", "code"),
    [
        ("sm75", "FP32 GEMM is not supported", 0),
        ("sm89", "FP32 GEMM is not supported", 1),  # Turing's alone
        ("sm75", "out of memory", 1),
    ],
)
def test_other_failures_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, failure: str, code: int
) -> None:
    seen: list[BuildOptions] = []

    def failing(bundle: object, options: BuildOptions) -> BuildResult:
        seen.append(options)
        failures = (failure,) if options.graphs == ("cam",) else ()
        return BuildResult("bundle", Library("tensorrt", None, "0"), Path("engines"), (), failures, 0.0)

    monkeypatch.setattr(engines, "build_engines", failing)
    assert run(monkeypatch, tmp_path, "--targets", target, "--library", "tensorrt") == code
    assert [options.graphs for options in seen] == [("cam",), ("affinity",), ("segmenter",)]
    assert {(o.library, o.targets, o.precision) for o in seen} == {("tensorrt", (target,), "fp32")}
