"""Which engine runs: what auto takes and why, what is asked for and not there, and what a run records."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from job_runs import public_bytes, run_label, run_segment

from multisa.runtime.backends import registry as choice
from multisa.runtime.backends.base import AFFINITY, CAM, CONTRACTS, SEGMENTER, Closeable, GraphContract
from multisa.runtime.backends.registry import (
    BACKENDS,
    BackendRequest,
    SelectedBackend,
    bundle_precisions,
    describe_selection,
    open_backend,
    select_backend,
    selected_backends,
)
from multisa.runtime.bundle import Bundle, Manifest, write_bundle
from multisa.runtime.cli import commands
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError

IMAGES = Path(commands.__file__).parent / "demo_images"


class Plan(Closeable):
    """Stands for a TensorRT engine, which needs a GPU to be one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False

    def run(self, image: np.ndarray) -> dict[str, Any]:
        raise BackendError(f"{self.name}: is not meant to run {image.shape}")

    def close(self) -> None:
        self.closed = True


class Plans:
    """Stands for the module multisa.runtime.backends.tensorrt and the plans it would find."""

    def __init__(self, there: set[tuple[str, str, str]]) -> None:
        self.there = there
        self.asked: list[tuple[str, str, str]] = []
        self.opened: list[Plan] = []

    def open_tensorrt(
        self, bundle: Bundle, contract: GraphContract, *, precision: str, library: str, **rest: object
    ) -> Plan:
        self.rest = rest
        self.asked.append((library, contract.name, precision))
        if self.asked[-1] not in self.there:
            raise BackendUnavailable(
                f"{library}: no plan of {contract.name} in {precision} for sm89", remedy="multisa build"
            )
        self.opened.append(Plan(f"{library}-sm89"))
        return self.opened[-1]


