"""Engines built by TensorRT-RTX, which needs no GPU for that; TensorRT itself is checked by its interface."""

import ast
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from multisa.export.fp16 import fp16_candidates, fp16_graph, model_bytes, read_fp32_graph
from multisa.export.precision import calibrate_graph, quantize_graph
from multisa.export.tensorrt import build as building
from multisa.export.tensorrt import builder
from multisa.export.tensorrt.build import BuildOptions, build_engines, default_profiles, parse_profiles, parse_targets
from multisa.export.tensorrt.builder import build_engine
from multisa.runtime.backends.base import AFFINITY, CAM, CONTRACTS, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.engine_cache import Profile
from multisa.runtime.backends.gpus import Gpu, GpuProbe
from multisa.runtime.backends.tensorrt_runtime import Library, import_library, library_log
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.cli.main import root
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.imaging.decode import read_image, resize_image

pytestmark = pytest.mark.slow

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
DEMO_IMAGES = default_bundle_path().parents[1] / "demo_images"
ONE = (Profile((1, 64, 64), (1, 96, 128), (2, 128, 128)),)
UNREACHABLE = Library("tensorrt-rtx", None, "0")  # whoever calls it fails otherwise than expected


@pytest.fixture(scope="module")
def rtx() -> Library:
    try:
        return import_library("tensorrt-rtx")
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def packaged() -> Bundle:
    return load_bundle(default_bundle_path())


