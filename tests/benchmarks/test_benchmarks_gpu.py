"""benchmarks/gpu.sh with stand-ins for its programs, its Python parts, and the kernels on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks import gpu_kernels, gpu_report
from multisa.kernels.cuda import pycuda_device
from multisa.runtime.backends.gpus import Gpu, GpuProbe
from multisa.runtime.bundle import default_bundle_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = '{"gpu": "Test GPU", "target": "sm90", "problems": {"onnxruntime-cuda": "", "tensorrt-rtx": "too old"}}'
# What needs a GPU answers with the exit code in the environment; the rest is the real Python.
PYTHON = f"""#!/bin/sh
echo "python $*" >> "$CALLS"
case "$*" in
    *kernels.cuda.build*) exit 0 ;;
    *"gpu_report driver"*) [ "${{NO_GPU:-}}" ] && exit 5; echo '{DRIVER}' > "$5"; exit 0 ;;
    *"gpu_report tests"*) exit "${{TESTS:-0}}" ;;
    *gpu_kernels*) exit 0 ;;
    *"why-not"*tensorrt) [ "${{5##*-}}" = rtx ] || exit 0 ;;
esac
PYTHONPATH={os.environ.get("PYTHONPATH", "")} exec {sys.executable} "$@"
"""
MULTISA = """#!/bin/sh
echo "multisa $*" >> "$CALLS"
case "$1" in
    doctor) echo '{}' ;;
    convert)
        for last; do :; done
        cp -r "$2" "$last"
        touch "$last/segmenter.fp16.onnx"
        exit "${CONVERT:-0}"
        ;;
    parity) exit "${PARITY:-0}" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment of stand-ins."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("multisa", MULTISA)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder.parent


def run(environment: Path, *options: str, **variables: str) -> tuple[int, dict[str, list[str]], list[str]]:
    """Exit code, steps by name, and the programs that were called."""
    calls = environment.parent / "calls"
    calls.write_text("")
    output = environment.parent / "out"
    words = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--environment", str(environment), "--output", str(output)]
    result = subprocess.run(
        [*words, *options], env=os.environ | {"CALLS": str(calls)} | variables, capture_output=True, text=True
    )
    steps = {}
    if (output / "results.json").exists():
        steps = {row[0]: row[1:] for row in json.loads((output / "results.json").read_text())["steps"]}
    assert result.returncode in (0, 1, 3, 5), result.stderr
    return result.returncode, steps, calls.read_text().splitlines()


def test_all_steps_then_nothing_is_repeated(environment: Path) -> None:
    code, steps, _ = run(environment)
    assert code == 0, steps
    assert [steps[name][0] for name in ("kernels", "driver", "tests", "bundle", "parity-onnxruntime-cuda-fp16")] == [
        "0"
    ] * 5
    assert steps["parity-tensorrt-rtx-fp32"][::2] == ["skipped", "too old"]
    assert "not asked for" in steps["parity-tensorrt-fp32"][2] and steps["bench"][2] == "no --data"
    text = (environment.parent / "out" / "summary.md").read_text()
    assert "Exit code 0: all passed." in text and "GPU: Test GPU, sm90" in text
    code, steps, calls = run(environment)
    assert code == 0 and steps["tests"][2] == "done before"
    assert not any(call.startswith("multisa") for call in calls)
    _, steps, calls = run(environment, "--fresh")
    assert steps["tests"][2] == "" and any(call.startswith("multisa convert") for call in calls)


def test_a_failing_step_does_not_stop_the_others_and_is_repeated(environment: Path) -> None:
    code, steps, _ = run(environment, TESTS="3", PARITY="1")
    assert code == 3 and steps["tests"][0] == "3"  # a wrong answer counts more than a failed step
    assert steps["parity-onnxruntime-cuda-fp32"][0] == "1"
    code, steps, _ = run(environment)
    assert code == 0 and steps["tests"][2] == "" and steps["kernel-times"][2] == "done before"


def test_a_refused_conversion_is_a_gate_and_leaves_a_copy(environment: Path) -> None:
    code, steps, _ = run(environment, CONVERT="3")
    assert code == 3 and "no fp16 graphs" in steps["parity-onnxruntime-cuda-fp16"][2]
    assert (environment.parent / "out" / "work" / "bundle" / "bundle.json").is_file()


