"""Which backend runs: what auto selects and why, requests that fail, and what a run records."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import public_bytes, run_label, run_segment

from multisa.runtime.backends import registry
from multisa.runtime.backends import tensorrt as tensorrt_module
from multisa.runtime.backends.base import AFFINITY, CAM, CONTRACTS, SEGMENTER, Closeable, GraphContract
from multisa.runtime.backends.gpus import GpuProbe
from multisa.runtime.backends.registry import (
    BACKENDS,
    BackendRequest,
    SelectedBackend,
    available_backends,
    bundle_precisions,
    describe_selection,
    open_backend,
    open_backends,
    select_backend,
    try_backend,
)
from multisa.runtime.backends.tensorrt import TensorRTOptions
from multisa.runtime.bundle import Bundle, Manifest, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.demo import IMAGES
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError


class FakeTensorRTBackend(Closeable):
    """Stands for a TensorRTBackend, which needs a GPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False

    def run(self, image: np.ndarray) -> dict[str, Any]:
        raise BackendError(f"{self.name}: is not meant to run {image.shape}")

    def close(self) -> None:
        self.closed = True


class FakeTensorRT:
    """Stands for the module multisa.runtime.backends.tensorrt and the engines it would find."""

    def __init__(self) -> None:
        self.engines: set[tuple[str, str, str]] = set()  # library, graph, precision
        self.asked: list[tuple[str, str, str]] = []
        self.options: list[TensorRTOptions] = []
        self.opened: list[FakeTensorRTBackend] = []

    def open_tensorrt(self, bundle: Bundle, contract: GraphContract, options: TensorRTOptions) -> FakeTensorRTBackend:
        assert options.library is not None
        self.options.append(options)
        self.asked.append((options.library, contract.name, options.precision))
        if self.asked[-1] not in self.engines:
            raise BackendUnavailable(
                f"{options.library}: no engine of {contract.name} in {options.precision} for sm89",
                remedy="multisa build",
            )
        self.opened.append(FakeTensorRTBackend(f"{options.library}-sm89"))
        return self.opened[-1]


