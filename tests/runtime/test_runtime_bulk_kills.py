"""kill -9 at any moment, then the same command: every byte as if nothing had been, no shard done twice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from multisa.runtime.bundle import Bundle

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kills.py, which does the same many times over."""
    monkeypatch.syspath_prepend(FOLDER)
    specification = importlib.util.spec_from_file_location("kills_benchmark", FOLDER / "kills.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "kills_benchmark", module)
    specification.loader.exec_module(module)
    sys.modules.pop("harness")
    return module


@pytest.mark.parametrize("command", ["segment", "label"])
def test_killed_runs(kills: ModuleType, bundle: Bundle, tmp_path: Path, command: str) -> None:
    runs = kills.KilledRuns(tmp_path, command, bundle.path, seed=len(command))
    assert {
        "labels.jsonl",
        "failed.jsonl",
        "coco/annotations/instances_default.json",
        "masks/0/0000.png",
    } <= set(runs.expected)
    assert sum(path.startswith("masks/") for path in runs.expected) == kills.IMAGES - 2
    found = runs.kill(points=4, kills_of_a_run=4)
    assert (found.points, found.identical, found.recomputed) == (4, 4, 0)
    assert sum(found.phases.values()) == 4
