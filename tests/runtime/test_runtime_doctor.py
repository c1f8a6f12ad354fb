"""The doctor: what it finds, that it really tries the backends, and that broken packages do not end it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
from click.testing import CliRunner

import multisa.kernels.cpu as native_module
from multisa.kernels.cuda import build
from multisa.runtime import doctor, system
from multisa.runtime.backends import gpus
from multisa.runtime.backends.engine_cache import EngineCache, EngineKey, Profile, this_platform
from multisa.runtime.backends.registry import BACKENDS
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.cli.main import root
from multisa.runtime.doctor import Diagnosis, Finding, describe_diagnosis, examine


def found(diagnosis: Diagnosis, name: str) -> Finding:
    (finding,) = (f for f in (*diagnosis.machine, *diagnosis.backends) if f.name == name)
    return finding


def test_this_machine(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libcuda.so.absent")
    diagnosis = examine(bundle.path)
    assert diagnosis.versions["onnxruntime"] == onnxruntime.__version__
    assert found(diagnosis, "onnxruntime").text.startswith(onnxruntime.__version__)
    assert "CPUExecutionProvider" in found(diagnosis, "onnxruntime").text
    kernels = native_module.native
    assert f"run with {kernels.instruction_set()}" in found(diagnosis, "CPU kernels").text
    assert found(diagnosis, "GPU") == Finding("GPU", False, "no NVIDIA driver here: libcuda.so.absent cannot be loaded")
    has = found(diagnosis, "bundle").text
    assert has.startswith("tiny, all files verified; cam (fp32), affinity (fp32), segmenter (fp32); ")
    assert "TensorRT engines: none" in has
    assert [backend.name for backend in diagnosis.backends] == list(BACKENDS)
    ran = "ran cam fp32, affinity fp32, segmenter fp32"
    usable = [Finding(name, True, ran) for name in ("onnxruntime-cpu", "openvino")]
    assert [backend for backend in diagnosis.backends if backend.ok] == usable
    assert "no NVIDIA driver here" in found(diagnosis, "tensorrt").text
    line = "cam, affinity, segmenter: onnxruntime-cpu, fp32 (no NVIDIA GPU)"
    assert diagnosis.auto == [line]


def test_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache(bundle.path / ENGINES_FOLDER)
    bucket = Profile((1, 64, 64), (1, 64, 64), (1, 64, 64))
    key = EngineKey("cam", "fp16", "0" * 64, "tensorrt-rtx", "1.7", "sm89", "", (bucket,), (), this_platform())
    for change in ({}, {"graph": "affinity"}, {"target": "\x1b[2J"}, {"library": "tensorrt"}):
        cache.get_or_build(replace(key, **change), lambda: b"plan")
    for i, text in enumerate(("{}", "[]", json.dumps({"key": asdict(key)}))):
        path = cache.folder / f"{i:016x}" / "plan.json"
        path.parent.mkdir()
        path.write_text(text)
    assert (
        "; TensorRT engines: tensorrt sm89 (cam fp16), tensorrt-rtx \\x1b[2J (cam fp16), "
        "tensorrt-rtx sm89 (affinity fp16, cam fp16), "
        "unreadable (0000000000000000, 0000000000000001, 0000000000000002); "
    ) in found(examine(bundle.path), "bundle").text

    listed = found(examine(bundle.path, engine_cache=cache.folder), "bundle").text
    assert f"; in {str(cache.folder)!r}: tensorrt sm89 (cam fp16), tensorrt-rtx" in listed

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert doctor._describe_engines(cache.folder) == "unreadable (Permission denied)"


def test_a_gpu_and_its_precisions(bundle_of_precisions: Bundle, cuda_on_cpu: None) -> None:
    diagnosis = examine(bundle_of_precisions.path)
    assert "cam (fp32 fp16), affinity (fp32), segmenter (fp32 int8)" in found(diagnosis, "bundle").text
    ran = Finding("onnxruntime-cuda", True, "ran cam fp16, affinity fp32, segmenter fp32")
    assert found(diagnosis, "onnxruntime-cuda") == ran


def test_the_packaged_bundle_is_the_default() -> None:
    finding, bundle = doctor._bundle(None)
    assert finding.ok and bundle is not None and "voc-animals" in finding.text


def test_the_driver_says_what_is_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = gpus.GpuProbe("13.2", (gpus.Gpu("NVIDIA A", "sm89"), gpus.Gpu("NVIDIA B", "sm120")))
    monkeypatch.setattr(gpus, "probe_gpus", lambda: probe)
    text = "NVIDIA A (sm89), NVIDIA B (sm120); the driver supports CUDA up to 13.2"
    assert found(examine(bundle.path), "GPU") == Finding("GPU", True, text)


def test_a_damaged_bundle(bundle: Bundle) -> None:
    (bundle.path / "cam.onnx").write_bytes(b"")
    diagnosis = examine(bundle.path)
    finding = found(diagnosis, "bundle")
    assert not finding.ok and "cam.onnx: got 0 bytes, expected" in finding.text
    assert diagnosis.backends == [] and diagnosis.auto == ["nothing: there is no bundle to run"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("onnxruntime", ("onnxruntime", "onnxruntime-cpu")),
        ("multisa.kernels.cpu", ("CPU kernels",)),
        ("multisa.kernels.cuda.build", ("CUDA kernels",)),
        ("multisa.runtime.backends.gpus", ("GPU",)),
        ("multisa.runtime.bundle", ("bundle",)),
    ],
)
def test_a_module_that_cannot_be_imported(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, module: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    diagnosis = examine(bundle.path)
    for name in names:
        assert not found(diagnosis, name).ok and found(diagnosis, name).text
    assert found(diagnosis, "processor").ok


def test_an_onnxruntime_that_is_broken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a folder that was left behind: it can be imported, but is empty."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    diagnosis = examine(bundle.path)
    assert "get_available_providers" in found(diagnosis, "onnxruntime").text
    assert not found(diagnosis, "onnxruntime-cpu").ok
    assert "onnxruntime" in diagnosis.auto[0]


def test_two_packages_of_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "version", lambda name: "1.31.1" if name.endswith("-gpu") else "1.32.0")
    finding = found(examine(bundle.path), "onnxruntime")
    assert not finding.ok
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 overwrite each other" in finding.text


def test_cuda_kernels(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fatbin = tmp_path / "kernels.fatbin"
    monkeypatch.setattr(build, "FATBIN", fatbin)
    record = {"nvcc": "13.0.88", "sources": build.source_digest(), "architectures": [75, 120], "ptx": [120]}
    findings = []
    for text in (None, json.dumps(record), json.dumps(record | {"sources": "others"}), "{}", "no json"):
        if text is not None:
            fatbin.write_bytes(b"code")
            fatbin.with_suffix(".json").write_text(text)
        finding = doctor._cuda_kernels()
        findings.append((finding.ok, finding.text.partition(": run python -m multisa")[0]))
    assert findings[:3] == [
        (False, "not compiled"),
        (True, "for sm75, sm120, and later GPUs from PTX of sm120; nvcc 13.0.88"),
        (False, "compiled from other sources than these"),
    ]
    assert [ok for ok, _ in findings[3:]] == [False, False]
    fatbin.with_suffix(".json").unlink()
    assert not doctor._cuda_kernels().ok


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_its_columns(bundle: Bundle, no_gpu: None, width: int) -> None:
    page = describe_diagnosis(examine(bundle.path), width).splitlines()
    assert all(len(line) <= width or " " not in line.strip() for line in page)
    assert any(line.startswith("  onnxruntime-cpu") and "usable: ran cam" in line for line in page)
    assert any(line.startswith("  tensorrt  ") and "not usable: " in line for line in page)


def test_command(bundle: Bundle, no_gpu: None) -> None:
    result = CliRunner().invoke(root, ["doctor", "--bundle", str(bundle.path)])
    assert result.exit_code == 0 and result.stderr == ""
    assert "\n  onnxruntime-cpu   usable: ran cam fp32" in result.stdout
    result = CliRunner().invoke(root, ["doctor", "--bundle", str(bundle.path), "--json"])
    assert result.exit_code == 0
    assert [backend["name"] for backend in json.loads(result.stdout)["backends"]] == list(BACKENDS)


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["page", "json"])
def test_exit_codes(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch, form: list[str]) -> None:
    result = CliRunner().invoke(root, ["doctor", "--bundle", "absent", *form])
    assert result.exit_code == 1 and "there is no bundle to run" in result.stdout
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(root, ["doctor", "--bundle", str(bundle.path), *form])
    assert result.exit_code == 5 and "onnxruntime is not installed" in " ".join(result.stdout.split())
