"""The public names of multisa.training; importing them; importing timm beside any torchvision."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import multisa.training
from multisa.runtime.errors import CheckpointError, UsageError
from multisa.training import (
    Dataset,
    RunRecord,
    TrainConfig,
    create_model,
    load_config,
    load_run,
    read_dataset,
    reproduce_paper,
    train,
)
from multisa.training.affinity_net import AffinityNet
from multisa.training.multi_sa import MultiSACAM
from multisa.training.segmenter import DeepLabV3Plus

TINY = Path(__file__).with_name("tiny.toml")


def run_python(program: str, path: str = "") -> str:
    paths = [path, str(Path(multisa.training.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names() -> None:
    assert multisa.training.__all__ == [
        "Dataset",
        "DatasetReport",
        "RunRecord",
        "TrainConfig",
        "add_corrections",
        "check_dataset",
        "create_model",
        "load_config",
        "load_run",
        "read_dataset",
        "reproduce_paper",
        "train",
    ]
    assert set(multisa.training.__all__) <= set(dir(multisa.training))
    for name in multisa.training.__all__:
        assert inspect.getdoc(getattr(multisa.training, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        multisa.training.trian  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, multisa.training\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "multisa.training.load_config('lite0'), multisa.training.read_dataset, multisa.training.check_dataset\n"
        "assert 'torch' not in sys.modules\n"
    )
    run_python(program)


@pytest.mark.slow
def test_train_resumes_the_finished_run(tiny_run: Path, voc_folder: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config, dataset = load_config(str(TINY)), read_dataset(voc_folder)
    assert isinstance(config, TrainConfig) and isinstance(dataset, Dataset)
    run = train(config, dataset, output)  # finished already: every stage is skipped
    assert isinstance(run, RunRecord) and run == load_run(tiny_run)
    assert run.format_table().startswith("stage")
    assert "Table 3" in reproduce_paper("table3", config, dataset, output)
    with pytest.raises(UsageError, match="got 'table4', expected one of table1, table2"):
        reproduce_paper("table4", config, dataset, output)


def test_create_model_builds_the_network_of_each_configuration(tmp_path: Path) -> None:
    config = load_config(str(TINY))
    image = torch.randint(0, 256, (1, 65, 70, 3), dtype=torch.uint8)
    cam, affinity = create_model(config.cam, 3), create_model(config.affinity)
    segmenter = create_model(config.segmenter, n_classes=3)
    assert isinstance(cam, MultiSACAM) and cam.training
    assert isinstance(affinity, AffinityNet) and isinstance(segmenter, DeepLabV3Plus)
    with torch.inference_mode():
        normalised = cam.backbone.normalise(image)
        assert cam.eval()(normalised).shape == (1, 2, 9, 9)
        pairs = affinity.eval()(normalised, config.affinity.training_radius)
        assert pairs.shape[0] == 1 and pairs.shape[2:] == (17, 18) and 0 <= pairs.min() <= pairs.max() <= 1
        assert segmenter.eval()(normalised).shape == (1, 3, 17, 18)
    with pytest.raises(UsageError, match="n_classes: got 1, expected at least 2"):
        create_model(config.segmenter, 1)
    with pytest.raises(CheckpointError, match="missing"):
        create_model(config.cam, 3, checkpoint=tmp_path / "none.safetensors")


@pytest.mark.slow
def test_create_model_loads_a_checkpoint_in_evaluation_mode(tiny_run: Path) -> None:
    run = load_run(tiny_run)
    checkpoint = run.folder(tiny_run, "cam") / "checkpoint.safetensors"
    network = create_model(run.config.cam, len(run.classes), checkpoint=checkpoint)
    assert not network.training and tuple(network.betas()) == pytest.approx(run.betas)


@pytest.mark.slow
def test_timm_imports_beside_a_torchvision_of_another_torch(tmp_path: Path) -> None:
    """The library of such a torchvision does not load, and its import then describes operators of it."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def nms(dets, scores, iou_threshold): return dets\n"
        "@torch.library.register_fake('torchvision::qnms')\n"
        "def qnms(dets, scores, iou_threshold): return dets\n"
    )
    (package / "_C.so").write_bytes(b"built for another torch")
    (tmp_path / "timm.py").write_text("import torchvision\n")
    with pytest.raises(AssertionError, match="operator torchvision::nms does not exist"):
        run_python("import timm", str(tmp_path))
    program = (
        "import sys\n"
        "from multisa.training.weights import import_timm\n"
        "assert 'torchvision' not in sys.modules\n"
        "timm = import_timm()\n"
        "before = dict(sys.modules)\n"
        "assert import_timm() is timm is sys.modules['timm']\n"
        "assert all(sys.modules[name] is module for name, module in before.items())\n"
    )
    run_python(program, str(tmp_path))