@pytest.mark.parametrize("variables", [{"NO_GPU": "1"}, {"PARITY": "5"}])
def test_without_a_usable_gpu_it_is_exit_code_5(environment: Path, variables: dict[str, str]) -> None:
    code, steps, _ = run(environment, **variables)
    assert code == 5
    assert ("tests" in steps) == ("PARITY" in variables)


@pytest.mark.parametrize("options", [("--bundle", "/nowhere"), ("--data", "/nowhere"), ("--speed",), ("--data",)])
def test_wrong_options_are_refused(environment: Path, options: tuple[str, ...]) -> None:
    assert run(environment, *options) == (1, {}, [])


class FakeGpu:
    """Stands for PycudaDevice."""

    name = "Test GPU"
    compute_capability = (9, 0)


def test_driver_writes_what_later_steps_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "probe_gpus", lambda: GpuProbe("13.0", (Gpu("Test GPU", "sm90"),)))
    monkeypatch.setattr(pycuda_device, "PycudaDevice", FakeGpu)
    path = tmp_path / "driver.json"
    assert gpu_report.main(["driver", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["target"] == "sm90" and set(found["problems"]) == {"onnxruntime-cuda", "tensorrt-rtx", "tensorrt"}
    capsys.readouterr()
    assert gpu_report.main(["why-not", str(path), "tensorrt"]) == 0
    assert capsys.readouterr().out.strip() == found["problems"]["tensorrt"] != ""
    monkeypatch.setattr(gpu_report, "probe_gpus", lambda: GpuProbe(problem="no NVIDIA GPU here"))
    path.unlink()
    assert gpu_report.main(["driver", "--output", str(path)]) == 5
    assert "no NVIDIA GPU here: install NVIDIA's driver" in capsys.readouterr().out and not path.exists()


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
def test_tests_are_counted(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(text)
    words = ["-m", "multisa.benchmarks.gpu_report", "tests", "--output", "counts.json", "test_it.py"]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == code, result.stdout
    assert (tmp_path / "counts.json").exists() == (code != 1)


def test_the_summary_has_kernels_parity_and_bench(tmp_path: Path) -> None:
    (tmp_path / "steps.tsv").write_text("one\t3\t2\ta | b\nparity-x-fp32\t0\t1\t\n")
    (tmp_path / "parity-x-fp32.json").write_text('{"x fp32": {"passed": false, "problems": ["too far"]}}')
    (tmp_path / "bench").mkdir()
    rows = [{"backend": "pytorch-eager", "precision": "fp32", "device": "cuda", "images_per_second": 7.5}]
    (tmp_path / "bench" / "bench.json").write_text(json.dumps({"segment": rows}))
    assert gpu_report.summary(tmp_path) == 3
    text = (tmp_path / "summary.md").read_text()
    assert "Exit code 3: a gate failed." in text
    assert "| one | 3 | 2 | a / b |" in text
    assert "| x fp32 | False | too far |" in text
    assert "| pytorch-eager | fp32 | cuda | 7.5 |" in text


@pytest.fixture(scope="module")
def device() -> Any:
    sys.path.insert(0, str(ROOT / "tests" / "cuda_on_cpu"))
    from cpu_device import CpuDevice, build

    yield CpuDevice(build())
    sys.path.remove(str(ROOT / "tests" / "cuda_on_cpu"))


def test_kernels_are_timed_and_compared_with_their_references(device: Any) -> None:
    walk = gpu_kernels.walk_row(device, 2, 3, 16, 1)
    crf = gpu_kernels.crf_row(device, 3, 24, 32, 1)
    enlarged = gpu_kernels.enlarge_row(device, 3, (6, 8), (24, 32), 1)
    assert gpu_kernels.problems([walk, crf, enlarged]) == []
    assert enlarged["max_error"] <= 1 / 255
    assert walk["max_error"] > 0 and walk["ways"]["resident"]["times_ours"] == 1
    assert {"resident", "host", gpu_kernels.ON_CPU} <= set(walk["ways"]) & set(crf["ways"]) & set(enlarged["ways"])
    wrong = [{**walk, "max_error": float("nan")}, *({**row, "label_agreement": 0.9} for row in (crf, enlarged))]
    for row in wrong:
        (problem,) = gpu_kernels.problems([row])
        assert row["kernel"] in problem


def test_the_packaged_bundle_has_no_fp16_graphs_yet() -> None:
    """gpu.sh looks for this name in bundle.json before it converts."""
    assert '"segmenter.fp16.onnx"' not in (default_bundle_path() / "bundle.json").read_text(encoding="utf-8")
