"""kill -9 at any moment, then the same command: every byte as if nothing had been, no shard done twice."""

from pathlib import Path

import pytest

from multisa.benchmarks import crash_recovery
from multisa.runtime.bundle import Bundle

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["segment", "label"])
def test_killed_runs(bundle: Bundle, tmp_path: Path, command: str) -> None:
    runs = crash_recovery.KilledRuns(tmp_path, command, bundle.path, seed=len(command))
    assert {"labels.jsonl", "failed.jsonl", "coco/annotations/instances_default.json", "masks/0/0000.png"} <= set(
        runs.expected
    )
    assert sum(path.startswith("masks/") for path in runs.expected) == crash_recovery.IMAGES - 2
    found = runs.kill(points=4, kills_per_run=4)
    assert (found.points, found.identical, found.recomputed) == (4, 4, 0)
    assert sum(found.phases.values()) == 4
