"""ONNX Runtime on the CPU: outputs, the contract, and one named error for everything that goes wrong."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from multisa.runtime.bundle import Bundle
from multisa.runtime.engines.choice import open_engine
from multisa.runtime.engines.contract import AFFINITY, CAM, SEGMENTER, Engine
from multisa.runtime.engines.ort import OnnxRuntimeEngine
from multisa.runtime.errors import EngineError, EngineUnavailable

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 41, 67, 3), dtype=np.uint8)


def test_segmenter_answers(graphs: dict[str, bytes]) -> None:
    with OnnxRuntimeEngine(graphs["segmenter.onnx"]) as engine:
        outputs = engine.run(IMAGE)
    brightness = IMAGE.astype(np.float32).mean(axis=3)
    expected = (brightness > 85).astype(np.uint8) + (brightness > 170)
    assert set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(outputs["labels"], expected)
    assert outputs["confidence"].dtype == np.uint8
    assert engine.contract == SEGMENTER


def test_shapes_of_the_other_graphs(bundle: Bundle) -> None:
    engine: Engine
    with open_engine(bundle, CAM) as engine:
        cam = engine.run(IMAGE)
        assert cam["cam"].shape == (2, 2, 11, 17) and cam["scores"].shape == (2, 2)
        assert engine.name == "onnxruntime-cpu"
    with open_engine(bundle, AFFINITY, threads=2) as engine:
        assert engine.run(IMAGE)["affinity"].shape == (2, 34, 11, 17)


def test_path_and_bytes_and_threads_agree(graphs: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "cam.onnx").write_bytes(graphs["cam.onnx"])
    with OnnxRuntimeEngine(tmp_path / "cam.onnx") as one, OnnxRuntimeEngine(graphs["cam.onnx"]) as two:
        expected = one.run(IMAGE)["cam"]
        with ThreadPoolExecutor(4) as pool:
            for outputs in pool.map(two.run, [IMAGE] * 8):
                np.testing.assert_array_equal(outputs["cam"], expected)


def test_non_contiguous_input(graphs: dict[str, bytes]) -> None:
    with OnnxRuntimeEngine(graphs["segmenter.onnx"]) as engine:
        turned = IMAGE.transpose(0, 2, 1, 3)
        expected = engine.run(IMAGE)["labels"].transpose(0, 2, 1)
        np.testing.assert_array_equal(engine.run(turned)["labels"], expected)


@pytest.mark.parametrize(
    "image",
    [IMAGE.astype(np.float32), IMAGE[0], IMAGE[..., :2], IMAGE[:0]],
    ids=["dtype", "rank", "channels", "empty"],
)
def test_run_refuses_other_input(graphs: dict[str, bytes], image: np.ndarray) -> None:
    with OnnxRuntimeEngine(graphs["segmenter.onnx"]) as engine, pytest.raises(EngineError, match="expected"):
        engine.run(image)


def test_closed_engine(graphs: dict[str, bytes]) -> None:
    engine = OnnxRuntimeEngine(graphs["segmenter.onnx"])
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(IMAGE)


def model(nodes: list[onnx.NodeProto], outputs: list[tuple[str, int, list[object]]]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])
    graph = helper.make_graph(
        nodes, "odd", [image], [helper.make_tensor_value_info(*output) for output in outputs]
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def test_graph_of_other_outputs() -> None:
    odd = model(
        [helper.make_node("Identity", ["image"], ["out"])], [("out", TensorProto.UINT8, [1, 1, 1, 3])]
    )
    with pytest.raises(EngineError, match=r"got the outputs .*expected cam .* or affinity .* or segmenter"):
        OnnxRuntimeEngine(odd)


def test_contract_of_another_graph(graphs: dict[str, bytes]) -> None:
    with pytest.raises(EngineError, match="segmenter: got the outputs"):
        OnnxRuntimeEngine(graphs["cam.onnx"], contract=SEGMENTER)


def test_unloadable_and_absent(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be loaded"):
        OnnxRuntimeEngine(b"not a graph")
    with pytest.raises(EngineError, match=r"gone\.onnx: cannot be loaded"):
        OnnxRuntimeEngine(tmp_path / "gone.onnx")


def test_failure_while_running() -> None:
    """A reshape that cannot hold at run time is an EngineError, not ONNX Runtime's own."""
    shape = onnx.numpy_helper.from_array(np.array([7, 7, 7]), "shape")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["image", "shape"], ["labels"]),
            helper.make_node("Identity", ["labels"], ["confidence"]),
        ],
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(n, TensorProto.UINT8, [7, 7, 7]) for n in ("labels", "confidence")],
        [shape],
    )
    odd = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    engine = OnnxRuntimeEngine(odd.SerializeToString())
    with engine, pytest.raises(EngineError, match="segmenter: cannot be run"):
        engine.run(IMAGE)


def test_without_onnxruntime(graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match="pip install onnxruntime") as caught:
        OnnxRuntimeEngine(graphs["cam.onnx"])
    assert caught.value.exit_code == 5
