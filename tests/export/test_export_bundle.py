"""From a training run to a bundle: the graphs are compared, and a wrong one is never shipped."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from multisa.export import bundle as export_module
from multisa.export import to_onnx as to_onnx_module
from multisa.export.attention import OPSET
from multisa.export.bundle import ExportOptions, export_bundle
from multisa.export.parity import LIMITS
from multisa.export.report import REPORT_NAME
from multisa.export.to_onnx import onnx_from_module
from multisa.kernels import stencil_offsets
from multisa.runtime.backends.base import AFFINITY, CAM
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.bundle.storage import MODEL_CARD
from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import BundleError, ParityError, UsageError
from multisa.training.affinity_net import AffinityNet
from multisa.training.backbones import Backbone
from multisa.training.config import load_config
from multisa.training.data import Dataset, read_dataset
from multisa.training.fold import AffinityFromImages, FoldedMultiSACAM
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.pipeline import train
from multisa.training.run_record import RunRecord

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[1] / "training" / "tiny.toml"


@pytest.fixture(scope="module")
def dataset(voc_folder: Path) -> Dataset:
    return read_dataset(voc_folder)


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    root = tmp_path_factory.mktemp("run")
    overrides = ["paper_rows=false", "cam.schedule.epochs=1", "segmenter.schedule.epochs=1"]
    return train(load_config(str(TINY), overrides), dataset, root), root


@pytest.fixture(scope="module")
def exported(trained: tuple[RunRecord, Path], dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("out") / "bundle"
    result = export_bundle(trained[1], dataset, output, ExportOptions(num_images=3))
    assert [graph.file for graph in result.graphs] == ["cam.onnx", "affinity.onnx", "segmenter.onnx"]
    assert result.describe().endswith(f"bundle: {output}")
    return result.bundle


def test_bundle_holds_what_the_runtime_needs(exported: Bundle, dataset: Dataset) -> None:
    manifest = load_bundle(exported.path).manifest
    assert manifest.classes == dataset.class_names
    assert manifest.metrics["parity"]["images"] == 3
    assert set(manifest.metrics["parity"]) == {"images", *LIMITS["fp32"]}
    assert manifest.parameters.walk_stride == 4
    report = json.loads(exported.read_file(REPORT_NAME))["fp32"]
    assert report["passed"] and report["figures"] == manifest.metrics["parity"]
    for name in ("pseudo_mask", "segmenter_pseudo_mask"):
        assert report["figures"][name]["images_with_truth"] == 3


def test_the_manifest_has_the_parameters_of_the_run(exported: Bundle, trained: tuple[RunRecord, Path]) -> None:
    parameters, run = exported.manifest.parameters, trained[0]
    config = run.config
    assert parameters.min_area == config.min_area
    assert (parameters.segmenter_label, parameters.label) == (run.segmenter_label, run.label)
    assert replace(run.segmenter_label, background_ratio=1.0) == config.segmenter_label != run.segmenter_label


def test_the_label_method_is_chosen_on_the_images_trained_on(exported: Bundle, dataset: Dataset) -> None:
    manifest, found = exported.manifest, exported.manifest.metrics["label_method"]
    labelled = [item for item in dataset.train_images if item.classes]
    assert manifest.parameters.label_method == found["chosen"]
    assert (found["images"], found["regions"]) == (len(labelled), sum(len(item.classes) for item in labelled))
    assert set(found["scores"]) == {"segmenter", "walk"} and max(found["scores"].values()) <= 1


def test_the_model_card_is_of_the_run_and_lists_the_files(exported: Bundle, trained: tuple[RunRecord, Path]) -> None:
    card = exported.read_file(MODEL_CARD).decode()
    assert card.startswith(f"# Model card: {trained[0].config.name}\n") and trained[0].data_digest in card
    assert f"{trained[0].rows[-1].miou:.2f}" in card
    for name in set(exported.manifest.files) - {MODEL_CARD}:
        assert f"| `{name}` |" in card
    # The networks started from random weights, which have no licence.
    assert "NOTICE" not in exported.manifest.files and exported.manifest.provenance["licences"] == {}


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (130, 71)])
def test_graphs_take_every_size_and_batch(exported: Bundle, size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3)).astype(np.uint8)
    grid = tuple(-(-side // 4) for side in size)
    expected = {
        "cam.onnx": {"cam": (3, 2, *grid), "scores": (3, 2)},
        "affinity.onnx": {"affinity": (3, 34, *grid)},
        "segmenter.onnx": {"probabilities": (3, 3, *grid)},
    }
    for file, shapes in expected.items():
        with OnnxRuntimeBackend(exported.read_file(file)) as backend:
            together = backend.run(images)
            alone = backend.run(images[1:2])
        assert {name: values.shape for name, values in together.items()} == shapes
        for name, values in together.items():
            np.testing.assert_allclose(values[1:2], alone[name], atol=1e-3)
            if name == "probabilities":
                np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)


def test_graphs_carry_metadata_and_no_machine_paths(exported: Bundle) -> None:
    for file in ("cam.onnx", "affinity.onnx", "segmenter.onnx"):
        data = exported.read_file(file)
        model = onnx.load_from_string(data)
        assert {entry.key for entry in model.metadata_props} == {"name", "classes", "graph"}
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
        assert str(Path(torch.__file__).parent).encode() not in data
        assert not re.search(rb"/training/|site-packages|\.py\b", data)


def test_no_batch_norm_and_no_attention_matrix_is_left(exported: Bundle) -> None:
    for file in ("cam.onnx", "affinity.onnx", "segmenter.onnx"):
        *nodes, last = onnx.load_from_string(exported.read_file(file)).graph.node
        assert not [node.name for node in nodes if node.op_type in ("BatchNormalization", "Softmax")]
        assert last.op_type != "Softmax" or last.output[0] == "probabilities"


def test_a_graph_that_answers_differently_is_not_shipped(
    trained: tuple[RunRecord, Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(nn.Module):
        """Answers the next class: right everywhere a test of shapes and types looks."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.module(image).roll(1, 1)

    graphs = export_module.graphs_of_run(*trained)
    wrong = replace(graphs[2], exported=Shifted(graphs[2].exported))
    monkeypatch.setattr(export_module, "graphs_of_run", lambda run, root: (*graphs[:2], wrong))
    with pytest.raises(ParityError, match=r"with float32 weights too: .*labels: 0\.\d+% of the labels agree") as raised:
        options = ExportOptions(num_images=2, report=tmp_path / "parity.json")
        export_bundle(trained[1], dataset, tmp_path / "bundle", options)
    assert raised.value.exit_code == 3 and "--num-images" in str(raised.value)
    assert not (tmp_path / "bundle").exists()
    report = json.loads((tmp_path / "parity.json").read_text())["fp32"]
    assert not report["passed"] and any("probabilities: mean difference" in line for line in report["problems"])