@pytest.fixture
def engine_cache(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Plans:
    found = Plans(set())
    module = ModuleType("multisa.runtime.backends.tensorrt")
    module.open_tensorrt = found.open_tensorrt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def chosen(choice: SelectedBackend) -> tuple[str, str, str]:
    with choice.backend as backend:
        return (backend.name, choice.precision, choice.reason)


def test_auto_without_a_gpu(bundle_of_precisions: Bundle, no_gpu: None) -> None:
    for contract in CONTRACTS:
        answer = chosen(select_backend(bundle_of_precisions, contract))
        assert answer == ("onnxruntime-cpu", "fp32", "auto: no NVIDIA driver here")


def test_auto_takes_a_plan_of_low_precision_first(bundle_of_precisions: Bundle, engine_cache: Plans) -> None:
    engine_cache.there |= {("tensorrt-rtx", "cam", "fp16"), ("tensorrt-rtx", "cam", "fp32")}
    name, precision, reason = chosen(select_backend(bundle_of_precisions, CAM))
    assert (name, precision) == ("tensorrt-rtx-sm89", "fp16")
    assert reason == (
        "auto: tensorrt: no plan of cam in fp16 for sm89; tensorrt: no plan of cam in fp32 for sm89"
    )
    engine_cache.there |= {("tensorrt", "cam", "fp32"), ("tensorrt", "segmenter", "fp32")}
    assert chosen(select_backend(bundle_of_precisions, CAM))[:2] == ("tensorrt-sm89", "fp32")
    engine_cache.asked.clear()
    assert chosen(select_backend(bundle_of_precisions, SEGMENTER)) == ("tensorrt-sm89", "fp32", "auto")
    assert engine_cache.asked == [
        ("tensorrt", "segmenter", "fp32")
    ]  # int8 is taken only where it is asked for


def test_auto_without_a_plan_takes_cuda(
    bundle_of_precisions: Bundle, engine_cache: Plans, cuda_on_cpu: None
) -> None:
    name, precision, reason = chosen(select_backend(bundle_of_precisions, CAM))
    assert (name, precision) == ("onnxruntime-cuda", "fp16")
    assert reason.count("no plan of cam") == 4
    assert chosen(select_backend(bundle_of_precisions, AFFINITY))[:2] == ("onnxruntime-cuda", "fp32")


def test_auto_with_a_gpu_that_nothing_here_can_use(bundle: Bundle, engine_cache: Plans) -> None:
    name, precision, reason = chosen(select_backend(bundle, CAM))
    assert (name, precision) == ("onnxruntime-cpu", "fp32")
    assert "tensorrt-rtx: no plan" in reason and "onnxruntime-cuda: onnxruntime " in reason
    assert "multisa build" not in reason and "pip uninstall" not in reason  # the doctor says what to do


def test_reasons_are_first_clauses() -> None:
    skipped = [
        BackendUnavailable("no GPU here: cuInit: no device; check the driver", remedy="buy one"),
        BackendUnavailable("no GPU here: cuInit: no device"),
        BackendError("cam: got a plan of {}, expected {'image': 'input uint8 of rank 4'}"),
    ]
    reason = choice._reason(BackendRequest(), skipped)
    assert reason == "auto: no GPU here: cuInit: no device; cam: got a plan of {}"


def test_what_is_asked_of_plans_is_passed_on(bundle: Bundle, engine_cache: Plans, tmp_path: Path) -> None:
    engine_cache.there |= {("tensorrt", "cam", "fp32")}
    side = bundle.manifest.parameters.long_side
    for name, long_side in (("auto", side), ("tensorrt", None)):
        select_backend(
            bundle, CAM, BackendRequest(name, engine_cache=tmp_path, may_repair=False)
        ).backend.close()
        assert engine_cache.rest == {"cache": tmp_path, "long_side": long_side, "may_repair": False}


@pytest.mark.parametrize("name", [name for name, kind in BACKENDS.items() if kind.needs_gpu])
def test_asked_for_without_a_gpu(bundle: Bundle, no_gpu: None, name: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        open_backend(bundle, CAM, backend=name)
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        f"{name} cannot run cam here: no NVIDIA driver here: "
        "choose onnxruntime-cpu or openvino, or a machine with an NVIDIA GPU and its driver"
    )


def test_asked_for_without_a_plan(bundle_of_precisions: Bundle, engine_cache: Plans) -> None:
    with pytest.raises(BackendUnavailable, match=r"^tensorrt cannot run cam here: tensorrt: no plan of cam"):
        open_backend(bundle_of_precisions, CAM, backend="tensorrt")
    assert [precision for *_, precision in engine_cache.asked] == ["fp16", "fp32"]
    with pytest.raises(BackendUnavailable, match=r"in fp32 for sm89: multisa build$"):
        open_backend(bundle_of_precisions, CAM, backend="tensorrt-rtx", precision="fp32")


def test_what_is_asked_for_is_taken(bundle_of_precisions: Bundle, cuda_on_cpu: None) -> None:
    request = BackendRequest("onnxruntime-cpu", "int8")
    answer = chosen(select_backend(bundle_of_precisions, SEGMENTER, request))
    assert answer == ("onnxruntime-cpu", "int8", "asked for")
    with open_backend(bundle_of_precisions, CAM, backend="onnxruntime-cuda", precision="fp32") as backend:
        assert backend.name == "onnxruntime-cuda"


def test_nothing_runs_here(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendUnavailable, match=r"^no engine can run cam here: no NVIDIA .*pip install onnx"
    ):
        open_backend(bundle, CAM)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (BackendRequest("opencv"), "got the engine 'opencv', expected auto or one of tensorrt, tensorrt-rtx"),
        (BackendRequest(precision="fp8"), "got the precision 'fp8', expected auto or one of fp32, fp16"),
        (
            BackendRequest("onnxruntime-cpu", "bf16"),
            "^onnxruntime-cpu computes in fp32, fp16, int8, got --precision bf16: .* or --backend openvino$",
        ),
        (
            BackendRequest("openvino", "fp16"),
            "^openvino computes in fp32, bf16, int8, got --precision fp16: ",
        ),
        (
            BackendRequest(precision="fp16"),
            "has segmenter in fp32 and int8, got --precision fp16: make a bundle that has it: multisa",
        ),
    ],
)
def test_requests_that_cannot_be(
    bundle_of_precisions: Bundle, request_: BackendRequest, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        select_backend(bundle_of_precisions, SEGMENTER, request_)


def test_a_graph_that_is_not_listed_is_not_there(bundle: Bundle, graphs: dict[str, bytes]) -> None:
    (bundle.path / "cam.fp16.onnx").write_bytes(graphs["cam.onnx"])
    assert bundle_precisions(bundle, CAM) == ("fp32",)
    with pytest.raises(UsageError, match="multisa convert"):
        open_backend(bundle, CAM, precision="fp16")


def test_engines_are_closed_when_a_later_one_fails(
    tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes], engine_cache: Plans
) -> None:
    engine_cache.there |= {("tensorrt", "cam", "fp32")}
    broken = write_bundle(tmp_path / "broken", manifest, graphs | {"affinity.onnx": graphs["cam.onnx"]})
    with pytest.raises(BackendError, match="affinity"), selected_backends(broken, (CAM, AFFINITY)):
        pytest.fail("the second engine cannot be opened")
    assert [plan.closed for plan in engine_cache.opened] == [True]


def test_graphs_of_one_engine_share_a_line() -> None:
    backend = Plan("fast")
    choices = [
        SelectedBackend("cam", backend, "fp16", "auto"),
        SelectedBackend("affinity", backend, "fp16", "auto"),
        SelectedBackend("segmenter", backend, "fp32", "auto"),
    ]
    assert describe_selection(choices) == [
        "cam, affinity: on fast, fp16 (auto)",
        "segmenter: on fast, fp32 (auto)",
    ]


def test_a_run_says_and_records_its_engines(
    bundle: Bundle, photos: Path, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "label"
    run_label(photos / "a.jpg", out, bundle)
    line = "on onnxruntime-cpu, fp32 (auto: no NVIDIA driver here)"
    assert capsys.readouterr().err == f"cam, affinity: {line}\n"
    record = json.loads((out / ".multisa/run.json").read_text())
    reason = {
        "engine": "onnxruntime-cpu",
        "precision": "fp32",
        "reason": "auto: no NVIDIA driver here",
    }
    assert record["engines"] == {"cam": reason, "affinity": reason}
    assert record["versions"].keys() >= {"python", "multisa", "numpy", "onnxruntime", "pillow"}


def test_masks_do_not_depend_on_how_the_engine_was_found(
    bundle: Bundle, tmp_path: Path, no_gpu: None
) -> None:
    """All but .multisa is the same bytes, chosen or asked for."""
    results = []
    for name in ("auto", "onnxruntime-cpu"):
        out = tmp_path / name
        run_segment(IMAGES, out, bundle, request=BackendRequest(name))
        results.append(public_bytes(out))
    assert results[0] == results[1] and len(results[0]) == 4
