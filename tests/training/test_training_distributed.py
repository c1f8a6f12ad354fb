"""Several processes, parts of a batch, precisions: the losses and files of one process in fp32."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.training.affinity_net import affinity_loss, pair_counts, pair_targets
from multisa.training.config import ExecutionConfig, Schedule, load_config
from multisa.training.data import read_dataset
from multisa.training.loop import CHECKPOINT, check_execution, load_checkpoint
from multisa.training.models import create_model
from multisa.training.pipeline import train
from multisa.training.run_record import load_run
from multisa.training.segmenter import segmentation_loss, soft_segmentation_loss
from multisa.training.stage_cache import load_stage

TINY = Path(__file__).with_name("tiny.toml")
# Every network, soft targets too; without dropout, which is drawn per process.
SETTINGS = [
    "paper_rows=false", "background_from=config", "relabel.rounds=2", "segmenter.dropout=0.0",
    "relabel.teacher.dropout=0.0", "workers=2",
]  # fmt: skip
TRAINED = ("cam", "affinity", "teacher-1", "teacher-2", "segmenter")
INFERRED = ("cam-maps", "affinity-labels", "walk", "pseudo-masks", "relabelled-1", "relabelled-2", "segmenter-val")


def losses(root: Path, names: tuple[str, ...] = TRAINED) -> dict[str, list[float]]:
    run = load_run(root)
    return {name: load_stage(run.folder(root, name))["results"]["losses"] for name in names}


def command(data: Path, root: Path, *options: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    start = [sys.executable, "-m", "multisa.training", "train", "--data", str(data), "--preset", str(TINY)]
    return [*start, *settings, "-o", str(root), *options]


@pytest.fixture(scope="module")
def one_process(voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one") / "run"
    train(load_config(str(TINY), SETTINGS), read_dataset(voc_folder), root)
    return root


def without(source: Path, root: Path, names: tuple[str, ...]) -> Path:
    """A copy of a run that must repeat these stages, from the same results of all others."""
    shutil.copytree(source, root)
    for name in names:
        shutil.rmtree(load_run(root).folder(root, name))
    return root


@pytest.mark.slow
def test_two_processes_train_as_one(one_process: Path, voc_folder: Path, tmp_path: Path) -> None:
    root = without(one_process, tmp_path / "run", TRAINED)
    result = subprocess.run(command(voc_folder, root, "--devices", "2"), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("minutes in total") == result.stderr.count("2 processes train together") == 1
    alone, together = losses(one_process), losses(root)
    assert alone.keys() == together.keys() == set(TRAINED)
    for name, values in alone.items():
        np.testing.assert_allclose(together[name], values, rtol=0, atol=1e-5, err_msg=name)
    # Statistics of trained batch norms, too.
    states = []
    for path in (one_process, root):
        config = load_config(str(TINY), SETTINGS).segmenter
        states.append(create_model(config, 3, checkpoint=load_run(path).folder(path, "segmenter") / CHECKPOINT))
    for (name, first), second in zip(states[0].state_dict().items(), states[1].state_dict().values(), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_one_of_two_processes_estimates_and_measures_alone(voc_folder: Path, tmp_path: Path) -> None:
    """The estimate and val while training are work of rank 0, which uses functions that all ranks call elsewhere."""
    script = tmp_path / "train.py"
    script.write_text(
        "from multisa.runtime.cli.main import main\n"
        "from multisa.training import pipeline\n"
        "if __name__ == '__main__':\n"
        "    pipeline.LEAST_SAMPLES = 1  # an estimate for this small training, too\n"
        "    main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    given = command(voc_folder, tmp_path / "run", "--set", "val_every=1", "--set", "relabel.rounds=0")[3:]
    result = subprocess.run([*torchrun, *given], capture_output=True, text=True, check=False, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "mIoU on val" in result.stderr and " in all" in result.stderr
    assert any(json.loads((tmp_path / "run" / "plan.json").read_text())["seconds"].values())
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == len({tuple(row.split(",")[1:5]) for row in rows}) and any("val_miou" in row for row in rows)


@pytest.mark.slow
def test_two_processes_divide_images_and_make_the_same_files(
    one_process: Path, voc_folder: Path, tmp_path: Path
) -> None:
    root = without(one_process, tmp_path / "run", INFERRED)
    # Started by torchrun itself.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, *command(voc_folder, root)[1:]]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in INFERRED:
        before, after = load_run(one_process).folder(one_process, name), load_run(root).folder(root, name)
        files = {path.name: path.read_bytes() for path in before.iterdir() if path.suffix in (".npy", ".png")}
        assert files
        assert files == {p.name: p.read_bytes() for p in after.iterdir() if p.suffix in (".npy", ".png")}, name
    assert load_run(root).rows == load_run(one_process).rows


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of a launcher in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_of_two_processes_resumes_in_one(
    one_process: Path, voc_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    root = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(voc_folder, root, "--devices", "2"), stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not list(root.glob("cam-*/" + CHECKPOINT)):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if number == signal.SIGTERM else int(children[-1]), number)
        assert process.wait(60) == 128 + number, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "; run the same command again to resume" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{child}/status").exists() for child in children)
    assert not (root / "run.json").exists()
    train(load_config(str(TINY), SETTINGS), read_dataset(voc_folder), root)
    np.testing.assert_allclose(losses(root)["cam"], losses(one_process)["cam"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_error_of_rank_0_is_shown_once(tmp_path: Path) -> None:
    result = subprocess.run(
        command(tmp_path / "nowhere", tmp_path / "run", "--devices", "2"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and "not a folder" in lines[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("setting", ["accumulate=3", "checkpoint_attention=true", "compile=true"])
def test_execution_settings_do_not_change_the_losses(
    one_process: Path, voc_folder: Path, tmp_path: Path, setting: str
) -> None:
    # Networks without a batch norm that is trained, whose statistics are of the parts.
    names = ("cam",) if setting == "compile=true" else ("cam", "affinity")  # compiling takes long
    root = without(one_process, tmp_path / "run", names)
    config = load_config(str(TINY), [*SETTINGS, f"execution.{setting}"])
    alone = losses(one_process, names)
    train(config, read_dataset(voc_folder), root)
    for name, values in losses(root, names).items():
        np.testing.assert_allclose(values, alone[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_bf16_trains_every_network_near_fp32(one_process: Path, voc_folder: Path, tmp_path: Path) -> None:
    config = load_config(str(TINY), [*SETTINGS, "execution.precision=bf16", "relabel.rounds=0"])
    train(config, read_dataset(voc_folder), tmp_path / "run")
    run, expected = losses(tmp_path / "run", ("cam", "affinity", "segmenter")), losses(one_process)
    # The later networks learn from other maps and masks, so their losses are near each other only in magnitude.
    for name, fp32, tolerance in (("cam", "cam", 0.02), ("affinity", "affinity", 0.1), ("segmenter", "teacher-1", 0.3)):
        assert run[name][0] != expected[fp32][0]
        np.testing.assert_allclose(run[name][0], expected[fp32][0], rtol=tolerance, err_msg=name)
    network = create_model(config.cam, 3)
    load_checkpoint(load_run(tmp_path / "run").folder(tmp_path / "run", "cam") / CHECKPOINT, network)
    assert {value.dtype for value in network.state_dict().values()} <= {torch.float32, torch.int64}


def test_the_parts_of_a_batch_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    halves = (slice(0, 1), slice(1, 4))
    logits = torch.randn(4, 3, 6, 6, generator=random)
    mask = torch.randint(0, 3, (4, 12, 12), generator=random).to(torch.uint8)
    mask[0] = 255  # the mean of means would be another
    count = (mask != 255).sum()
    parts = [segmentation_loss(logits[half], mask[half], count) for half in halves]
    torch.testing.assert_close(sum(parts), segmentation_loss(logits, mask))
    targets = torch.rand(4, 3, 6, 6, generator=random)
    targets[0] = 0
    parts = [soft_segmentation_loss(logits[half], targets[half], targets.sum()) for half in halves]
    torch.testing.assert_close(sum(parts), soft_segmentation_loss(logits, targets))
    pairs = pair_targets(mask, 3)
    affinity = torch.rand(pairs[0].shape, generator=random)
    counts = pair_counts(*pairs)
    parts = [affinity_loss(affinity[h], pairs[0][h], pairs[1][h], counts) for h in halves]
    torch.testing.assert_close(sum(parts), affinity_loss(affinity, *pairs))


@pytest.mark.parametrize(
    ("execution", "error", "message"),
    [
        (ExecutionConfig(precision="fp16"), BackendUnavailable, "got fp16 on cpu, expected a GPU"),
        (ExecutionConfig(accumulate=5), UsageError, r"got 4 images for 5 parts .* raise batch_size or lower"),
    ],
)
def test_what_a_machine_or_batch_cannot_do_is_an_error(
    execution: ExecutionConfig, error: type[Exception], message: str
) -> None:
    check_execution(ExecutionConfig(precision="bf16", accumulate=4), Schedule(batch_size=4), 9, torch.device("cpu"))
    with pytest.raises(error, match=message):
        check_execution(execution, Schedule(batch_size=4), 9, torch.device("cpu"))


def test_only_what_changes_a_network_is_part_of_its_stage() -> None:
    assert ExecutionConfig(accumulate=2).identity(has_trained_norms=False) == {}
    assert ExecutionConfig(checkpoint_attention=True, compile=True).identity(has_trained_norms=True) == {}
    changed = ExecutionConfig(precision="bf16", accumulate=2, batch_norm="local")
    assert changed.identity(has_trained_norms=False) == {"execution": {"precision": "bf16"}}
    expected = {"precision": "bf16", "accumulate": 2, "batch_norm": "local"}
    assert changed.identity(has_trained_norms=True) == {"execution": expected}
    assert json.dumps(expected)


def test_gradients_of_fp16_attention_are_finite() -> None:
    # Logits of these features are beyond 65504.
    network = create_model(load_config(str(TINY)).cam, 3)
    layer = network.attention[-1]
    features = torch.full((1, network.backbone.channels[network.taps[-1]], 4, 4), 300.0)
    with torch.autocast("cpu", torch.float16):
        made = layer(features)
    made.square().mean().backward()
    assert torch.isfinite(made).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert os.environ.get("RANK") is None
