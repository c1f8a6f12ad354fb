"""Every backend: outputs, the contract, and one named error for everything that goes wrong."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from plain_masks import tiny_probabilities

from multisa.runtime.backends.base import AFFINITY, CAM, CONTRACTS, SEGMENTER, Backend, GraphContract
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import BACKENDS, open_backend
from multisa.runtime.bundle import Bundle, Manifest, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.demo import IMAGES
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.imaging.decode import read_image, resize_image

Open = Callable[..., Backend]
Answer = dict[str, np.ndarray]

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 41, 67, 3), dtype=np.uint8)
DARK = IMAGE // 4


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return resize_image(read_image(IMAGES / "chelsea.jpg").rgb, (129, 193))[np.newaxis]


# The backends of this machine, and ONNX Runtime's CUDA provider emulated on the CPU.
CASES = [*BACKENDS, "onnxruntime-cuda, the provider being the CPU"]


@pytest.mark.parametrize("case", CASES)
class TestEveryBackend:
    """What holds for each backend; those that are unavailable are skipped with the reason."""

    @pytest.fixture
    def opened(self, case: str, request: pytest.FixtureRequest) -> Iterator[Open]:
        name, _, emulated = case.partition(", ")
        if emulated:
            request.getfixturevalue("cuda_on_cpu")
        with ExitStack() as stack:

            def open_here(
                bundle: Bundle, contract: GraphContract, *, threads: int = 1, precision: str = "fp32"
            ) -> Backend:
                try:
                    backend = open_backend(bundle, contract, threads=threads, backend=name, precision=precision)
                except BackendUnavailable as error:
                    if name == "onnxruntime-cpu" or emulated:  # available everywhere
                        raise
                    pytest.skip(str(error))
                assert backend.name.startswith(name)
                return stack.enter_context(backend)

            yield open_here

    def test_answers_are_those_of_the_graph(self, opened: Open, bundle: Bundle) -> None:
        """Against NumPy: the tiny graphs are simple enough."""
        answers = (expected_cam(), expected_affinity(), expected_segmenter())
        for contract, answer in zip(CONTRACTS, answers, strict=True):
            outputs = opened(bundle, contract).run(IMAGE)
            assert outputs.keys() == answer.keys() == contract.outputs.keys()
            for name, tensor in contract.outputs.items():
                assert outputs[name].dtype == tensor.dtype and outputs[name].ndim == len(tensor.axes)
                np.testing.assert_allclose(outputs[name], answer[name], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
    def test_the_packaged_bundle_on_an_image(self, opened: Open, image: np.ndarray, contract: GraphContract) -> None:
        """Against onnxruntime-cpu on two threads, which sums in another order."""
        bundle = load_bundle(default_bundle_path())
        outputs = opened(bundle, contract).run(image)
        with open_backend(bundle, contract, threads=2, backend="onnxruntime-cpu") as reference:
            wanted = reference.run(image)
        for name, values in wanted.items():
            assert np.ptp(values) > 0.2
            np.testing.assert_allclose(outputs[name], values, rtol=0, atol=1e-3)

    def test_several_threads_at_once(self, opened: Open, bundle: Bundle) -> None:
        backend = opened(bundle, CAM)
        images = [IMAGE[:, : 20 + i, : 30 + i] for i in range(8)]
        alone = [backend.run(image)["cam"] for image in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda image: backend.run(image)["cam"], images * 3))
        for expected, cam in zip(alone * 3, together, strict=True):
            np.testing.assert_array_equal(cam, expected)

    def test_threads_of_the_cpu_do_not_change_the_answer(self, opened: Open, bundle: Bundle) -> None:
        one, two = (opened(bundle, AFFINITY, threads=n).run(IMAGE)["affinity"] for n in (1, 2))
        assert one.shape == (2, 34, 11, 17)
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)

    def test_non_contiguous_input(self, opened: Open, bundle: Bundle) -> None:
        backend = opened(bundle, SEGMENTER)
        turned = IMAGE.transpose(0, 2, 1, 3)
        expected = backend.run(IMAGE)["probabilities"].transpose(0, 1, 3, 2)
        np.testing.assert_allclose(backend.run(turned)["probabilities"], expected, rtol=0, atol=1e-6)

    def test_an_answer_is_the_callers(self, opened: Open, bundle: Bundle) -> None:
        """The next call does not overwrite earlier results."""
        backend = opened(bundle, SEGMENTER)
        first = backend.run(IMAGE)["probabilities"]
        kept = first.copy()
        backend.run(255 - IMAGE)
        np.testing.assert_array_equal(first, kept)

    @pytest.mark.parametrize(
        "image",
        [IMAGE.astype(np.float32), IMAGE[0], IMAGE[..., :2], IMAGE[:0]],
        ids=["dtype", "rank", "channels", "empty"],
    )
    def test_other_input_is_refused(self, opened: Open, bundle: Bundle, image: np.ndarray) -> None:
        with pytest.raises(BackendError, match=r"segmenter: got .*expected uint8 \[N, H, W, 3\]"):
            opened(bundle, SEGMENTER).run(image)

    def test_closed_once_or_twice(self, opened: Open, bundle: Bundle) -> None:
        backend = opened(bundle, SEGMENTER)
        backend.close()
        backend.close()
        with pytest.raises(BackendError, match="closed"):
            backend.run(IMAGE)

    def test_a_graph_of_another_contract(
        self, opened: Open, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
    ) -> None:
        swapped = graphs | {"segmenter.onnx": graphs["cam.onnx"]}
        with pytest.raises(BackendError, match="segmenter: got the outputs"):
            opened(write_bundle(tmp_path / "swapped", manifest, swapped), SEGMENTER)

    def test_the_precision_asked_for(self, opened: Open, bundle_of_precisions: Bundle) -> None:
        fp32, int8 = (
            opened(bundle_of_precisions, SEGMENTER, precision=p).run(DARK)["probabilities"].argmax(axis=1)
            for p in ("fp32", "int8")
        )
        assert (fp32 == 0).all() and (int8 == 1).all()

    def test_its_package_is_not_there(
        self, opened: Open, case: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, one_gpu: None
    ) -> None:
        if case.startswith("tensorrt"):
            pytest.skip("TensorRT's own tests take its packages away")
        package = "openvino" if case == "openvino" else "onnxruntime"
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(BackendUnavailable, match=f"pip install {package}") as caught:
            open_backend(bundle, CAM, backend=case.partition(", ")[0])
        assert caught.value.exit_code == 5


def expected_cam() -> Answer:
    maps = pooled_blocks()[:, :2]
    return {"cam": maps / maps.max(axis=(2, 3), keepdims=True), "scores": maps.mean(axis=(2, 3))}


def expected_affinity() -> Answer:
    return {"affinity": np.full((2, 34, *pooled_blocks().shape[2:]), 0.4, np.float32)}


def expected_segmenter() -> Answer:
    return {"probabilities": tiny_probabilities(IMAGE)}


def pooled_blocks() -> np.ndarray:
    """The maximum of each 4x4 block, float32 [N, 3, ceil(H / 4), ceil(W / 4)] within 0..1."""
    count, height, width, _ = IMAGE.shape
    padded = np.zeros((count, -(-height // 4) * 4, -(-width // 4) * 4, 3), np.float32)
    padded[:, :height, :width] = IMAGE / 255
    rows, columns = padded.shape[1] // 4, padded.shape[2] // 4
    return padded.reshape(count, rows, 4, columns, 4, 3).max(axis=(2, 4)).transpose(0, 3, 1, 2)


def test_path_or_bytes(graphs: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "cam.onnx").write_bytes(graphs["cam.onnx"])
    with OnnxRuntimeBackend(tmp_path / "cam.onnx") as one, OnnxRuntimeBackend(graphs["cam.onnx"]) as two:
        assert one.contract == two.contract == CAM
        np.testing.assert_array_equal(one.run(IMAGE)["cam"], two.run(IMAGE)["cam"])


def test_cuda_is_not_in_this_onnxruntime(graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=r"here has CPUExecutionProvider: pip uninstall .*-gpu\["):
        OnnxRuntimeBackend(graphs["cam.onnx"], provider="cuda")


def test_cuda_asked_for_and_the_cpu_runs(
    graphs: dict[str, bytes], cuda_on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How the CUDA package behaves without its libraries: it prints so, and creates a CPU session."""
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda _: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas\nand more"))
    with pytest.raises(
        BackendUnavailable,
        match=r"got the provider CPU\w+, expected CUDA\w+ \(Failed to load libcublas\): pip uninstall",
    ):
        OnnxRuntimeBackend(graphs["cam.onnx"], provider="cuda")
    assert capsys.readouterr().out == ""


