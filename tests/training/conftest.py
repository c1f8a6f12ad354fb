"""Shared by the tests of training: one small finished run, to be copied before anything is written to it."""

from pathlib import Path

import pytest

from multisa.training.config import load_config
from multisa.training.data import read_dataset
from multisa.training.pipeline import train


@pytest.fixture(scope="session")
def tiny_run(voc_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of tiny.toml on the synthetic images."""
    root = tmp_path_factory.mktemp("tiny") / "run"
    train(load_config(str(Path(__file__).with_name("tiny.toml"))), read_dataset(voc_folder), root)
    return root
