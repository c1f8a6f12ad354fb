"""From a training run to a bundle: the graphs are compared, and a wrong one is never shipped."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from multisa.export import bundle as export_module
from multisa.export.bundle import export_bundle
from multisa.export.parity import LIMITS, check_parity
from multisa.export.to_onnx import OPSET
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.engine import OnnxRuntimeEngine
from multisa.runtime.errors import ParityError
from multisa.training.config import load_config
from multisa.training.data import DataSet, read_dataset
from multisa.training.pipeline import RunRecord, run_pipeline

TINY = Path(__file__).parents[1] / "training" / "tiny.toml"


@pytest.fixture(scope="module")
def dataset(voc_folder: Path) -> DataSet:
    return read_dataset(voc_folder)


@pytest.fixture(scope="module")
def trained(dataset: DataSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    root = tmp_path_factory.mktemp("run")
    overrides = ["cam_baseline=false", "cam.schedule.epochs=1", "segmenter.schedule.epochs=1"]
    return run_pipeline(load_config(str(TINY), overrides), dataset, root), root


@pytest.fixture(scope="module")
def exported(
    trained: tuple[RunRecord, Path], dataset: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return export_bundle(*trained, dataset, tmp_path_factory.mktemp("out") / "bundle", photographs=3)


def test_bundle_holds_what_the_runtime_needs(exported: Bundle, dataset: DataSet) -> None:
    manifest = load_bundle(exported.path).manifest
    assert manifest.classes == dataset.class_names
    assert manifest.metrics["parity"]["photographs"] == 3
    assert set(manifest.metrics["parity"]) == {"photographs", *LIMITS}
    assert manifest.parameters.walk_stride == 4


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (130, 71)])
def test_graphs_take_every_size_and_batch(exported: Bundle, size: tuple[int, int]) -> None:
    photographs = np.random.default_rng(0).integers(0, 256, (3, *size, 3)).astype(np.uint8)
    grid = tuple(-(-side // 4) for side in size)
    expected = {
        "cam.onnx": {"cam": (3, 2, *grid), "scores": (3, 2)},
        "affinity.onnx": {"affinity": (3, 34, *grid)},
        "segmenter.onnx": {"labels": (3, *size), "confidence": (3, *size)},
    }
    for file, shapes in expected.items():
        with OnnxRuntimeEngine(exported.read_file(file)) as engine:
            together = engine.run(photographs)
            alone = engine.run(photographs[1:2])
        assert {name: values.shape for name, values in together.items()} == shapes
        for name, values in together.items():
            wide = values[1:2].astype(np.float64)
            np.testing.assert_allclose(
                wide, alone[name].astype(np.float64), atol=2 if name in ("labels", "confidence") else 1e-3
            )


def test_graphs_carry_metadata_and_no_machine_paths(exported: Bundle) -> None:
    for file in ("cam.onnx", "affinity.onnx", "segmenter.onnx"):
        data = exported.read_file(file)
        model = onnx.load_from_string(data)
        assert {entry.key for entry in model.metadata_props} == {"name", "classes", "graph"}
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
        assert str(Path(torch.__file__).parent).encode() not in data
        assert b"/training/" not in data and b".py" not in data


def test_a_graph_that_answers_differently_is_not_shipped(
    trained: tuple[RunRecord, Path], dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mirrored(nn.Module):
        """Segments the mirror image: right everywhere a unit test of shapes looks."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            labels, confidence = self.module(image.flip(2))
            return labels, confidence

    graphs = export_module.graphs_of_run(*trained)
    wrong = export_module.Graph(
        graphs[2].file, graphs[2].reference, Mirrored(graphs[2].exported), graphs[2].outputs
    )
    monkeypatch.setattr(export_module, "graphs_of_run", lambda run, root: (*graphs[:2], wrong))
    with pytest.raises(ParityError, match="confidence: mean difference") as raised:
        export_bundle(*trained, dataset, tmp_path / "bundle", photographs=2)
    assert raised.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()


def test_parity_names_every_figure_beyond_its_limit() -> None:
    labels = np.zeros((1, 10, 10), np.uint8)
    other = labels.copy()
    other[0, 0, 0] = 1
    broken = np.full((1, 2), np.nan, np.float32)
    with pytest.raises(ParityError, match=r"labels: 99\.0000% .*scores: 2 values are not finite"):
        check_parity(
            [
                (
                    {"labels": labels, "scores": np.zeros((1, 2), np.float32)},
                    {"labels": other, "scores": broken},
                )
            ]
        )
    with pytest.raises(ParityError, match="no photograph"):
        check_parity([])