def test_cuda_that_fails_is_told_from_a_graph_that_does(
    graphs: dict[str, bytes], cuda_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="cannot be loaded"):
        OnnxRuntimeBackend(b"not a graph", provider="cuda")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendUnavailable, match="graph: CUDA failure 35"):
        OnnxRuntimeBackend(graphs["cam.onnx"], provider="cuda")


def model(nodes: list[onnx.NodeProto], outputs: list[tuple[str, int, list[object]]]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])
    graph = helper.make_graph(nodes, "odd", [image], [helper.make_tensor_value_info(*output) for output in outputs])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def test_graph_of_other_outputs() -> None:
    odd = model([helper.make_node("Identity", ["image"], ["out"])], [("out", TensorProto.UINT8, [1, 1, 1, 3])])
    with pytest.raises(BackendError, match=r"got the outputs .*expected cam .* or affinity .* or segmenter"):
        OnnxRuntimeBackend(odd)


def test_contract_of_another_graph(graphs: dict[str, bytes]) -> None:
    with pytest.raises(BackendError, match="segmenter: got the outputs"):
        OnnxRuntimeBackend(graphs["cam.onnx"], contract=SEGMENTER)


def test_unloadable_and_absent(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be loaded"):
        OnnxRuntimeBackend(b"not a graph")
    with pytest.raises(BackendError, match=r"gone\.onnx: cannot be loaded"):
        OnnxRuntimeBackend(tmp_path / "gone.onnx")


def test_failure_while_running() -> None:
    """A reshape that cannot hold at run time is a BackendError, not ONNX Runtime's own."""
    shape = onnx.numpy_helper.from_array(np.array([7, 7, 7, 7]), "shape")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["image", "shape"], ["reshaped"]),
            helper.make_node("Cast", ["reshaped"], ["probabilities"], to=TensorProto.FLOAT),
        ],
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [7, 7, 7, 7])],
        [shape],
    )
    odd = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    backend = OnnxRuntimeBackend(odd.SerializeToString())
    with backend, pytest.raises(BackendError, match="segmenter: cannot be run"):
        backend.run(IMAGE)
