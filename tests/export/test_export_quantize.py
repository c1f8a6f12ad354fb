"""`multisa convert`: new graphs are compared, reported and only then written."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from multisa.export import quantize as quantize_module
from multisa.export.compare import read_image_sets
from multisa.export.parity import LIMITS
from multisa.export.precision import ConvertedGraph, Reference, calibrate_graph, quantize_graph
from multisa.export.quantize import QuantizeOptions
from multisa.runtime.backends.base import CONTRACTS, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import saturates_int8
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.cli.main import root as root_command
from multisa.runtime.demo import IMAGES
from multisa.runtime.errors import UsageError
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.imaging.decode import read_image, resize_image

CLASSES = ("background", "square", "disc")  # of the images of `voc_folder`: red squares, blue discs
OFFSETS = 34
NODE = helper.make_node


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    packaged = load_bundle(default_bundle_path()).manifest
    label = replace(packaged.parameters.label, class_gain=(), walk_steps=16)
    parameters = replace(
        packaged.parameters, label=label, score_thresholds={"square": 0.2, "disc": 0.2}, cam_scales=(1.0,)
    )
    palette = packaged.palette[:3]
    manifest = replace(packaged, classes=CLASSES, palette=palette, parameters=parameters, metrics={})
    files = {"cam.onnx": cam_graph(), "affinity.onnx": affinity_graph(), "segmenter.onnx": segmenter_graph()}
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny", manifest, files)


def convert(bundle: Bundle, images: Path, output: Path, *options: str) -> Result:
    arguments = ["convert", str(bundle.path), "--images", str(images), "-o", str(output), *options]
    return CliRunner().invoke(root_command, arguments)


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    # Graphs this small take no time in which a difference could be seen.
    rows = [{"threads": 1, "fp32_ms": 2.0, "ms": 1.0, "ratio": 2.0}]
    monkeypatch.setattr(quantize_module, "compare_speed", lambda *_: {"rows": rows})


@pytest.mark.usefixtures("always_faster")
def test_a_bundle_with_all_precisions(bundle: Bundle, voc_folder: Path, tmp_path: Path) -> None:
    report_file = tmp_path / "parity.json"
    options = ["--precision", "fp16", "--precision", "int8", "--report", str(report_file)]
    result = convert(bundle, voc_folder, tmp_path / "new", *options)
    assert result.exit_code == 0, result.output
    made = load_bundle(tmp_path / "new")
    fp16, int8 = [graph_file(c, "fp16") for c in CONTRACTS], graph_file(SEGMENTER, "int8")
    assert set(made.manifest.files) == {*bundle.manifest.files, *fp16, int8, "parity.json"}
    for name in bundle.manifest.files:
        assert made.manifest.files[name] == bundle.manifest.files[name]
    assert made.read_file("parity.json") == report_file.read_bytes()
    report = json.loads(report_file.read_text())
    assert set(report) == {"fp16", "fp16 on onnxruntime-cpu", "int8"}
    for title, entry in report.items():
        assert entry["passed"] and entry["problems"] == [], title
        assert made.manifest.metrics[f"parity of {title}"].items() >= entry["figures"].items()
        assert entry["figures"]["labels"]["images_with_truth"] == 4  # val
    assert set(report["fp16"]["figures"]) == {"images", *LIMITS["fp16"]}
    assert report["fp16"]["figures"]["pseudo_mask"]["images_with_truth"] == 6  # train
    # The graphs do what they are there for, or agreement would say little.
    for name in ("labels", "segmenter_pseudo_mask"):  # of val
        assert report["fp16"]["figures"][name]["miou_reference"] > 80
        assert report["int8"]["figures"][name]["images_with_truth"] == 4
    assert made.manifest.provenance["int8_for"] == "cpu"
    for line in ("parity: fp16 on onnxruntime-cpu", "parity: int8", f"bundle: {tmp_path / 'new'}"):
        assert line in result.stdout.splitlines(), result.stdout
    assert re.search(r"segmenter +int8 +segmenter.int8.onnx +0.00 +\d+ +\d", result.stdout)
    assert re.search(r"1 thread +2.00 +1.00 +2.00\n", result.stdout)
    assert max(map(len, result.stdout.splitlines()[:-1])) < 80
    image = np.array(Image.open(next(iter((voc_folder / "JPEGImages").iterdir()))))[None]
    for contract, precision in ((SEGMENTER, "fp16"), (SEGMENTER, "int8")):
        data = made.read_file(graph_file(contract, precision))
        kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
        assert ("QuantizeLinear" in kinds) == (precision == "int8")
        with OnnxRuntimeBackend(data, contract=contract) as backend:
            probabilities = backend.run(image)["probabilities"]
        assert len(np.unique(probabilities.argmax(1))) > 1
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-3)
    again = convert(made, voc_folder, tmp_path / "again", "--precision", "fp16")
    assert again.exit_code == 0, again.output
    assert load_bundle(tmp_path / "again").manifest.files[fp16[2]] == made.manifest.files[fp16[2]]
    assert "int8" in json.loads((tmp_path / "again" / "parity.json").read_text())


def test_a_graph_beyond_its_limits_is_not_written_but_reported(
    bundle: Bundle, voc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_convert = quantize_module.convert_to_fp16

    def convert_wrongly(reference: Reference) -> ConvertedGraph:
        if reference.contract is SEGMENTER:
            reference = replace(reference, data=segmenter_graph(confused=True))
        return real_convert(reference)

    monkeypatch.setattr(quantize_module, "convert_to_fp16", convert_wrongly)
    report = tmp_path / "parity.json"
    result = convert(bundle, voc_folder, tmp_path / "new", "--precision", "fp16", "--report", str(report))
    assert result.exit_code == 3
    assert re.search(r"^error: .*fp16: labels: .* of the labels agree.*fp16: labels: mIoU", result.stderr, re.M)
    assert not (tmp_path / "new").exists()
    assert json.loads(report.read_text())["fp16"]["passed"] is False
    kept = convert(bundle, voc_folder, tmp_path / "new", "--precision", "fp16", "--keep")
    assert kept.exit_code == 0 and "kept despite: fp16: labels" in kept.stderr
    assert json.loads((tmp_path / "new" / "parity.json").read_text())["fp16"]["passed"] is False


@pytest.mark.usefixtures("always_faster")
def test_json_is_one_object_and_nothing_else(bundle: Bundle, voc_folder: Path, tmp_path: Path) -> None:
    result = convert(bundle, voc_folder, tmp_path / "new", "--precision", "int8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] and found["bundle"] == str(tmp_path / "new") and set(found["parity"]) == {"int8"}
    (graph,) = found["graphs"]
    assert (graph["file"], graph["precision"]) == ("segmenter.int8.onnx", "int8")
    assert graph["bytes"] == (tmp_path / "new" / "segmenter.int8.onnx").stat().st_size
    assert found["speed"][0]["ratio"] == 2.0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (QuantizeOptions(()), "precision: got none, expected one of fp16, int8"),
        (QuantizeOptions(("fp8",)), "precision: got 'fp8', expected one of fp16, int8"),
        (QuantizeOptions(("int8",), int8_for="gpu"), "int8_for: got 'gpu', expected one of cpu, tensorrt"),
    ],
)
def test_options_that_do_not_exist(bundle: Bundle, options: QuantizeOptions, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        quantize_module.quantize_bundle(bundle, "images", "output", options)


@pytest.mark.parametrize(
    ("output", "options", "code", "said"),
    [
        ("thesis", (), 1, "thesis: exists and is not only a bundle"),
        ("new", ("--report", "new/parity.json"), 2, "inside the bundle's folder"),
        ("new", ("--int8-for", "tensorrt"), 2, "--int8-for tensorrt: no int8 graph is made, expected"),
        ("new", ("--int8-for", "cpu"), 2, "--int8-for cpu: no int8 graph is made"),
        ("new", ("--masks", "masks"), 2, "which has masks of its own"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    bundle: Bundle,
    voc_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    def not_reached(*_: object) -> None:
        raise AssertionError("graphs were made")

    monkeypatch.setattr(quantize_module, "_convert", not_reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    result = convert(bundle, voc_folder, Path(output), "--precision", "fp16", *options)
    assert result.exit_code == code and said in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_int8_that_is_not_faster_is_not_written(
    bundle: Bundle, voc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"threads": 1, "fp32_ms": 1.0, "ms": 1.0, "ratio": 1.0}]
    monkeypatch.setattr(quantize_module, "compare_speed", lambda *_: {"rows": rows})
    report = tmp_path / "parity.json"
    result = convert(bundle, voc_folder, tmp_path / "new", "--precision", "int8", "--report", str(report))
    assert result.exit_code == 3
    assert "1.00 times the speed of fp32" in result.stderr
    assert json.loads(report.read_text())["int8"]["passed"] is False
    assert not (tmp_path / "new").exists()
    # What TensorRT gains a CPU cannot tell; its form has no zero points and float biases.
    signed = convert(bundle, voc_folder, tmp_path / "signed", "--precision", "int8", "--int8-for", "tensorrt")
    assert signed.exit_code == 0, signed.output
    assert load_bundle(tmp_path / "signed").manifest.provenance["int8_for"] == "tensorrt"
    model = onnx.load(tmp_path / "signed" / "segmenter.int8.onnx")
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    scaled = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = [values[node.input[2]] for node in scaled]
    assert points and all(point.dtype == np.int8 and not point.any() for point in points)


def test_speed_is_measured_in_turn(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bytes, int, int]] = []

    class Recording(OnnxRuntimeBackend):
        def __init__(self, data: bytes, *, threads: int, contract: GraphContract) -> None:
            super().__init__(data, threads=threads, contract=contract)
            self.what = data, threads

        def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
            calls.append((*self.what, image.shape[1]))
            return super().run(image)

    monkeypatch.setattr(quantize_module, "OnnxRuntimeBackend", Recording)
    first, second = bundle.read_file("segmenter.onnx"), segmenter_graph(confused=True)
    images = [np.zeros((side, 64, 3), np.uint8) for side in (64, 96)]
    speed = quantize_module.compare_speed(first, second, SEGMENTER, images)
    # A shared machine slows both alike only if they take turns on every image.
    turn = [(data, side) for side in (64, 96) for data in (first, second)]
    turns = 1 + quantize_module.REPEATS
    assert calls == [(data, threads, side) for threads in (1, 2) for _ in range(turns) for data, side in turn]
    assert [row["threads"] for row in speed["rows"]] == [1, 2]
    assert all(row["ms"] > 0 for row in speed["rows"])


def test_a_folder_is_halved_into_calibration_and_comparison(voc_folder: Path) -> None:
    found = read_image_sets(voc_folder / "JPEGImages", CLASSES, num_images=2, masks=voc_folder / "SegmentationClass")
    assert not {p.path for p in found.calibration} & {p.path for p in (*found.labelled, *found.segmenter)}
    assert len(found.calibration) == len(found.segmenter) == 6 and len(found.labelled) == 2
    assert all(p.mask and Path(str(p.mask)).stem == p.path.stem and p.classes is None for p in found.segmenter)


def test_a_data_set_is_calibrated_on_what_is_not_compared(voc_folder: Path, tmp_path: Path) -> None:
    found = read_image_sets(voc_folder, CLASSES, num_images=32, masks=None)
    # Six of the eight weakly labelled images are `train`.
    assert [p.path.stem for p in found.calibration] == ["photo_06", "photo_07"]
    assert (len(found.labelled), len(found.segmenter)) == (6, 4)
    few = read_image_sets(voc_folder, CLASSES, num_images=2, masks=None)
    assert len(few.calibration) == 6 and not {p.path for p in few.calibration} & {p.path for p in few.labelled}
    shutil.copytree(voc_folder, tmp_path / "voc")
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    shutil.copy(lists / "train.txt", lists / "train_aug.txt")  # no other image is left
    same = read_image_sets(tmp_path / "voc", CLASSES, num_images=32, masks=None)
    assert same.calibration == same.labelled and len(same.calibration) == 6


@pytest.mark.parametrize(
    ("place", "classes", "masks", "problem"),
    [
        (".", ("background", "cat"), None, "its classes are background, square, disc, expected the bundle's"),
        ("JPEGImages", CLASSES, "ImageSets", "no mask of an image"),
        (".", CLASSES, "SegmentationClass", "is a data set in VOC layout, which has masks of its own"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    voc_folder: Path, place: str, classes: tuple[str, ...], masks: str | None, problem: str
) -> None:
    folder = voc_folder / masks if masks else None
    with pytest.raises(UsageError, match=problem):
        read_image_sets(voc_folder / place, classes, num_images=1, masks=folder)


def test_no_part_of_converting_needs_pytorch() -> None:
    program = "import multisa.export.quantize, onnxruntime.quantization, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_int8_is_the_same_bytes_twice(bundle: Bundle, voc_folder: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("first", "second"):
        result = convert(bundle, voc_folder, tmp_path / name, "--precision", "int8", "--keep")
        assert result.exit_code == 0, result.output
        digests.add(sha256_of_bytes((tmp_path / name / "segmenter.int8.onnx").read_bytes()))
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True], ids=["cpu", "tensorrt"])
def test_the_packaged_segmenter_gives_probabilities_in_int8(symmetric: bool) -> None:
    images = [resize_image(read_image(path).rgb, (96, 128)) for path in sorted(IMAGES.glob("*.jpg"))]
    data = load_bundle(default_bundle_path()).read_file("segmenter.onnx")
    calibrated = calibrate_graph(data, [images], symmetric=symmetric)
    made = quantize_graph(calibrated, calibrated.candidates)
    graph = onnx.load_from_string(made).graph
    # The softmax is computed in float32 on what the last convolution gives.
    assert graph.node[-1].op_type == "Softmax" and list(graph.node[-1].output) == ["probabilities"]
    with OnnxRuntimeBackend(made, contract=SEGMENTER) as int8, OnnxRuntimeBackend(data, contract=SEGMENTER) as fp32:
        for image in images:
            got, expected = (backend.run(image[None])["probabilities"] for backend in (int8, fp32))
            assert got.dtype == np.float32
            np.testing.assert_allclose(got.sum(1), 1, atol=1e-3)
            # Without VNNI, sums of products saturate, and only the form of the output can be checked.
            assert saturates_int8() or np.abs(got - expected).mean() < 0.05


def graph_bytes(
    nodes: list[onnx.NodeProto], outputs: dict[str, tuple[int, int]], weights: dict[str, np.ndarray]
) -> bytes:
    start = [
        NODE("Cast", ["image"], ["real"], "real", to=TensorProto.FLOAT),
        NODE("Div", ["real", "white"], ["unit"], "unit"),
        NODE("Transpose", ["unit"], ["x"], "x", perm=[0, 3, 1, 2]),
    ]
    weights = {**weights, "white": np.array(255, np.float32)}
    graph = helper.make_graph(
        [*start, *nodes],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def segmenter_graph(*, confused: bool = False) -> bytes:
    # A mean over 4x4 pixels, then red minus the others and blue minus the others.
    smooth = np.zeros((3, 3, 4, 4), np.float32)
    smooth[range(3), range(3)] = 1 / 16
    select = np.array([[0, 0, 0], [1, -0.5, -0.5], [-0.5, -0.5, 1]], np.float32)[:, :, None, None] * 20
    select = select[[0, 2, 1]] if confused else select
    nodes = [
        NODE(
            "Conv", ["x", "smooth", "none"], ["s"], "smooth", kernel_shape=[4, 4], strides=[4, 4], auto_pad="SAME_UPPER"
        ),
        NODE("Relu", ["s"], ["r"], "relu"),
        NODE("Conv", ["r", "select", "bias"], ["logits"], "select", kernel_shape=[1, 1]),
        NODE("Softmax", ["logits"], ["probabilities"], "softmax", axis=1),
    ]
    weights = {
        "smooth": smooth,
        "none": np.zeros(3, np.float32),
        "select": select,
        "bias": np.array([3, 0, 0], np.float32),
    }
    return graph_bytes(nodes, {"probabilities": (TensorProto.FLOAT, 4)}, weights)


def cam_graph() -> bytes:
    select = np.array([[2, -1, -1], [-1, -1, 2]], np.float32)[:, :, None, None]
    nodes = [
        NODE("Conv", ["x", "select"], ["found"], "found", kernel_shape=[1, 1]),
        NODE("Clip", ["found", "zero", "one"], ["clipped"], "clip"),
        NODE("AveragePool", ["clipped"], ["cam"], "cam", kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
        NODE("ReduceMax", ["cam", "axes"], ["scores"], "scores", keepdims=0),
    ]
    numbers = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32), "axes": np.array([2, 3])}
    kinds = {"cam": (TensorProto.FLOAT, 4), "scores": (TensorProto.FLOAT, 2)}
    return graph_bytes(nodes, kinds, {"select": select, **numbers})


def affinity_graph() -> bytes:
    flat = np.zeros((OFFSETS, 3, 1, 1), np.float32)
    nodes = [
        NODE("AveragePool", ["x"], ["small"], "small", kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
        NODE("Conv", ["small", "flat", "bias"], ["constant"], "constant", kernel_shape=[1, 1]),
        NODE("Sigmoid", ["constant"], ["affinity"], "affinity"),
    ]
    weights = {"flat": flat, "bias": np.ones(OFFSETS, np.float32)}
    return graph_bytes(nodes, {"affinity": (TensorProto.FLOAT, 4)}, weights)
