"""A run's folder: one folder a stage, named by the digest of all it was made from.

A stage whose folder holds `stage.json` is done and is skipped; one without is gone on with, item by item.
A changed configuration or data set gives another digest and so another folder: nothing stale is reused and
nothing is deleted.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multisa.runtime.files import sha256_of_bytes, sha256_of_file, write_json_atomically
from multisa.runtime.progress import say
from multisa.training.data import DataSet


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    folder: Path
    digest: str
    results: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Workspace:
    """The stages of one run below `root`."""

    def __init__(self, root: Path) -> None:
        """Stages are kept in folders below `root`."""
        self.root = root
        self.stages: list[Stage] = []

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        after: list[Stage],
        work: Callable[[Path], Mapping[str, Any]],
    ) -> Stage:
        """Run `work` in the stage's folder, unless it is done already from the same inputs.

        inputs: JSON values that determine the stage's output; `after`: the stages it reads. What `work`
        returns is kept as the stage's results.
        """
        described = {"stage": name, "inputs": inputs, "after": [stage.digest for stage in after]}
        digest = sha256_of_bytes(json.dumps(described, sort_keys=True).encode())
        folder = self.root / f"{name}-{digest[:10]}"
        marker = folder / "stage.json"
        if marker.exists():
            kept = json.loads(marker.read_text())
            stage = Stage(name, folder, digest, kept["results"], kept["seconds"])
            say(f"{name}: made already from the same inputs")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            before = _spent_seconds(folder)
            started = time.perf_counter()
            try:
                results = work(folder)
            finally:
                seconds = before + time.perf_counter() - started
                # What an interrupted stage has cost so far belongs to its time, too.
                write_json_atomically(folder / "spent.json", {"seconds": seconds})
            stage = Stage(name, folder, digest, results, seconds)
            write_json_atomically(
                marker, {**described, "digest": digest, "seconds": seconds, "results": results}
            )
            say(f"{name}: done, {seconds:.0f} s")
        self.stages.append(stage)
        return stage


def dataset_digest(dataset: DataSet) -> str:
    """Digest of the lists, the image-level labels and every byte of the photographs and masks."""
    items = {item.id: item for item in (*dataset.weak, *dataset.val)}
    described = {
        "classes": dataset.class_names,
        "weak": [item.id for item in dataset.weak],
        "train": [item.id for item in dataset.train],
        "val": [item.id for item in dataset.val],
        "items": {
            item.id: [
                sha256_of_file(item.image),
                list(item.classes),
                sha256_of_file(item.mask) if item.mask else None,
            ]
            for item in items.values()
        },
    }
    return sha256_of_bytes(json.dumps(described, sort_keys=True).encode())


def _spent_seconds(folder: Path) -> float:
    path = folder / "spent.json"
    return float(json.loads(path.read_text())["seconds"]) if path.exists() else 0.0
