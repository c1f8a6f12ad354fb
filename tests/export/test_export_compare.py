"""`multisa parity`: a backend against the fp32 graphs on a CPU."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from multisa.export.fp16 import fp16_candidates, fp16_graph, model_bytes, read_fp32_graph
from multisa.export.parity import LIMITS
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.cli.main import root as root_command

DEMO_IMAGES = default_bundle_path().parents[1] / "demo_images"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The packaged bundle for small images, with its fp32 graphs only."""
    packaged = load_bundle(default_bundle_path())
    manifest = replace(packaged.manifest, parameters=replace(packaged.manifest.parameters, long_side=128))
    files = {name: packaged.read_file(name) for name in ("cam.onnx", "affinity.onnx", "segmenter.onnx")}
    return write_bundle(tmp_path_factory.mktemp("small") / "bundle", manifest, files)


def with_fp16_segmenter(bundle: Bundle, folder: Path, *, shift: float = 0.0) -> Bundle:
    """The bundle with an fp16 segmenter, the weights of whose last convolution are larger by `shift`."""
    plain = read_fp32_graph(bundle.read_file("segmenter.onnx"))
    last = [node for node in plain.model.graph.node if node.op_type == "Conv"][-1]
    for initialiser in plain.model.graph.initializer:
        if initialiser.name == last.input[1]:
            values = numpy_helper.to_array(initialiser) * (1 - 2 * shift)
            initialiser.CopyFrom(numpy_helper.from_array(values.astype(np.float32), initialiser.name))
    data = model_bytes(fp16_graph(plain, fp16_candidates(plain)))
    files = {name: bundle.read_file(name) for name in bundle.manifest.files}
    return write_bundle(folder, bundle.manifest, {**files, "segmenter.fp16.onnx": data})


def parity(bundle: Bundle, *options: str) -> Result:
    command = ["parity", str(bundle.path), "--images", str(DEMO_IMAGES), *options]
    return CliRunner().invoke(root_command, command)


@pytest.mark.slow
def test_a_backend_against_itself(small: Bundle, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    result = parity(small, "--backend", "onnxruntime-cpu", "--report", str(report_file))
    assert result.exit_code == 0, result.output
    assert "cam, affinity, segmenter: onnxruntime-cpu, fp32 (requested)" in result.stderr
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["labels", "3", "agreement", "100", "%", ">=", "99.9", "%", "ok"] in table
    assert ["affinity", "3", "max", "error", "0", "<=", "0.1", "ok"] in table
    assert max(map(len, result.stdout.splitlines()[:-1])) < 80
    assert result.stdout.endswith(f"bundle: {small.path}\n")
    report = json.loads(report_file.read_text())
    assert set(report) == {"fp32 on onnxruntime-cpu"}
    entry = report["fp32 on onnxruntime-cpu"]
    # Without image-level labels and ground truth, there are no classes to restrict the segmenter to.
    assert entry["passed"] and set(entry["figures"]) == {"images", *LIMITS["fp32"]} - {"segmenter_pseudo_mask"}
    for name in ("cam", "scores", "affinity", "probabilities", "confidence"):
        assert entry["figures"][name]["max_error"] == 0 and entry["figures"][name]["images"] == 3
    assert entry["figures"]["labels"]["agreement"] == entry["figures"]["pseudo_mask"]["agreement"] == 1


def test_json_is_one_object_and_nothing_else(small: Bundle, tmp_path: Path) -> None:
    altered = with_fp16_segmenter(small, tmp_path / "altered", shift=1.0)
    result = parity(altered, "--backend", "onnxruntime-cpu", "--precision", "fp16", "--json")
    assert result.exit_code == 3 and "error: fp16 on onnxruntime-cpu" in result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] is False and found["backend"] == "onnxruntime-cpu" and found["seconds"] > 0
    assert found["bundle"] == str(altered.path) and found["precision"] == "fp16"
    assert found["parity"]["fp16 on onnxruntime-cpu"]["problems"]


