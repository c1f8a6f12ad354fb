"""Training in PyTorch: from image-level labels to a trained segmenter, and the networks on their own.

    from pathlib import Path
    from multisa.training import create_model, load_config, read_dataset, train

    if __name__ == "__main__":  # the processes that load samples import this script
        config = load_config("lite0", ["cam.schedule.epochs=4"])
        run = train(config, read_dataset(Path("VOC2012")), Path("runs/voc"))
        print(run.format_table())

        segmenter = create_model(config.segmenter, n_classes=21)

`load_config` reads a preset or a TOML file into a `TrainConfig`, `read_dataset` a folder into a `Dataset`,
`add_corrections` adds masks that people corrected, and `check_dataset` decodes all files and counts what is there.
`train` runs every stage and returns a `RunRecord`, which `load_run` reads again from the output folder.
`create_model` builds one network. `reproduce_paper` makes the tables and figures of the paper. Importing this package
loads nothing else; each name loads its module, and with it torch where needed, when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multisa.training.config import TrainConfig, load_config
    from multisa.training.corrections import add_corrections
    from multisa.training.data import Dataset, read_dataset
    from multisa.training.data_check import DatasetReport, check_dataset
    from multisa.training.models import create_model
    from multisa.training.pipeline import train
    from multisa.training.reproduce.command import reproduce_paper
    from multisa.training.run_record import RunRecord, load_run

__all__ = [
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

_MODULES = {
    "config": ("TrainConfig", "load_config"),
    "corrections": ("add_corrections",),
    "data": ("Dataset", "read_dataset"),
    "data_check": ("DatasetReport", "check_dataset"),
    "models": ("create_model",),
    "pipeline": ("train",),
    "reproduce.command": ("reproduce_paper",),
    "run_record": ("RunRecord", "load_run"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
