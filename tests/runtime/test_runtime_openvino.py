"""OpenVINO: fp32 equals ONNX Runtime, bf16 is close, the bytes are the same for any workers; what it refuses.

What holds for every backend is in test_runtime_backend.py.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from job_runs import public_bytes, records, run_label, run_segment
from onnx import TensorProto, helper

from multisa.export.parity import Compared, measure_parity
from multisa.runtime.backends import openvino as backend_module
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, GraphContract
from multisa.runtime.backends.openvino import FILE_PRECISIONS, OpenVinoBackend
from multisa.runtime.backends.registry import BackendRequest, backend_precisions, open_backend, select_backend
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.cli.main import root
from multisa.runtime.demo import IMAGES
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.imaging.decode import read_image, resize_image

pytestmark = pytest.mark.slow

if importlib.util.find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)
openvino = backend_module.import_openvino()

IMAGE = np.random.default_rng(0).integers(0, 256, (1, 41, 67, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def packaged() -> Bundle:
    return load_bundle(default_bundle_path())


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    paths = sorted(IMAGES.glob("*.jpg"))
    assert len(paths) == 3
    return [resize_image(read_image(path).rgb, (97, 145))[np.newaxis] for path in paths]


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that supports fp32 and int8 only."""
    monkeypatch.setattr(openvino, "Core", lambda: Plain())


class Plain:
    """Stands for OpenVINO's Core on such a processor."""

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return ["FP32", "INT8"]


@pytest.fixture
def supports_bf16() -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not support bf16")


def pairs(packaged: Bundle, contract: GraphContract, precision: str, images: list[np.ndarray]) -> Iterator[Compared]:
    with (
        open_backend(packaged, contract, backend="onnxruntime-cpu") as reference,
        open_backend(packaged, contract, backend="openvino", precision=precision) as backend,
    ):
        for image in images:
            yield Compared(reference.run(image), backend.run(image))


def is_far(got: np.ndarray, expected: np.ndarray) -> bool:
    """A larger difference than another order of summation causes."""
    if got.dtype == np.uint8:
        return bool((got != expected).mean() > 1e-3)
    return bool(np.abs(got - expected).max() > 2e-4)


@pytest.mark.parametrize("contract", [AFFINITY, SEGMENTER], ids=lambda contract: contract.name)
def test_fp32_is_fp32(packaged: Bundle, images: list[np.ndarray], contract: GraphContract) -> None:
    """Left to itself, OpenVINO would take bf16 where it can."""
    for expected, got, _ in pairs(packaged, contract, "fp32", images):
        assert not any(is_far(got[name], expected[name]) for name in contract.outputs)


def test_bf16_is_within_its_limits_and_is_bf16(packaged: Bundle, images: list[np.ndarray], supports_bf16: None) -> None:
    compared = list(pairs(packaged, SEGMENTER, "bf16", images))
    report = measure_parity(compared, "bf16")
    assert report.problems() == [] and report.differences.keys() == SEGMENTER.outputs.keys()
    assert any(is_far(got["probabilities"], expected["probabilities"]) for expected, got, _ in compared)


def test_which_precisions_it_computes_in(bundle_of_precisions: Bundle) -> None:
    assert tuple(FILE_PRECISIONS) == ("fp32", "bf16", "int8")
    assert backend_precisions(bundle_of_precisions, CAM, "openvino") == ("fp32",)
    assert backend_precisions(bundle_of_precisions, SEGMENTER, "openvino") == ("fp32", "bf16", "int8")
    assert backend_precisions(bundle_of_precisions, CAM, "onnxruntime-cpu") == ("fp32", "fp16")
    assert backend_precisions(bundle_of_precisions, CAM, "opencv") == ()
    with pytest.raises(BackendError, match="got the precision 'fp16', expected one of fp32, bf16, int8"):
        OpenVinoBackend(b"", precision="fp16")


def test_bf16_is_where_openvino_is(bundle: Bundle, no_gpu: None, supports_bf16: None) -> None:
    """No other backend computes in bf16, so "auto" selects OpenVINO."""
    choice = select_backend(bundle, SEGMENTER, BackendRequest(precision="bf16"))
    with choice.backend as backend:
        assert (backend.name, choice.precision) == ("openvino", "bf16")
    with select_backend(bundle, SEGMENTER).backend as backend:
        assert backend.name == "onnxruntime-cpu"