def test_a_graph_of_other_weights_is_exit_code_3_and_reported(small: Bundle, tmp_path: Path) -> None:
    true = with_fp16_segmenter(small, tmp_path / "true")
    options = ("--backend", "onnxruntime-cpu", "--precision", "fp16")
    result = parity(true, *options)
    assert result.exit_code == 0, result.output
    assert "labels " in result.stdout and "cam " not in result.stdout  # only the segmenter has fp16
    altered = with_fp16_segmenter(small, tmp_path / "altered", shift=1.0)
    result = parity(altered, *options, "--report", str(tmp_path / "report.json"))
    assert result.exit_code == 3
    said = "error: fp16 on onnxruntime-cpu differs from fp32 on onnxruntime-cpu: probabilities: "
    assert said in result.stderr and "; labels: " in result.stderr and "agreement" in result.stdout
    assert "FAILED" in result.stdout
    entry = json.loads((tmp_path / "report.json").read_text())["fp16 on onnxruntime-cpu"]
    assert entry["passed"] is False and entry["problems"] and entry["precision"] == "fp16"


@pytest.mark.slow
def test_ground_truth_counts_where_it_is_given(small: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    for path in DEMO_IMAGES.glob("*.jpg"):
        with Image.open(path) as image:
            Image.fromarray(np.zeros((image.height, image.width), np.uint8)).save(tmp_path / f"{path.stem}.png")
    result = parity(small, "--backend", "onnxruntime-cpu", "--masks", str(tmp_path), "--num-images", "2")
    assert result.exit_code == 0, result.output
    assert re.search(r"labels +\d+ +mIoU loss +0 +<= 0.05  ok", result.stdout)
    assert "segmenter_pseudo_mask" not in result.stdout  # the ground truth shows no class


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--backend", "opencv"), 2, "got the backend 'opencv', expected auto or one of tensorrt"),
        (("--backend", "onnxruntime-cpu", "--precision", "int8"), 2, "has cam in fp32, got --precision int8"),
        (("--backend", "onnxruntime-cpu", "--report", "{bundle}/r.json"), 2, "inside the bundle's folder"),
        (("--backend", "tensorrt-rtx"), 5, "tensorrt-rtx cannot run cam here: "),
    ],
)
def test_what_cannot_be_compared(
    small: Bundle, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, said: str
) -> None:
    from multisa.runtime.backends import registry as choice
    from multisa.runtime.backends.gpus import GpuProbe

    monkeypatch.setattr(choice, "probe_gpus", lambda: GpuProbe("", (), "no NVIDIA driver here"))
    result = parity(small, *(option.format(bundle=small.path) for option in options))
    assert result.exit_code == code and said in result.stderr, result.output


@pytest.mark.slow
def test_cam_is_compared_with_affinity_or_left_out(small: Bundle, tmp_path: Path) -> None:
    bundle = with_fp16_segmenter(small, tmp_path / "bundle")
    files = {name: bundle.read_file(name) for name in bundle.manifest.files}
    files["cam.fp16.onnx"] = files["cam.onnx"]
    bundle = write_bundle(tmp_path / "bundle", bundle.manifest, files)
    result = parity(bundle, "--backend", "onnxruntime-cpu", "--precision", "fp16")
    assert result.exit_code == 0 and "cam: left out" in result.stderr


@pytest.mark.slow
def test_neither_pytorch_nor_onnx_is_needed(small: Bundle) -> None:
    program = (
        "import sys; sys.modules.update(torch=None, onnx=None)\n"
        "from multisa.runtime.cli.main import main\n"
        f"main(['parity', {str(small.path)!r}, '--backend', 'onnxruntime-cpu',\n"
        f"      '--images', {str(DEMO_IMAGES)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0 and "pseudo_mask" in result.stdout, result.stderr
