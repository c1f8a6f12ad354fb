"""Runs side by side, the list of runs, and removing stages that a run no longer uses."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from multisa.runtime.errors import UsageError
from multisa.runtime.files import lock_file, read_json_object, sha256_of_file
from multisa.runtime.records import record_to_dict
from multisa.training.run_record import RUN_RECORD, RunRecord, load_run
from multisa.training.stage_cache import CLOCK, MARKER

LOCK = "train.lock"  # in the run folder, held while a training runs
STAGE_FOLDER = re.compile(r"[a-z][a-z0-9-]*-[0-9a-f]{10}")
REPRODUCE = "reproduce"  # folder below a run that may hold a record of its own, which uses stages of the run


@contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a run folder. Raises UsageError if it is missing, or another process holds the lock."""
    if not root.is_dir():
        raise UsageError(f"{root}: not a folder, expected the output folder of `multisa train`")
    try:
        with lock_file(root / LOCK):
            yield
    except BlockingIOError as error:
        raise UsageError(
            f"{root}: a training is running in this folder; wait for its end, stop it, or choose another folder"
        ) from error


def is_running(root: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    try:
        if (root / LOCK).is_file():
            with lock_file(root / LOCK):
                pass
    except BlockingIOError:
        return True
    except OSError:  # a folder that may only be read
        pass
    return False


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in `folder`, or `folder` itself if it is one, the newest last, as JSON values.

    Each has its "folder", "state" (running, finished or unfinished), "bytes", "miou" of the deployed segmenter on val
    in percent or None, and the "date" of its last stage. Raises UsageError for a folder that does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder, expected one with runs of `multisa train`")
    roots = [folder] if _is_run(folder) else [path for path in sorted(folder.iterdir()) if _is_run(path)]
    return sorted(map(_entry, roots), key=lambda entry: str(entry["date"]))


def _is_run(root: Path) -> bool:
    return root.is_dir() and ((root / RUN_RECORD).is_file() or bool(_stage_folders(root)))


def _entry(root: Path) -> dict[str, Any]:
    record = read_json_object(root / RUN_RECORD)
    marks = [root / RUN_RECORD, *(path / name for path in _stage_folders(root) for name in (MARKER, CLOCK))]
    newest = max(path.stat().st_mtime for path in marks if path.is_file())
    return {
        "folder": str(root),
        "state": "running" if is_running(root) else "finished" if record else "unfinished",
        "bytes": sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink()),
        "miou": next((row["miou"] for row in record.get("rows", ()) if row["measured_on"] == "val"), None),
        "date": datetime.fromtimestamp(newest).isoformat(" ", "minutes"),
    }


def format_runs(entries: Sequence[Mapping[str, Any]]) -> str:
    """The list as a table."""
    rows = [(e["folder"], e["state"], _megabytes(e["bytes"]), _number(e["miou"]), e["date"]) for e in entries]
    return _table(("run", "state", "size", "val mIoU", "last stage"), rows) if rows else "no runs here"


@dataclass(frozen=True)
class Unused:
    """A stage folder that no record of the run names."""

    path: Path
    bytes: int
    changed: tuple[str, ...]  # files that the stage did not write, or that were edited since: such a folder is kept
    is_finished: bool = True  # a training that was interrupted is kept, because it can be resumed

    @property
    def kept_because(self) -> str:
        """Why the folder is kept; "" if it is not."""
        if not self.is_finished:
            return "it is not finished, and the same command resumes it"
        return f"{self.changed[0]} was changed or added by hand" if self.changed else ""


def unused_stages(root: Path) -> list[Unused]:
    """Stage folders of a finished run that its record does not use: those of other settings or data.

    Tables and figures in the folder use theirs, too. Raises UsageError for a folder without a finished run.
    """
    used = {stage.folder for stage in load_run(root).stages}
    for record in sorted((root / REPRODUCE).glob("*.json")):  # tables and figures name the stages that they show
        used |= set(STAGE_FOLDER.findall(record.read_text(encoding="utf-8", errors="replace")))
    unused = [path for path in _stage_folders(root) if path.name not in used]
    return [
        Unused(path, sum(f.stat().st_size for f in path.iterdir()), _changed(path), (path / MARKER).is_file())
        for path in unused
    ]


