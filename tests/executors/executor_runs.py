"""What the tests of executors share: a corpus of many small images, runs over it, and what they leave."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job, RunOptions, make_job
from multisa.runtime.jobs.worker import Executor, ExecutorFactory

SHARD = 5
IMAGES = 150
SHARDS = IMAGES // SHARD


def write_corpus(folder: Path, images: int = IMAGES) -> Path:
    """Grey ramps of a few sizes, every fiftieth no image at all."""
    folder.mkdir()
    for i in range(images):
        if i % 50 == 7:
            (folder / f"{i:04d}.png").write_bytes(b"this is no image")
        else:
            ramp = Image.linear_gradient("L").resize((60 + 4 * (i % 3), 48)).rotate(i)
            ramp.convert("RGB").save(folder / f"{i:04d}.png")
    return folder


def segment(
    source: Path, out: Path, bundle: Bundle, make_executor: ExecutorFactory, *, backend: str = "auto"
) -> RunSummary:
    options = RunOptions(workers=2, shard_size=SHARD, writers=("masks", "coco"), report_images=0)
    job = make_job("segment", str(source), out, bundle.path, BackendRequest(backend), options)
    return run(job, options, make_executor)


def results(out: Path) -> dict[str, bytes]:
    """Every byte that must not differ between two runs: the results, and the parts they are made of."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    kept = (f for f in files if f.parts[0] not in (".multisa", "report.html") or f.parts[1:2] == ("parts",))
    return {file.as_posix(): (out / file).read_bytes() for file in kept}


def journalled(out: Path) -> list[int]:
    """Shards in the task of the journal."""
    return [json.loads(line)["shard"] for line in (out / ".multisa/journal.jsonl").read_text().splitlines()]


def descendants(process: int) -> list[int]:
    """Processes that `process` has started, and those that these have."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if after_name[0] != "Z":
            parents[int(folder.name)] = int(after_name[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def title(process: int) -> str:
    """Its command line, or what it calls itself; "" for one that is no more."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def disturbed(make_executor: ExecutorFactory, after: int, disturb: Callable[[], None]) -> ExecutorFactory:
    """An executor to which something happens, once, as soon as so many shards are committed."""

    def open_disturbed(job: Job, monitor: RunMonitor) -> Executor:
        executor = make_executor(job, monitor)
        run_all = executor.run

        def run_disturbed(shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
            count = 0
            if after == 0:
                disturb()

            def note(result: ShardResult) -> None:
                nonlocal count
                on_commit(result)
                count += 1
                if count == after:
                    disturb()

            run_all(shards, note)

        executor.run = run_disturbed  # type: ignore[method-assign]
        return executor

    return open_disturbed
