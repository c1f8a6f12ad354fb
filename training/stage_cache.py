"""The folder of a run: one folder per stage, named by a digest of everything the stage depends on.

A stage is finished when its folder holds `stage.json` and every file listed there; it is then skipped. Any other
stage is continued, item by item. Another configuration or data set gives another digest and so another folder: stale
results are never reused and nothing is deleted. A file that was changed since, such as a mask that a person corrected,
ends the run with the ways to go on; it is never overwritten.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_json_object, sha256_of_bytes, sha256_of_file, write_json_atomically
from multisa.runtime.progress import format_examples, log, pluralize
from multisa.training.distributed import on_main

# Part of every digest. Raise it when the code of a stage gives other results for the same inputs.
FORMAT = 3
MARKER = "stage.json"
CLOCK = "clock.json"

Results = Mapping[str, Any]  # of a stage: JSON values


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    folder: Path
    digest: str
    results: Results = field(default_factory=dict)
    seconds: float = 0.0


class StageObserver(Protocol):
    """Is told of every stage: when it starts or resumes, and when it is finished, or was already and is skipped."""

    def started(self, name: str, folder: Path) -> None: ...
    def finished(self, stage: Stage, *, skipped: bool) -> None: ...


class StageCache:
    """The stages of one run below `root`."""

    def __init__(self, root: Path, observer: StageObserver | None = None, *, discard_edits: bool = False) -> None:
        """discard_edits: make files again that were changed after their stage was finished."""
        self.root = root
        self.observer = observer
        self.discard_edits = discard_edits
        self.stages: list[Stage] = []  # in the order they were asked for

    def stage(self, name: str, inputs: Mapping[str, Any], after: list[Stage], work: Callable[[Path], Results]) -> Stage:
        """Run `work` in the folder of the stage, unless it is finished already from the same inputs.

        Raises UsageError for a finished stage with changed files, unless the cache discards edits.

        inputs: JSON values that determine the output of the stage; after: the stages it reads. What `work`
        returns is stored as the results of the stage. Every rank calls it and runs `work`; what it returns on rank 0
        counts.
        """
        read = [stage.digest for stage in after]
        identity = {"format": FORMAT, "stage": name, "inputs": inputs, "after": read}
        digest = sha256_of_bytes(json.dumps(identity, sort_keys=True).encode())
        folder = self.root / f"{name}-{digest[:10]}"
        stage = on_main(partial(self._finished, name, folder, digest))
        skipped = stage is not None
        if stage is None:
            seconds = on_main(partial(_start_clock, folder))
            started = time.time()
            if self.observer:
                self.observer.started(name, folder)
            results = work(folder)
            stage = Stage(name, folder, digest, results, seconds + time.time() - started)
            stage = on_main(partial(_complete, stage, inputs))
            log.info(f"{name}: done, {stage.seconds:.0f} s")
        else:
            log.info(f"{name}: skipped, already done with the same inputs")
        self.stages.append(stage)
        if self.observer:
            self.observer.finished(stage, skipped=skipped)
        return stage

    def _finished(self, name: str, folder: Path, digest: str) -> Stage | None:
        """The stage as stored; None when it is not finished, or one of its files is missing or discarded."""
        marker = folder / MARKER
        if not marker.exists():
            return None
        stored = json.loads(marker.read_text(encoding="utf-8"))
        missing = [file for file in stored["files"] if not (folder / file).is_file()]
        edited = [
            file
            for file, sha256 in stored["files"].items()
            if file not in missing and sha256_of_file(folder / file) != sha256
        ]
        if edited and not self.discard_edits:
            raise _edited_error(folder, edited)
        wrong = [*missing, *edited]
        if stored["digest"] == digest and not wrong:
            return Stage(name, folder, digest, stored["results"], stored["seconds"])
        log.info(f"{name}: repeated, {f'{wrong[0]} is missing or changed' if wrong else 'its inputs are different'}")
        marker.unlink()
        for file in edited:
            (folder / file).unlink()
        return None


def load_stage(folder: Path) -> Mapping[str, Any]:
    """Read what was stored about the finished stage in `folder`: its "inputs", "results", "files", .. as JSON values.

    Raises UsageError for a folder without a finished stage.
    """
    stored = read_json_object(folder / MARKER)
    if not stored:
        raise UsageError(f"{folder}: got no finished stage, expected one; run `multisa train` again")
    return stored


def _edited_error(folder: Path, edited: list[str]) -> UsageError:
    masks = any(file.endswith(".png") for file in edited)
    keep = "to keep masks, copy them to a folder, each as ID.png, and give that with --corrections; " if masks else ""
    return UsageError(
        f"{folder}: got {pluralize(len(edited), 'file')} changed after the stage was finished "
        f"({format_examples(edited)}), expected none, and nothing was overwritten: {keep}to drop the changes, delete "
        "these files or use `multisa train --discard-edits`, and the stage makes them again"
    )


def _start_clock(folder: Path) -> float:
    """Seconds of the interrupted attempts; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _seconds_spent(folder)
    write_json_atomically(folder / CLOCK, {"seconds": before, "started": time.time()})
    return before


def _complete(stage: Stage, inputs: Mapping[str, Any]) -> Stage:
    """Write the marker of a stage whose files are all there."""
    paths = [path for path in sorted(stage.folder.iterdir()) if path.name not in (MARKER, CLOCK)]
    record = {"digest": stage.digest, "inputs": inputs, "seconds": stage.seconds, "results": stage.results}
    files = {path.name: sha256_of_file(path) for path in paths}
    write_json_atomically(stage.folder / MARKER, {**record, "files": files})
    return stage


def _seconds_spent(folder: Path) -> float:
    """Seconds of the interrupted attempts, each counted until it wrote its last file."""
    path = folder / CLOCK
    if not path.exists():
        return 0.0
    clock = json.loads(path.read_text(encoding="utf-8"))
    last_written = max(file.stat().st_mtime for file in folder.iterdir())
    return float(clock["seconds"]) + max(last_written - float(clock["started"]), 0.0)