@pytest.fixture
def tensorrt(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT()
    monkeypatch.setattr(tensorrt_module, "open_tensorrt", fake.open_tensorrt)
    return fake


def chosen(choice: SelectedBackend) -> tuple[str, str, str]:
    with choice.backend as backend:
        return (backend.name, choice.precision, choice.reason)


def test_auto_without_a_gpu(bundle_of_precisions: Bundle, no_gpu: None) -> None:
    for contract in CONTRACTS:
        answer = chosen(select_backend(bundle_of_precisions, contract))
        assert answer == ("onnxruntime-cpu", "fp32", "auto: no NVIDIA driver here")


def test_the_line_about_a_cpu_machine_is_calm(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is no problem to report; a GPU that cannot be used is."""

    def line() -> list[str]:
        selected = select_backend(bundle, CAM)
        selected.backend.close()
        return describe_selection([selected])

    assert line() == ["cam: onnxruntime-cpu, fp32 (no NVIDIA GPU)"]
    broken = GpuProbe(problem="no usable NVIDIA GPU here: cuInit: unknown error; check the driver")
    monkeypatch.setattr(registry, "probe_gpus", lambda: broken)
    assert line() == ["cam: onnxruntime-cpu, fp32 (auto: no usable NVIDIA GPU here: cuInit: unknown error)"]


@pytest.mark.slow
def test_available_backends(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "onnxruntime-cpu" in available_backends()  # the packaged bundle
    assert set(available_backends(bundle)) <= {"onnxruntime-cpu", "openvino"}
    trial = try_backend(bundle, "tensorrt")
    assert trial.ran == () and trial.problem.startswith("tensorrt cannot run cam here: no NVIDIA driver here")
    trial = try_backend(bundle, "onnxruntime-cpu")
    assert (trial.ran, trial.problem) == (("cam fp32", "affinity fp32", "segmenter fp32"), "")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime-cpu" not in available_backends(bundle)


def test_auto_prefers_an_engine_of_low_precision(bundle_of_precisions: Bundle, tensorrt: FakeTensorRT) -> None:
    tensorrt.engines |= {("tensorrt-rtx", "cam", "fp16"), ("tensorrt-rtx", "cam", "fp32")}
    name, precision, reason = chosen(select_backend(bundle_of_precisions, CAM))
    assert (name, precision) == ("tensorrt-rtx-sm89", "fp16")
    assert reason == ("auto: tensorrt: no engine of cam in fp16 for sm89; tensorrt: no engine of cam in fp32 for sm89")
    tensorrt.engines |= {("tensorrt", "cam", "fp32"), ("tensorrt", "segmenter", "fp32")}
    assert chosen(select_backend(bundle_of_precisions, CAM))[:2] == ("tensorrt-sm89", "fp32")
    tensorrt.asked.clear()
    assert chosen(select_backend(bundle_of_precisions, SEGMENTER)) == ("tensorrt-sm89", "fp32", "auto")
    assert tensorrt.asked == [("tensorrt", "segmenter", "fp32")]  # int8 only on request


def test_auto_without_an_engine_selects_cuda(
    bundle_of_precisions: Bundle, tensorrt: FakeTensorRT, cuda_on_cpu: None
) -> None:
    name, precision, reason = chosen(select_backend(bundle_of_precisions, CAM))
    assert (name, precision) == ("onnxruntime-cuda", "fp16")
    assert reason.count("no engine of cam") == 4
    assert chosen(select_backend(bundle_of_precisions, AFFINITY))[:2] == ("onnxruntime-cuda", "fp32")


def test_auto_with_a_gpu_that_nothing_here_can_use(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    name, precision, reason = chosen(select_backend(bundle, CAM))
    assert (name, precision) == ("onnxruntime-cpu", "fp32")
    assert "tensorrt-rtx: no engine" in reason and "onnxruntime-cuda: onnxruntime " in reason
    assert "multisa build" not in reason and "pip uninstall" not in reason  # the doctor says what to do


def test_reasons_are_first_clauses() -> None:
    skipped = [
        BackendUnavailable("no GPU here: cuInit: no device; check the driver", remedy="buy one"),
        BackendUnavailable("no GPU here: cuInit: no device"),
        BackendError("cam: got an engine of {}, expected {'image': 'input uint8 of rank 4'}"),
    ]
    reason = registry._reason(BackendRequest(), skipped)
    assert reason == "auto: no GPU here: cuInit: no device; cam: got an engine of {}"


def test_options_of_the_request_reach_tensorrt(bundle: Bundle, tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    tensorrt.engines |= {("tensorrt", "cam", "fp32")}
    side = bundle.manifest.parameters.long_side
    for name, long_side in (("auto", side), ("tensorrt", None)):
        select_backend(bundle, CAM, BackendRequest(name, engine_cache=tmp_path, may_repair=False)).backend.close()
        assert tensorrt.options[-1] == TensorRTOptions(
            library="tensorrt", engine_cache=tmp_path, long_side=long_side, may_repair=False
        )


@pytest.mark.parametrize("name", [name for name, kind in BACKENDS.items() if kind.needs_gpu])
def test_requested_without_a_gpu(bundle: Bundle, no_gpu: None, name: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        open_backend(bundle, CAM, backend=name)
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        f"{name} cannot run cam here: no NVIDIA driver here: "
        "choose onnxruntime-cpu or openvino, or a machine with an NVIDIA GPU and its driver"
    )


def test_requested_without_an_engine(bundle_of_precisions: Bundle, tensorrt: FakeTensorRT) -> None:
    with pytest.raises(BackendUnavailable, match=r"^tensorrt cannot run cam here: tensorrt: no engine of cam"):
        open_backend(bundle_of_precisions, CAM, backend="tensorrt")
    assert [precision for *_, precision in tensorrt.asked] == ["fp16", "fp32"]
    with pytest.raises(BackendUnavailable, match=r"in fp32 for sm89: multisa build$"):
        open_backend(bundle_of_precisions, CAM, backend="tensorrt-rtx", precision="fp32")


def test_the_requested_backend_is_selected(bundle_of_precisions: Bundle, cuda_on_cpu: None) -> None:
    request = BackendRequest("onnxruntime-cpu", "int8")
    answer = chosen(select_backend(bundle_of_precisions, SEGMENTER, request))
    assert answer == ("onnxruntime-cpu", "int8", "requested")
    with open_backend(bundle_of_precisions, CAM, backend="onnxruntime-cuda", precision="fp32") as backend:
        assert backend.name == "onnxruntime-cuda"


def test_nothing_runs_here(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=r"^no backend can run cam here: no NVIDIA .*pip install onnx"):
        open_backend(bundle, CAM)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (BackendRequest("opencv"), "got the backend 'opencv', expected auto or one of tensorrt, tensorrt-rtx"),
        (BackendRequest(precision="fp8"), "got the precision 'fp8', expected auto or one of fp32, fp16"),
        (
            BackendRequest("onnxruntime-cpu", "bf16"),
            "^onnxruntime-cpu computes in fp32, fp16, int8, got --precision bf16: .* or --backend openvino$",
        ),
        (BackendRequest("openvino", "fp16"), "^openvino computes in fp32, bf16, int8, got --precision fp16: "),
        (
            BackendRequest(precision="fp16"),
            "has segmenter in fp32 and int8, got --precision fp16: create a bundle that has it: multisa",
        ),
    ],
)
def test_requests_that_cannot_be(bundle_of_precisions: Bundle, request_: BackendRequest, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        select_backend(bundle_of_precisions, SEGMENTER, request_)


def test_a_graph_that_is_not_listed_is_not_there(bundle: Bundle, graphs: dict[str, bytes]) -> None:
    (bundle.path / "cam.fp16.onnx").write_bytes(graphs["cam.onnx"])
    assert bundle_precisions(bundle, CAM) == ("fp32",)
    with pytest.raises(UsageError, match="multisa convert"):
        open_backend(bundle, CAM, precision="fp16")


def test_backends_are_closed_when_a_later_one_fails(
    tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes], tensorrt: FakeTensorRT
) -> None:
    tensorrt.engines |= {("tensorrt", "cam", "fp32")}
    broken = write_bundle(tmp_path / "broken", manifest, graphs | {"affinity.onnx": graphs["cam.onnx"]})
    with pytest.raises(BackendError, match="affinity"):
        open_backends(broken, (CAM, AFFINITY))
    assert [backend.closed for backend in tensorrt.opened] == [True]


def test_graphs_of_one_backend_share_a_line() -> None:
    backend = FakeTensorRTBackend("fast")
    choices = [
        SelectedBackend("cam", backend, "fp16", "auto"),
        SelectedBackend("affinity", backend, "fp16", "auto"),
        SelectedBackend("segmenter", backend, "fp32", "auto"),
    ]
    assert describe_selection(choices) == ["cam, affinity: fast, fp16 (auto)", "segmenter: fast, fp32 (auto)"]


def test_a_run_logs_and_records_its_backends(
    bundle: Bundle, photos: Path, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "label"
    run_label(photos / "a.jpg", out, bundle)
    messages = [
        "cam, affinity: onnxruntime-cpu, fp32 (no NVIDIA GPU)",
        "label method: walk",
        "labelled with predicted classes: 1 of 1 image",
    ]
    assert capsys.readouterr().err.splitlines() == messages
    record = json.loads((out / ".multisa/run.json").read_text())
    reason = {"backend": "onnxruntime-cpu", "precision": "fp32", "reason": "auto: no NVIDIA driver here"}
    assert record["backends"] == {"cam": reason, "affinity": reason}
    assert record["versions"].keys() >= {"python", "multisa", "numpy", "onnxruntime", "pillow"}


def test_masks_do_not_depend_on_how_the_backend_was_selected(bundle: Bundle, tmp_path: Path, no_gpu: None) -> None:
    """All files but .multisa are byte-identical, whether selected or requested."""
    results = []
    for name in ("auto", "onnxruntime-cpu"):
        out = tmp_path / name
        run_segment(IMAGES, out, bundle, request=BackendRequest(name))
        results.append(public_bytes(out))
    assert results[0] == results[1] and len(results[0]) == 4


@pytest.mark.parametrize(
    ("features", "saturates"),
    [({"avx2", "fma"}, True), ({"avx2", "avx512_vnni"}, False), ({"avx2", "avx_vnni"}, False), ({"asimd"}, False)],
)
def test_int8_without_vnni_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, features: set[str], saturates: bool
) -> None:
    monkeypatch.setattr(registry, "processor_features", lambda: frozenset(features))
    assert registry.saturates_int8() == saturates
    for precision in ("fp32", "int8"):
        caplog.clear()
        request = BackendRequest("onnxruntime-cpu", precision)
        with open_backends(load_bundle(default_bundle_path()), (SEGMENTER,), request):
            pass
        warned = [r for r in caplog.records if "no VNNI" in r.message]
        assert len(warned) == (saturates and precision == "int8")