@pytest.mark.parametrize("name", ["auto", "openvino"])
def test_bf16_is_for_the_segmenter(bundle: Bundle, name: str) -> None:
    with pytest.raises(UsageError, match="only the segmenter exists in bf16, expected fp32 or fp16"):
        select_backend(bundle, CAM, BackendRequest(name, "bf16"))


def test_bf16_of_a_graph_that_is_none_for_it(graphs: dict[str, bytes], supports_bf16: None) -> None:
    with pytest.raises(BackendError, match="got the precision bf16, expected it for segmenter alone"):
        OpenVinoBackend(graphs["cam.onnx"], precision="bf16")


def test_a_processor_without_bf16(bundle: Bundle, without_bf16: None) -> None:
    problem = r"does not support bf16, got FP32, INT8: choose the precision fp32 or int8$"
    with pytest.raises(BackendUnavailable, match=problem) as caught:
        open_backend(bundle, SEGMENTER, backend="openvino", precision="bf16")
    assert caught.value.exit_code == 5


def test_the_package_is_not_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="openvino is not installed: pip install openvino") as caught:
        open_backend(bundle, CAM, backend="openvino")
    assert caught.value.exit_code == 5


def test_the_package_is_broken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Plain:
        raise RuntimeError('Exception from src/core.cpp:1:\nDevice with "CPU" name is not registered\n')

    monkeypatch.setattr(openvino, "Core", fail)
    with pytest.raises(BackendUnavailable, match='has no CPU here: Device with "CPU" name is not registered:'):
        open_backend(bundle, CAM, backend="openvino")


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_side_by_side_give_the_same_bytes(
    packaged: Bundle, images: list[np.ndarray], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many calls at once as streams, fewer and more; with one and with three CPUs."""
    answers = []
    for cpus in (1, 3):
        monkeypatch.setattr(backend_module, "usable_cpus", lambda cpus=cpus: cpus)
        with open_backend(packaged, AFFINITY, threads=threads, backend="openvino") as backend:
            for callers in (1, 5):
                with ThreadPoolExecutor(callers) as pool:
                    found = list(pool.map(backend.run, images * 2))
                answers.append([answer["affinity"].tobytes() for answer in found])
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][:3] == answers[0][3:] and len(set(answers[0])) == 3


def test_settings() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "usable_cpus", lambda: 8)
        values = [backend_module._settings(threads, "fp32") for threads in (1, 3, 16)]
    found = [(v["NUM_STREAMS"], v["INFERENCE_NUM_THREADS"]) for v in values]
    assert found == [(8, 8), (2, 6), (1, 16)]
    # Else every size of an image takes megabytes for good.
    assert all(v["CPU_RUNTIME_CACHE_CAPACITY"] == 0 for v in values)


def test_a_path_and_errors_of_graphs(graphs: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "cam.onnx").write_bytes(graphs["cam.onnx"])
    with OpenVinoBackend(tmp_path / "cam.onnx") as one, OpenVinoBackend(graphs["cam.onnx"]) as two:
        assert one.contract == two.contract == CAM
        np.testing.assert_array_equal(one.run(IMAGE)["cam"], two.run(IMAGE)["cam"])
    with pytest.raises(BackendError, match=r"gone\.onnx: cannot be loaded: .*No such file"):
        OpenVinoBackend(tmp_path / "gone.onnx")
    with pytest.raises(BackendError, match="graph: cannot be loaded: not an ONNX file"):
        OpenVinoBackend(b"<net/>")
    with pytest.raises(BackendError, match=r"segmenter: got the outputs .*expected segmenter"):
        OpenVinoBackend(graphs["cam.onnx"], contract=SEGMENTER)


def segmenter_of(nodes: list[onnx.NodeProto], shape: list[int]) -> bytes:
    """A graph of the segmenter's tensors that makes something else of them."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["a", "b", "c", "d"])]
    nodes = [*nodes, helper.make_node("Cast", ["made"], ["probabilities"], to=TensorProto.FLOAT)]
    constant = onnx.numpy_helper.from_array(np.array(shape), "shape")
    graph = helper.make_graph(nodes, "odd", [image], outputs, [constant])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def test_failures_of_a_graph_are_backend_errors() -> None:
    """One line, without the places in OpenVINO's sources."""
    unknown = segmenter_of([helper.make_node("NoSuchNode", ["image"], ["made"])], [1])
    with pytest.raises(BackendError, match=r"^graph: cannot be loaded: .+") as caught:
        OpenVinoBackend(unknown)
    assert "\n" not in str(caught.value) and "Exception from" not in str(caught.value)
    odd = segmenter_of([helper.make_node("Reshape", ["image", "shape"], ["made"])], [7, 7, 7, 7])
    with OpenVinoBackend(odd) as backend:
        for _ in range(2):  # a request that has failed is not used again
            with pytest.raises(BackendError, match=r"^segmenter: cannot be run: .+") as caught:
                backend.run(IMAGE)
            assert "\n" not in str(caught.value) and "Exception from" not in str(caught.value)
        seven = np.zeros((1, 7, 7, 3), np.uint8)
        with pytest.raises(BackendError, match="cannot be run"):
            backend.run(seven)


def test_runs_have_the_same_bytes_for_any_workers(packaged: Bundle, tmp_path: Path, supports_bf16: None) -> None:
    request = BackendRequest("openvino", "bf16")
    results = []
    for workers in (1, 4):
        out = tmp_path / str(workers)
        run_segment(IMAGES, out, packaged, request=request, workers=workers)
        results.append(public_bytes(out))
    assert results[0] == results[1]
    assert sum(name.endswith(".png") for name in results[0]) == 3


def test_label_runs(bundle: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny graphs are exact in both, so the masks are the same bytes as ONNX Runtime's."""
    masks: list[Any] = []
    for name in ("openvino", "onnxruntime-cpu"):
        run_label(photos, tmp_path / name, bundle, request=BackendRequest(name))
        masks.append({k: v for k, v in public_bytes(tmp_path / name).items() if k.endswith(".png")})
        assert f"cam, affinity: {name}, fp32 (requested)" in capsys.readouterr().err
    assert masks[0] == masks[1] and len(masks[0]) == 5


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["segment", str(IMAGES), "-o", str(out), "--backend", "openvino"]
    result = CliRunner().invoke(root, command)
    assert result.exit_code == 0, result.output
    assert len(records(out)) == 3 and len(list((out / "masks").rglob("*.png"))) == 3
    again = CliRunner().invoke(root, [*command, "--backend", "onnxruntime-cpu"])
    assert again.exit_code == 2 and "backend of segmenter: got onnxruntime-cpu, fp32" in again.output


def test_nothing_is_printed_or_left_behind(graphs: dict[str, bytes], tmp_path: Path) -> None:
    """In a process and a folder of its own: no line on stdout or stderr, no file in the folder or home."""
    (tmp_path / "segmenter.onnx").write_bytes(graphs["segmenter.onnx"])
    program = (
        "import numpy as np, pathlib, sys\n"
        "from multisa.runtime.backends.openvino import OpenVinoBackend\n"
        "assert 'openvino' not in sys.modules\n"
        "with OpenVinoBackend(pathlib.Path('segmenter.onnx')) as backend:\n"
        "    backend.run(np.zeros((1, 40, 40, 3), np.uint8))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
    )
    assert result.stdout == result.stderr == b""
    assert [path.name for path in tmp_path.iterdir()] == ["segmenter.onnx"]


def test_first_calls_from_several_threads_at_once_do_not_hang() -> None:
    # Statics of the binding are made by the first call of a process. Without the lock one of four hung.
    program = (
        "import sys, threading\n"
        "import numpy as np\n"
        "from multisa.runtime.bundle import default_bundle_path\n"
        "from multisa.runtime.backends.openvino import OpenVinoBackend\n"
        "sys.setswitchinterval(1e-5)\n"
        "backend = OpenVinoBackend(default_bundle_path() / 'segmenter.onnx', threads=1)\n"
        "barrier, done = threading.Barrier(4), []\n"
        "def call():\n"
        "    barrier.wait()\n"
        "    done.append(backend.run(np.zeros((1, 32, 32, 3), np.uint8)))\n"
        "threads = [threading.Thread(target=call) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert len(done) == 4\n"
    )
    for _ in range(6):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