def tiny(nodes: tuple[onnx.NodeProto, ...] = (), weight: float = 2.0, opset: int = 18) -> bytes:
    """A graph that keeps SEGMENTER: the brightness of 4x4 pixels, scaled, by colour; `nodes` go before it."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3, "h", "w"])
    pooling = {"kernel_shape": [4, 4], "strides": [4, 4], "auto_pad": "SAME_UPPER"}
    body = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["colours"], "colours", perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["colours"], ["mean"], "mean", **pooling),
        helper.make_node("Mul", ["mean", "weight"], ["probabilities"], "scale"),
    ]
    weights = [numpy_helper.from_array(np.array(weight, np.float32), "weight")]
    graph = helper.make_graph([*nodes, *body], "tiny", [image], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model.SerializeToString()


def tiny_bundle(folder: Path, packaged: Bundle, **graphs: bytes) -> Bundle:
    files = {graph_file(contract): b"not built" for contract in CONTRACTS}
    files |= {name.replace("_", ".") + ".onnx": data for name, data in graphs.items()}
    # The packaged int8 segmenter is for a CPU, and says so there.
    manifest = replace(packaged.manifest, provenance={})
    return write_bundle(folder, manifest, files)


# --- every graph of the package, for every target


@pytest.mark.parametrize(("contract", "targets"), [(CAM, TARGETS[1:]), (AFFINITY, TARGETS), (SEGMENTER, TARGETS)])
def test_the_packaged_graphs_build_for_every_target(
    rtx: Library, packaged: Bundle, contract: GraphContract, targets: tuple[str, ...]
) -> None:
    # All targets in one plan: a build for each takes as long as this one.
    data = packaged.read_file(graph_file(contract))
    plan = build_engine(rtx, data, contract, ONE, targets)
    assert len(plan) > len(data) / 2  # its weights are in it, as float16 or more


def test_turing_has_no_float32_product_and_the_error_says_what_to_do(rtx: Library, packaged: Bundle) -> None:
    with pytest.raises(BackendError, match="FP32 GEMM is not supported") as caught:
        build_engine(rtx, packaged.read_file("cam.onnx"), CAM, ONE, ("sm75",))
    said = str(caught.value)
    assert "leave sm75 out for cam (--graph segmenter --graph affinity)" in said
    assert "--library tensorrt" in said and "fp16" not in said  # see below: fp16 is no way out
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        build_engine(rtx, halved(packaged, CAM), CAM, ONE, ("sm75",))


def halved(packaged: Bundle, contract: GraphContract) -> bytes:
    plain = read_fp32_graph(packaged.read_file(graph_file(contract)))
    return model_bytes(fp16_graph(plain, fp16_candidates(plain)))


def test_fp16_graphs_build(rtx: Library, packaged: Bundle) -> None:
    data = halved(packaged, SEGMENTER)
    kinds = [i.data_type for i in onnx.load_from_string(data).graph.initializer]
    assert kinds.count(TensorProto.FLOAT16) > 50
    # Without sm75, which rounds up to more: every weight once, in 16 bits.
    plan = build_engine(rtx, data, SEGMENTER, ONE, ("sm89",))
    assert 0.5 < len(plan) / len(build_engine(rtx, data, SEGMENTER, ONE, ("sm75",))) < 1
    assert len(plan) > len(data) / 2


def quantized(packaged: Bundle, *, symmetric: bool) -> bytes:
    images = [resize_image(read_image(path).rgb, (96, 128)) for path in sorted(DEMO_IMAGES.glob("*.jpg"))]
    data = packaged.read_file(graph_file(SEGMENTER))
    calibrated = calibrate_graph(data, [images], symmetric=symmetric)
    return quantize_graph(calibrated, calibrated.candidates)


def test_int8_graphs_build_in_the_form_that_is_for_tensorrt(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    options = BuildOptions(("sm89",), "int8", profiles=("1x64x64:1x96x128:2x128x128",))
    for int8_for in ("tensorrt", "cpu"):
        files = {n: packaged.read_file(n) for n in ("cam.onnx", "affinity.onnx", "segmenter.onnx")}
        files["segmenter.int8.onnx"] = quantized(packaged, symmetric=int8_for == "tensorrt")
        manifest = dataclasses.replace(packaged.manifest, provenance={"int8_for": int8_for})
        bundle = write_bundle(tmp_path / int8_for, manifest, files)
        if int8_for == "cpu":
            said = r"zero points, .* multisa convert .* --precision int8 --int8-for tensorrt --images"
            with pytest.raises(UsageError, match=said):
                build_engines(bundle, options)
            with pytest.raises(BackendError, match="Non-zero zero point is not supported"):  # it is true
                build_engine(rtx, files["segmenter.int8.onnx"], SEGMENTER, ONE, ("sm89",))
        else:
            (row,) = build_engines(bundle, options).rows
            assert (row.graph, row.precision) == ("segmenter", "int8")
            assert row.bytes > len(files["segmenter.int8.onnx"]) / 2


def test_a_network_builds_with_all_default_profiles(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    options = BuildOptions(("sm89",), graphs=("segmenter",), engine_cache=tmp_path)
    (row,) = build_engines(packaged, options).rows
    assert row.profiles == default_profiles(packaged.manifest.parameters.long_side)
    one = build_engine(rtx, packaged.read_file("segmenter.onnx"), SEGMENTER, row.profiles[:1], ("sm89",))
    assert len(row.profiles) == 3 and row.bytes > 1.1 * len(one)  # each has kernels of its own


def test_the_flags_of_the_key_are_those_of_the_builder(rtx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = builder._set_flags

    def kept(config: Any, module: Any) -> None:
        seen.append(config)
        tf32 = rtx.module.BuilderFlag.TF32
        assert config.get_flag(tf32)  # as the library has it, so that clearing it does something
        real(config, module)
        seen.append(config.get_flag(tf32))

    monkeypatch.setattr(builder, "_set_flags", kept)
    build_engine(rtx, tiny(), SEGMENTER, ONE, ("sm89",))
    assert seen[1:] == [False] and builder.FLAGS == ("TF32=0",)
    config = rtx.module.Builder(library_log(rtx.module)[0]).create_builder_config()
    config.clear_flag(rtx.module.BuilderFlag.TF32)
    monkeypatch.setattr(builder, "FLAGS", ("TF32=1",))
    real(config, rtx.module)
    assert config.get_flag(rtx.module.BuilderFlag.TF32)


def test_plans_of_each_target_and_the_cache(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    command = ["build", str(packaged.path), "--graph", "segmenter", "--target", ",".join(TARGETS)]
    command += ["--engine-cache", str(tmp_path / "engines"), "--report", str(tmp_path / "engines.json")]
    command += ["--profile", "1x64x64:1x96x128:2x128x128"]
    reports = []
    for said in ("built", "from the cache"):
        result = CliRunner().invoke(root, command)
        assert result.exit_code == 0, result.output
        assert all(re.search(rf"segmenter +{t} +fp32 +1 .* {said}\n", result.output) for t in TARGETS)
        reports.append(json.loads((tmp_path / "engines.json").read_text()))
        assert f"engine cache: {tmp_path / 'engines'}\n" in result.output
    printed = CliRunner().invoke(root, [*command, "--json"])
    found = json.loads(printed.stdout)
    assert {**found, "seconds": 0} == {**reports[1], "seconds": 0}
    built, cached = (report["engines"] for report in reports)
    assert [row["target"] for row in built] == list(TARGETS)
    assert [row["cached"] for row in built + cached] == [False] * 5 + [True] * 5
    assert len({row["path"] for row in built}) == 5
    assert all(Path(row["path"]).stat().st_size == row["bytes"] > 1e6 for row in built)
    assert [{**row, "cached": True} for row in built] == cached


def test_equal_graphs_of_other_weights_never_share_a_plan(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    options = BuildOptions(("sm89",), graphs=("segmenter",), engine_cache=tmp_path / "plans")
    rows = [
        build_engines(tiny_bundle(tmp_path / name, packaged, segmenter=tiny(weight=weight)), options).rows[0]
        for name, weight in (("one", 2.0), ("other", 2.5), ("same", 2.0))
    ]
    assert [row.is_cached for row in rows] == [False, False, True]
    assert rows[0].path == rows[2].path != rows[1].path


def test_one_plan_that_fails_does_not_keep_the_others_from_it(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    bad = tiny((helper.make_node("Bogus", ["image"], ["b"], "my_bogus"),))
    tiny_bundle(tmp_path / "bundle", packaged, cam=bad, affinity=bad, segmenter=tiny())
    result = CliRunner().invoke(root, ["build", str(tmp_path / "bundle"), "--target", "sm89"])
    assert result.exit_code == 1
    assert re.search(r"segmenter +sm89 .* built", result.output)
    assert "2 engines could not be built" in result.output
    assert result.output.count("node 'my_bogus' (Bogus)") == 2
    assert [p.name for p in (tmp_path / "bundle" / "engines").glob("*/model.plan")] == ["model.plan"]


# --- what is refused


MIXED = (
    helper.make_node("Cast", ["image"], ["f"], "wide", to=TensorProto.FLOAT),
    helper.make_node("Cast", ["image"], ["h"], "narrow", to=TensorProto.FLOAT16),
    helper.make_node("Add", ["f", "h"], ["s"], "mixed"),
)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ((helper.make_node("Bogus", ["image"], ["b"], "my_bogus"),), r"node 'my_bogus' \(Bogus\): .*Plugin not"),
        (MIXED, r"node 'mixed' \(Add\): .*must have same input types.*\[INVALID_NODE\]; export the graph again"),
    ],
)
def test_parser_errors_name_the_node_and_what_to_do(rtx: Library, nodes: tuple[onnx.NodeProto, ...], said: str) -> None:
    with pytest.raises(BackendError, match=said) as caught:
        build_engine(rtx, tiny(nodes), SEGMENTER, ONE, ("sm89",))
    assert str(caught.value).startswith("segmenter (sm89): tensorrt-rtx 1.")
    assert "CUDA driver" not in str(caught.value)


def test_a_file_of_no_graph_is_said_to_be_malformed(rtx: Library) -> None:
    model = onnx.ModelProto(ir_version=9, opset_import=[helper.make_opsetid("", 18)])
    model.graph.name = "nothing in it"
    with pytest.raises(BackendError, match=r"segmenter \(sm89\): "):
        build_engine(rtx, model.SerializeToString(), SEGMENTER, ONE, ("sm89",))


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "weights.bin"])
def test_weights_in_other_files_are_refused_before_the_library_sees_them(location: str) -> None:
    model = onnx.load_from_string(tiny())
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    with pytest.raises(BackendError, match="'weight' lie in another file") as caught:
        build_engine(UNREACHABLE, model.SerializeToString(), SEGMENTER, ONE, ("sm89",))
    assert repr(location) in str(caught.value)


def test_a_foreign_opset_is_refused_before_the_library_sees_it() -> None:
    with pytest.raises(BackendError, match="got opset 99, expected 9 to 20"):
        build_engine(UNREACHABLE, tiny(opset=99), SEGMENTER, ONE, ("sm89",))


def test_a_damaged_bundle_is_refused(packaged: Bundle, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", packaged, segmenter=tiny())
    path = bundle.path / "segmenter.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = CliRunner().invoke(root, ["build", str(bundle.path), "--target", "sm89"])
    assert result.exit_code == 1 and "the file was altered" in result.output


@pytest.mark.parametrize(
    ("contract", "said"),
    [(CAM, r"got the outputs .*probabilities.*expected .*scores"), (SEGMENTER, r"got the inputs .*photo")],
)
def test_a_graph_that_breaks_its_contract_is_refused(rtx: Library, contract: GraphContract, said: str) -> None:
    data = tiny()
    if contract is SEGMENTER:
        model = onnx.load_from_string(data)
        model.graph.input[0].name = model.graph.node[0].input[0] = "photo"
        data = model.SerializeToString()
    with pytest.raises(BackendError, match=said):
        build_engine(rtx, data, contract, ONE, ("sm89",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "ada"], "target: got 'ada', expected a compute capability like sm89"),
        (["--target", "sm90"], "target: got 'sm90', expected one of sm75, sm80, sm86, sm89"),
        (["--target", "sm89", "--graph", "walk"], "graph: got 'walk', expected one of cam, affinity, seg"),
        (["--target", "sm89", "--precision", "fp8"], "precision: got 'fp8', expected one of fp32, fp16, int8"),
        (["--target", "sm89", "--precision", "fp16"], "no cam.fp16.onnx, affinity.fp16.onnx, segmenter.fp16"),
        (["--target", "sm89", "--precision", "fp16"], "multisa convert .* --precision fp16 --images"),
        (["--target", "sm89", "--library", "trt"], "library: got 'trt', expected tensorrt or tensorrt-rtx"),
        (["--target", "sm89", "--profile", "64x64"], "profile: got '64x64', expected NxHxW:NxHxW:NxHxW"),
    ],
)
def test_arguments_that_cannot_be_are_usage_errors(
    rtx: Library, packaged: Bundle, arguments: list[str], said: str
) -> None:
    result = CliRunner().invoke(root, ["build", str(packaged.path), *arguments])
    assert result.exit_code == 2, result.output
    assert re.search(said, result.output)


def test_an_absent_bundle_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(root, ["build", str(tmp_path / "none"), "--target", "sm89"])
    assert result.exit_code == 2 and "does not exist" in result.output


def test_graphs_without_the_precision_are_left_out_unless_asked_for(
    rtx: Library, packaged: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", packaged, segmenter_int8=tiny())
    rows = build_engines(bundle, BuildOptions(("sm89",), precision="int8")).rows
    assert [(row.graph, row.precision) for row in rows] == [("segmenter", "int8")]
    assert "left out, the bundle has no cam.int8.onnx, affinity.int8.onnx" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"no cam\.int8\.onnx"):
        build_engines(bundle, BuildOptions(("sm89",), precision="int8", graphs=("cam", "segmenter")))


def test_an_interrupted_build_ends_with_the_plan_under_way(rtx: Library, packaged: Bundle, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "multisa.runtime.cli.main",
        "build",
        str(packaged.path),
        "--engine-cache",
        str(tmp_path),
    ]
    command += ["--graph", "affinity", "--target", "sm80,sm86,sm89"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as build:
        while not list(tmp_path.rglob("*.lock")):  # taken just before the library is called
            assert build.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        build.send_signal(signal.SIGINT)
        _, said = build.communicate(timeout=120)
    assert build.returncode == 130 and said.splitlines()[-1] == "interrupted"
    assert len(list(tmp_path.rglob("*.plan"))) <= 1


# --- targets and profiles


def test_targets_are_named_once_in_order() -> None:
    assert parse_targets(("SM89, sm80", "sm89,sm120")) == ("sm89", "sm80", "sm120")
    for text in ("", "sm", "89", "sm8.9", "sm89;sm80"):
        with pytest.raises(UsageError, match="target: got"):
            parse_targets((text,))


@pytest.mark.parametrize("long_side", [64, 65, 100, 320, 512, 640, 1023, 1536])
def test_default_profiles_cover_every_photograph(long_side: int) -> None:
    profiles = default_profiles(long_side)
    assert parse_profiles([str(profile) for profile in profiles], long_side) == profiles
    sides = np.unique(np.linspace(64, long_side, 40).astype(int)).tolist()
    for height in sides:
        for width in sides:
            assert any(profile.covers((1, height, width)) for profile in profiles)
    # A larger batch costs its multiple of memory, and the runtime runs one image at a time.
    assert {profile.maximum[0] for profile in profiles} == {1}


def test_default_profiles_are_tuned_for_photographs_of_both_kinds() -> None:
    assert [str(profile) for profile in default_profiles(512)] == [
        "1x64x64:1x384x512:1x512x512",
        "1x64x64:1x512x384:1x512x384",
        "1x64x64:1x320x320:1x320x320",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1x64x64:1x512x512", "profile: got '1x64x64:1x512x512', expected NxHxW:NxHxW:NxHxW"),
        ("1x64x64:1x5e2x512:1x512x512", "expected NxHxW:NxHxW:NxHxW"),
        ("1x64x64:1x256x512:1x512x256", "input image: profile .*: width 64, 512, 256: expected 1 <= min"),
        ("2x64x64:1x64x64:2x64x64", "input image: profile .*: batch 2, 1, 2"),
        ("0x64x64:1x64x64:2x64x64", "input image: profile .*: batch 0, 1, 2"),
        ("1x32x64:1x64x64:2x64x64", "input image: profile .*: got a side of 32, expected at least 64"),
        ("1x64x64:1x64x64:2x64x513", "input image: profile .*: got a side of 513, expected at most 512"),
    ],
)
def test_profiles_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_profiles([text], 512)


def test_a_profile_given_twice() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_profiles(["1x64x64:1x64x64:1x64x64"] * 2, 512)


def test_a_profile_that_the_library_refuses_is_named(rtx: Library) -> None:
    backwards = object.__new__(Profile)  # as no Profile can be made: what the library itself would refuse
    shapes = {"minimum": (1, 64, 64), "optimum": (1, 96, 96), "maximum": (1, 80, 96)}
    for name, shape in shapes.items():
        object.__setattr__(backwards, name, shape)
    with pytest.raises(BackendError, match="input image: profile 1x64x64:1x96x96:1x80x96 is refused") as caught:
        build_engine(rtx, tiny(), SEGMENTER, (backwards,), ("sm89",))
    assert "MIN<=OPT<=MAX" in str(caught.value)


# --- libraries that are not there


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "tensorrt is not installed: pip install tensorrt"),
        ("raise ImportError('libnvinfer.so.11: cannot open')", r"cannot be loaded \(libnvinfer.so.11: cannot"),
        ("__version__ = '8.6.1'", r"tensorrt: got version 8.6.1, expected 10 or newer"),
    ],
)
def test_tensorrt_absent_broken_or_old(
    text: str | None, said: str, packaged: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    if text is None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        write_module(tmp_path, "tensorrt", text)
        monkeypatch.syspath_prepend(tmp_path)
    arguments = ["build", str(packaged.path), "--target", "sm89", "--library", "tensorrt"]
    result = CliRunner().invoke(root, arguments)
    sys.modules.pop("tensorrt", None)
    assert result.exit_code == 5, result.output
    assert re.search(said, result.output) and "pip install tensorrt-cu13" in result.output


def test_type_stubs_are_not_taken_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.pyi").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendUnavailable, match="tensorrt is not installed"):
        import_library("tensorrt")


def test_rtx_absent(packaged: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(root, ["build", str(packaged.path), "--target", "sm89"])
    assert result.exit_code == 5
    assert "tensorrt-rtx is not installed: pip install " in result.output


class FakeDriver:
    """libcuda of a machine with one GPU, or with none."""

    def __init__(self, status: int = 0, gpus: int = 1) -> None:
        self.status, self.gpus = status, gpus

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"no CUDA-capable device is detected"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13020
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA L4"
        return 0


FOR_TENSORRT = BuildOptions(("sm80",), graphs=("segmenter",), library="tensorrt")


def test_the_gpu_is_what_the_driver_says(packaged: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "import_library", lambda name: Library(name, None, "11.4.0.106"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    said = r"^tensorrt 11\.4\.0\.106 builds for the GPU of this machine, NVIDIA L4 \(sm89\); got the target sm80"
    with pytest.raises(BackendUnavailable, match=said):
        build_engines(packaged, FOR_TENSORRT)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda name: FakeDriver(status=100), r"no usable NVIDIA GPU here: cuInit: .* \(CUDA error 100\)"),
        (lambda name: FakeDriver(gpus=0), "no NVIDIA GPU here: the driver knows of none"),
        (lambda name: ctypes.cdll.LoadLibrary("no-such-library.so"), "no NVIDIA driver here: libcuda.so.1 "),
    ],
)
def test_without_driver_or_gpu_tensorrt_is_unavailable(
    load: Callable[[str], Any], said: str, packaged: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "import_library", lambda name: Library(name, None, "11.4.0.106"))
    loader = ctypes.LibraryLoader(ctypes.CDLL)
    monkeypatch.setattr(ctypes, "cdll", loader)
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(BackendUnavailable, match=said) as caught:
        build_engines(packaged, FOR_TENSORRT)
    assert "--library tensorrt-rtx" in str(caught.value)


# --- TensorRT 10 and 11, which build on a GPU only: the same calls, carried out by RTX's bindings


@pytest.fixture
def enterprise(
    rtx: Library, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Library, list[int]]:
    """TensorRT of the version asked for, with nothing in it that only RTX has, and its flags of networks."""
    flags: list[int] = []

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.real = rtx.module.Builder(logger)

        def create_network(self, asked: int) -> Any:
            flags.append(asked)
            return self.real.create_network(asked)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    module = ModuleType("tensorrt")
    vars(module).update({n: v for n, v in vars(rtx.module).items() if n != "ComputeCapability"})
    vars(module).update(Builder=Builder, __version__=request.param)
    library = Library("tensorrt", module, request.param)
    monkeypatch.setattr(building, "import_library", lambda name: library)
    probe = GpuProbe("13.2", (Gpu("NVIDIA L4", "sm89"), Gpu("NVIDIA T4", "sm75")))
    monkeypatch.setattr(building, "probe_gpus", lambda: probe)
    return library, flags


@pytest.mark.parametrize(("enterprise", "flags"), [("10.13.0.35", 1), ("11.4.0.106", 0)], indirect=["enterprise"])
def test_tensorrt_builds_for_its_gpu_with_the_types_of_the_graph(
    enterprise: tuple[Library, list[int]], flags: int, packaged: Bundle, tmp_path: Path
) -> None:
    library, seen = enterprise
    bundle = tiny_bundle(tmp_path / "bundle", packaged, segmenter=tiny())
    options = BuildOptions(("sm89",), graphs=("segmenter",), library="tensorrt")
    (row,) = build_engines(bundle, options).rows
    strongly_typed = int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert seen == [flags << strongly_typed]
    key = json.loads(row.path.with_name("plan.json").read_text())["key"]
    assert (key["library"], key["library_version"]) == ("tensorrt", library.version)
    assert (key["target"], key["gpu"]) == ("sm89", "NVIDIA L4")
    with pytest.raises(BackendUnavailable, match=r"GPU of this machine, NVIDIA L4 \(sm89\); got .* sm80"):
        build_engines(bundle, dataclasses.replace(options, targets=("sm80",)))


def calls_of_the_builder() -> set[tuple[str, str]]:
    """(class, member) of everything that builder.py asks of the library; "" for what a module has."""
    tree = ast.parse(inspect.getsource(builder))
    found: set[tuple[str, str]] = set()
    classes: dict[str, str] = {}
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None)
        name = getattr(node, "arg", None) or getattr(getattr(node, "target", None), "id", None)
        text = ast.unparse(annotation).strip("'\"") if annotation is not None else ""
        if name and text.startswith("trt."):
            assert classes.setdefault(name, text[4:]) == text[4:], f"{name}: two classes of one name"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        path = ast.unparse(node).removeprefix("library.").split(".")
        if path[0] in classes and len(path) == 2:
            found.add((classes[path[0]], path[1]))
        if path[0] == "module" and len(path) == 3:
            found.add((path[1], path[2]))
        if path[0] == "module" and len(path) == 2:
            found.add((path[1], ""))
    found |= {("BuilderFlag", text.split("=")[0]) for text in builder.FLAGS}  # by name, in _set_flags
    return found | {("ParserError", n) for n in ("desc", "code", "node", "node_name", "node_operator")}


RTX_ONLY = {("ComputeCapability", ""), ("ComputeCapability", "__members__")}


def test_the_calls_that_are_checked_are_those_that_are_made() -> None:
    calls = calls_of_the_builder()
    assert {("Builder", "build_serialized_network"), ("OnnxParser", "parse"), ("ITensor", "dtype")} <= calls
    assert {("IBuilderConfig", "add_optimization_profile"), ("BuilderFlag", "TF32")} <= calls
    assert ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") in calls and calls > RTX_ONLY


def test_tensorrt_10_has_everything_that_is_called() -> None:
    specification = importlib.util.find_spec("tensorrt_stubs")
    if specification is None or specification.origin is None:
        pytest.skip("tensorrt-stubs is not installed: pip install tensorrt-stubs")
    # Text, not syntax: some signatures in the stubs are no Python.
    text = Path(specification.origin).parents[1].joinpath("tensorrt_bindings", "tensorrt.pyi").read_text()
    bodies = dict(re.findall(r"^class (\w+).*?:\n((?:(?:    .*)?\n)+)", text, re.MULTILINE))
    for kind, member in calls_of_the_builder() - RTX_ONLY:
        assert kind in bodies, kind
        if member:
            assert re.search(rf"^    (?:def {member}\(|{member}:)", bodies[kind], re.MULTILINE), (kind, member)


def test_tensorrt_11_has_what_its_runtime_bindings_show() -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="pip install tensorrt-lean-cu13-bindings")
    assert int(lean.__version__.split(".")[0]) >= 11
    shown = {(kind, member) for kind, member in calls_of_the_builder() - RTX_ONLY if hasattr(lean, kind)}
    assert {kind for kind, _ in shown} == {"BuilderFlag", "IOptimizationProfile"}  # it builds nothing
    for kind, member in shown:
        assert not member or hasattr(getattr(lean, kind), member), (kind, member)


def test_tensorrt_11_has_the_names_of_everything_that_is_called() -> None:
    # The bindings cannot be imported without the library, but what they define is written in them.
    try:
        version = importlib.metadata.version("tensorrt-cu13-bindings")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed: pip install tensorrt-cu13-bindings")
    assert int(version.split(".")[0]) >= 11
    files = importlib.metadata.files("tensorrt-cu13-bindings") or []
    (compiled,) = (Path(str(file.locate())) for file in files if file.name == "tensorrt.so")
    text = compiled.read_bytes()
    for kind, member in calls_of_the_builder() - RTX_ONLY:
        for name in filter(None, (kind, member)):
            # A linker may let a name be the end of a longer one, so only its end is sure.
            assert name.encode() + b"\0" in text, (kind, member)
    assert b"EXPLICIT_BATCH\0" not in text  # that this finds out: a flag that 11 no longer has


NO_GPU = "Cuda Runtime (CUDA driver version is insufficient for CUDA runtime version)"


def test_the_log_keeps_what_matters(rtx: Library) -> None:
    logger, log = library_log(rtx.module)
    assert library_log(rtx.module)[0] is logger  # the library keeps the first for good
    log.clear()
    severity = rtx.module.ILogger.Severity
    for kind in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING, severity.INFO):
        logger.log(kind, f" {kind.name}\n")
    assert (log.errors, log.warnings) == (("INTERNAL_ERROR", "ERROR"), ("WARNING",))
    log.clear()
    assert (log.errors, log.warnings) == ((), ())


def test_a_build_does_not_blame_the_missing_gpu(rtx: Library) -> None:
    """RTX looks for one in passing; the log keeps that, since a run needs one."""
    logger, log = library_log(rtx.module)
    log.clear()
    severity = rtx.module.ILogger.Severity
    logger.log(severity.WARNING, "a warning")
    logger.log(severity.ERROR, NO_GPU)
    assert builder._build_errors(log) == "\n  a warning"
    logger.log(severity.ERROR, "an error")
    assert builder._build_errors(log) == "\n  an error"
    assert log.take() == f"{NO_GPU}; an error"
    assert builder._build_errors(log) == " it gives no reason"
