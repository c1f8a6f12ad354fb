"""A run's folder: one folder a stage, named by the digest of all it was made from.

A stage whose folder holds `stage.json`, and every file it lists as it was written, is done and is skipped;
any other is gone on with, item by item. A changed configuration or data set gives another digest and so
another folder: nothing stale is reused and nothing is deleted.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multisa.runtime.files import sha256_of_bytes, sha256_of_file, write_json_atomically
from multisa.runtime.progress import log

# Part of every digest: raise it when a stage's code comes to mean something else by the same inputs.
FORMAT = 2
MARKER, CLOCK = "stage.json", "clock.json"


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
        digest = stage_digest(name, inputs, [stage.digest for stage in after])
        folder = self.root / f"{name}-{digest[:10]}"
        stage = _finished(name, folder, digest)
        if stage is None:
            folder.mkdir(parents=True, exist_ok=True)
            before, started = _spent(folder), time.time()
            write_json_atomically(folder / CLOCK, {"seconds": before, "started": started})
            results = work(folder)
            seconds = before + time.time() - started
            stage = Stage(name, folder, digest, results, seconds)
            made = {"digest": digest, "inputs": inputs, "seconds": seconds, "results": results}
            write_json_atomically(folder / MARKER, {**made, "files": _files(folder)})
            log.info(f"{name}: done, {seconds:.0f} s")
        else:
            log.info(f"{name}: made already from the same inputs")
        self.stages.append(stage)
        return stage


def stage_digest(name: str, inputs: Mapping[str, Any], after: list[str]) -> str:
    """Digest of everything a stage is made from: its name, its inputs, the digests of the stages it reads."""
    described = {"format": FORMAT, "stage": name, "inputs": inputs, "after": after}
    return sha256_of_bytes(json.dumps(described, sort_keys=True).encode())


def _finished(name: str, folder: Path, digest: str) -> Stage | None:
    """The stage as it was kept; None when it is not done, or when one of its files is gone or altered."""
    marker = folder / MARKER
    if not marker.exists():
        return None
    kept = json.loads(marker.read_text(encoding="utf-8"))
    wrong = [
        file
        for file, sha256 in kept["files"].items()
        if not (folder / file).is_file() or sha256_of_file(folder / file) != sha256
    ]
    if kept["digest"] == digest and not wrong:
        return Stage(name, folder, digest, kept["results"], kept["seconds"])
    log.info(
        f"{name}: made again, {f'{wrong[0]} is gone or altered' if wrong else 'it was of another digest'}"
    )
    marker.unlink()
    for file in wrong:
        (folder / file).unlink(missing_ok=True)
    return None


def _files(folder: Path) -> dict[str, str]:
    own = (MARKER, CLOCK)
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name not in own}


def _spent(folder: Path) -> float:
    """Seconds that interrupted attempts have cost: each until it wrote its last file."""
    path = folder / CLOCK
    if not path.exists():
        return 0.0
    clock = json.loads(path.read_text(encoding="utf-8"))
    last_written = max(file.stat().st_mtime for file in folder.iterdir())
    return float(clock["seconds"]) + max(last_written - float(clock["started"]), 0.0)