def _stage_folders(root: Path) -> list[Path]:
    folders = [path for path in sorted(root.iterdir()) if STAGE_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return [path for path in folders if (path / MARKER).is_file() or (path / CLOCK).is_file()]


def _changed(folder: Path) -> tuple[str, ...]:
    stored = read_json_object(folder / MARKER).get("files")  # None if interrupted: nothing says what its files were
    files = [path for path in sorted(folder.iterdir()) if path.name not in (MARKER, CLOCK)]
    return tuple(
        f.name for f in files if not f.is_file() or (stored is not None and stored.get(f.name) != sha256_of_file(f))
    )


def describe_unused(stages: Sequence[Unused]) -> str:
    """What `remove_stages` would remove and keep, one line each."""
    removed, kept = ([stage for stage in stages if bool(stage.kept_because) == is_kept] for is_kept in (False, True))
    total = _megabytes(sum(stage.bytes for stage in removed))
    lines = [f"stages that {RUN_RECORD} does not use, {total} in all:" if removed else "no stage to remove"]
    lines += [f"  {stage.path.name}  {_megabytes(stage.bytes)}" for stage in removed]
    lines += [f"kept: {stage.path.name}, because {stage.kept_because}" for stage in kept]
    return "\n".join(lines)


def remove_stages(stages: Sequence[Unused]) -> int:
    """Remove the folders of finished, unused stages without changed files; returns how many."""
    removed = [stage for stage in stages if not stage.kept_because]
    for stage in removed:
        (stage.path / MARKER).unlink(missing_ok=True)  # first: half a folder must not count as a finished stage
        shutil.rmtree(stage.path)
    return len(removed)


def compare_runs(roots: Sequence[Path]) -> dict[str, Any]:
    """Finished runs side by side, as JSON values.

    "settings": those that differ, with a value for each run; "stages": seconds and mIoU in percent of each stage;
    "results": mIoU of each row of the results. Values are in the order of `roots`; None where a run has none.
    Raises UsageError for fewer than two runs, and for a folder without a finished run.
    """
    if len(roots) < 2:
        raise UsageError(f"got {len(roots)} run, expected two or more to compare")
    runs = [load_run(root) for root in roots]
    settings = [{**flat_settings(record_to_dict(run.config)), **_data(run)} for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    stages = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    rows = list(dict.fromkeys((row.stage, row.measured_on) for run in runs for row in run.rows))
    seconds = [{stage.name: stage.seconds for stage in run.stages} for run in runs]
    miou = [_stage_miou(root, run) for root, run in zip(roots, runs, strict=True)]
    results = [{(row.stage, row.measured_on): row.miou for row in run.rows} for run in runs]
    differing = {key: [values.get(key) for values in settings] for key in keys}
    return {
        "runs": [str(root) for root in roots],
        "settings": {key: values for key, values in differing.items() if any(v != values[0] for v in values)},
        "stages": [
            {"stage": name, "seconds": [s.get(name) for s in seconds], "miou": [m.get(name) for m in miou]}
            for name in stages
        ],
        "seconds": [run.seconds for run in runs],
        "results": [{"stage": s, "measured_on": on, "miou": [r.get((s, on)) for r in results]} for s, on in rows],
    }


def format_comparison(found: Mapping[str, Any]) -> str:
    """The comparison as text."""
    names = [f"run {number}" for number in range(1, len(found["runs"]) + 1)]
    parts = [f"{name}  {run}" for name, run in zip(names, found["runs"], strict=True)]
    settings = [(key, *map(json.dumps, values)) for key, values in found["settings"].items()]
    parts += ["", _table(("settings that differ", *names), settings) if settings else "no setting differs"]
    stages = [
        (s["stage"], *(f"{_number(t)} s {_number(m):>6}" for t, m in zip(s["seconds"], s["miou"], strict=True)))
        for s in found["stages"]
    ]
    total = ("in all", *(f"{_number(seconds)} s {'':>6}" for seconds in found["seconds"]))
    parts += ["", _table(("stage, mIoU", *names), [*stages, total])]
    results = [(f"{row['stage']} ({row['measured_on']})", *map(_number, row["miou"])) for row in found["results"]]
    return "\n".join([*parts, *(["", _table(("mIoU", *names), results)] if results else [])])


def _data(run: RunRecord) -> dict[str, Any]:
    return {"(data)": run.data_digest[:10], "(classes)": list(run.classes), "(images)": run.images.train_images}


def _stage_miou(root: Path, run: RunRecord) -> dict[str, float]:
    """mIoU of the stages that measured one; a stage whose folder is gone has none."""
    found = {}
    for stage in run.stages:
        results = read_json_object(root / stage.folder / MARKER).get("results", {})
        miou = results.get("best", results).get("miou")
        if miou is not None:
            found[stage.name] = miou
    return found


def flat_settings(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by their whole key, such as "cam.schedule.epochs"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width; all but the first are right-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if column == 0 else '>'}{widths[column]}}" for column, cell in enumerate(row)).rstrip()
        for row in (head, *rows)
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
