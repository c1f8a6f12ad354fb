"""What single steps of benchmarks/gpu.sh do: look, driver, checks, graphs, kernels, and the summary."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.gpu import driver, graphs, kernels, look
from multisa.benchmarks.gpu.runner import Row
from multisa.benchmarks.gpu.settings import ROOT, read_machine
from multisa.benchmarks.gpu.summary import Results, write_summary
from multisa.export import quantize
from multisa.runtime import versions
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.engines.gpus import Gpu, GpuProbe
from multisa.runtime.errors import EngineUnavailable, ParityError


def test_look_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "look.json"
    words = ["--environment", str(tmp_path / "venv"), "--output", str(output)]
    monkeypatch.setattr(look.shutil, "disk_usage", lambda _: Disk(free=1 << 40))
    monkeypatch.setattr(look.shutil, "which", lambda _: None)
    assert look.main(words) == 1
    assert any("g++" in problem for problem in json.loads(output.read_text())["problems"])
    monkeypatch.setattr(look.shutil, "disk_usage", lambda _: Disk(free=1 << 20))
    assert sum("free disk" in problem for problem in look.look(tmp_path / "venv", tmp_path)["problems"]) == 2


def test_an_environment_that_was_cut_off_needs_only_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look.shutil, "disk_usage", lambda _: Disk(free=look.RESULT_BYTES))
    environment = tmp_path / "venv"
    assert any("free disk" in problem for problem in look.look(environment, tmp_path)["problems"])
    (environment / "lib").mkdir(parents=True)
    with (environment / "lib" / "large").open("wb") as file:
        file.truncate(look.INSTALLED_BYTES - look.RESULT_BYTES)  # takes no room
    assert not any("free disk" in problem for problem in look.look(environment, tmp_path)["problems"])


class Disk:
    def __init__(self, free: int) -> None:
        self.free = free


class FakeGpu:
    """Stands for PycudaDevice where there is none."""

    name, compute_capability = "Test GPU", (9, 0)


def test_driver_writes_what_later_steps_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr(driver, "probe_gpus", lambda: GpuProbe("13.0", (Gpu("Test GPU", "sm90"),)))
    monkeypatch.setattr(driver, "PycudaDevice", FakeGpu)
    assert driver.main(["--output", str(tmp_path / "driver.json")]) == 0
    machine = read_machine(tmp_path)
    assert machine.target == "sm90"
    assert "sm90" in machine.problems["tensorrt-rtx"]  # for which it builds nothing
    assert "pip install tensorrt-cu13" in machine.problems["tensorrt"]


def test_driver_without_a_gpu_is_exit_code_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "probe_gpus", lambda: GpuProbe(problem="no NVIDIA GPU here"))
    assert driver.main(["--output", str(tmp_path / "driver.json")]) == EngineUnavailable.exit_code
    assert "no NVIDIA GPU here: install NVIDIA's driver" in capsys.readouterr().out
    assert not (tmp_path / "driver.json").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def test_a(): pass\n", 0),
        ("def test_a(): pass\ndef test_b(): assert False\n", 3),
        ("import pytest\ndef test_a(): pytest.skip('no GPU')\n", 3),
        ("def test_a(:\n", 1),
    ],
    ids=["passes", "fails", "all skipped", "cannot be read"],
)
def test_checks_count_what_has_passed(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(text)
    words = ["-m", "multisa.benchmarks.gpu.checks", "--output", "counts.json", "test_it.py"]
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == code, result.stdout
    assert (tmp_path / "counts.json").exists() == (code != 1)


def test_a_refused_conversion_leaves_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ParityError("fp16: labels differ")

    monkeypatch.setattr(graphs, "quantize_bundle", refuse)
    words = ["--photographs", str(ROOT / "runtime" / "demo_photos"), "--report", str(tmp_path / "fp16.json")]
    assert graphs.main([*words, "--output", str(tmp_path / "bundle")]) == 3
    assert (
        load_bundle(tmp_path / "bundle").manifest.files == load_bundle(default_bundle_path()).manifest.files
    )


def test_a_converted_bundle_names_the_onnxruntime_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps replace onnxruntime by onnxruntime-gpu, before they convert."""

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(versions, "version", version)
    manifest = load_bundle(default_bundle_path()).manifest
    made = quantize._manifest(manifest, {}, {"fp16": {}}, quantize.QuantizeOptions(("fp16",)))
    assert made.provenance["fp16 graphs"]["versions"]["onnxruntime-gpu"] == "1.2"


@pytest.fixture(scope="module")
def device() -> Any:
    sys.path.insert(0, str(ROOT / "tests" / "cuda_on_cpu"))
    from cpu_device import CpuDevice, build

    yield CpuDevice(build())
    sys.path.remove(str(ROOT / "tests" / "cuda_on_cpu"))


def test_kernels_are_timed_and_held_against_their_references(device: Any) -> None:
    walk = kernels.walk_row(device, 2, 3, 16, 1)
    crf = kernels.crf_row(device, 3, 24, 32, 1)
    assert kernels.problems([walk, crf]) == []
    assert walk["max_error"] > 0 and walk["ways"]["resident"]["times_ours"] == 1
    assert {"resident", "host", "cpu, one thread"} <= set(walk["ways"]) & set(crf["ways"])
    for row in ({**walk, "max_error": float("nan")}, {**crf, "label_agreement": 0.9}):
        (problem,) = kernels.problems([row])
        assert row["kernel"] in problem


def test_the_summary_is_of_what_is_there(tmp_path: Path) -> None:
    ran = [Row("one", "", "gate failed", "a | b", 3, 2.5)]
    (tmp_path / "parity-x-fp32.json").write_text('{"x fp32": {"passed": false, "problems": ["too far"]}}')
    (tmp_path / "bench").mkdir()
    rows = [
        {"engine": "pytorch-eager", "precision": "fp32", "device": "cuda", "images_per_second": 7.5},
        {
            "engine": "x",
            "precision": "fp32",
            "loop": {"images_per_second": [1, 4, 3]},
            "problem": "is not here",
        },
    ]
    (tmp_path / "bench" / "bench.json").write_text(json.dumps({"segment": rows}))
    text = write_summary(Results(tmp_path), ran, 3).read_text()
    assert "Exit code 3: a gate failed." in text
    assert "| one | 2.5 | gate failed | a / b |" in text
    assert "| x fp32 | failed | too far |" in text
    assert "segment (it did not get to its end)" in text
    assert "| pytorch-eager | fp32 | cuda | 7.5 |" in text
    assert "| x | fp32 |  |  | 3 |  |  |  | is not here |" in text
    ended = write_summary(Results(tmp_path), [*ran, Row("bench", "", "done")], 3).read_text()
    assert "## The suite: segment\n" in ended