def test_a_graph_that_float16_weights_spoil_gets_float32_ones(
    trained: tuple[RunRecord, Path], exported: Bundle, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the two: float16 weights of this network move its affinities by more than 1e-4, other sums by less.
    strict = replace(LIMITS["fp32"]["affinity"], max_error=5e-5)
    monkeypatch.setitem(LIMITS, "fp32", {**LIMITS["fp32"], "affinity": strict})
    monkeypatch.setattr(to_onnx_module, "MIN_FLOAT16_VALUES", 16)
    result = export_bundle(trained[1], dataset, tmp_path / "bundle", ExportOptions(num_images=2))
    report = json.loads(result.bundle.read_file(REPORT_NAME))["fp32"]
    assert report["passed"] and list(report["full_weights"]) == ["affinity.onnx"]
    assert "affinity: largest difference" in report["full_weights"]["affinity.onnx"][0]
    assert result.bundle.manifest.provenance["full_weights"] == report["full_weights"]
    stored = {file: result.bundle.read_file(file).count(b".half") > 0 for file in ("cam.onnx", "affinity.onnx")}
    assert stored == {"cam.onnx": True, "affinity.onnx": False}
    assert "full_weights" not in exported.manifest.provenance


def test_a_run_without_its_checkpoints_is_one_line(
    trained: tuple[RunRecord, Path], voc_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(trained[1] / "run.json", tmp_path / "run.json")
    arguments = ["export", str(tmp_path), "--data", str(voc_folder), "-o", str(tmp_path / "bundle")]
    result = CliRunner().invoke(root_command, arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "missing, expected a trained network" in line


def test_where_no_bundle_can_be_written_nothing_is_done_first(
    trained: tuple[RunRecord, Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_reached(*_: object) -> None:
        raise AssertionError("networks were loaded")

    monkeypatch.setattr(export_module, "graphs_of_run", not_reached)
    with pytest.raises(UsageError, match="inside the bundle's folder"):
        report = tmp_path / "bundle" / "report.json"
        export_bundle(trained[1], dataset, tmp_path / "bundle", ExportOptions(report=report))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not only a bundle"):
        export_bundle(trained[1], dataset, tmp_path)


def test_the_command_prints_one_json_object(trained: tuple[RunRecord, Path], voc_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    (tmp_path / "LICENSE-weights.txt").write_text("free for all\n")
    (tmp_path / "failures.md").write_text("- Discs behind squares.\n")
    arguments = ["export", str(trained[1]), "--data", str(voc_folder), "-o", str(output)]
    arguments += ["--notice", str(tmp_path / "LICENSE-weights.txt"), "--known-failures", str(tmp_path / "failures.md")]
    result = CliRunner().invoke(root_command, [*arguments, "--num-images", "1", "--json"])
    assert result.exit_code == 0, result.output
    written = load_bundle(output)
    assert written.read_file("LICENSE-weights.txt") == b"free for all\n"
    assert b"- Discs behind squares." in written.read_file(MODEL_CARD)
    found = json.loads(result.stdout)
    assert found["passed"] and found["bundle"] == str(output) and found["parity"]["fp32"]["passed"]
    assert [graph["bytes"] for graph in found["graphs"]] == [
        load_bundle(output).manifest.files[graph["file"]].bytes for graph in found["graphs"]
    ]


def test_another_data_set_than_the_runs_is_refused(
    trained: tuple[RunRecord, Path], dataset: Dataset, tmp_path: Path
) -> None:
    other = replace(dataset, train_images=dataset.train_images[1:])
    with pytest.raises(UsageError, match="not the data set"):
        export_bundle(trained[1], other, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("taps", "head", "stride", "radius"),
    # With radius 10, pairs of the feature head reach beyond the grid of the image below.
    [((), "boundary", 4, 5), ((4,), "features", 8, 10), ((1, 3), "boundary", 4, 5)],
)
def test_other_taps_and_heads_export_alike(taps: tuple[int, ...], head: str, stride: int, radius: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone("test_efficientnet", weights="none").eval()
    cam = MultiSACAM(backbone, taps=taps, n_classes=2).eval()
    torch.nn.init.normal_(cam.classifier.weight)
    for beta in cam.beta_parameters():
        beta.data.fill_(0.7)
    affinity = AffinityFromImages(AffinityNet(backbone, head=head), radius).eval()
    exported = MultiScaleCAM(FoldedMultiSACAM(cam), scales=(0.5, 1.0)).eval()
    # Odd sides, the smallest, two images at once, and a long one: attention takes it in many blocks.
    shapes = [(1, 97, 66), (2, 64, 64), (2, 65, 131), (1, 64, 1536)]
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]
    for contract, reference, module in (
        (CAM, MultiScaleCAM(cam, scales=(0.5, 1.0)).eval(), exported),
        (AFFINITY, affinity, affinity),
    ):
        data = onnx_from_module(module, tuple(contract.outputs), {}, half_weights=False)
        with OnnxRuntimeBackend(data, contract=contract) as backend:
            for image in images:
                with torch.inference_mode():
                    made = reference(torch.from_numpy(image))
                expected = made if isinstance(made, tuple) else (made,)
                got = backend.run(image)
                for name, tensor in zip(contract.outputs, expected, strict=True):
                    np.testing.assert_allclose(got[name], tensor.numpy(), atol=1e-5)
    planes = len(stencil_offsets(radius))
    assert got["affinity"].shape == (1, planes, -(-64 // stride), -(-1536 // stride))
