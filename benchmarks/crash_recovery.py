"""Runs killed with SIGKILL at random moments, resumed, and compared with an uninterrupted run.

    python benchmarks/crash_recovery.py                    # 100 kills, minutes
    python benchmarks/crash_recovery.py --command label

Every file outside OUT/.multisa and the report must be byte-identical to the uninterrupted run's, and no file
of a shard that was committed before the kill may be written again. A quarter of the kills each falls at any
moment, while the image list is written, between the first and the last commit, and near the end, where files
of the whole run are written. A run that ends before its kill does not count. Also measured: reading the
journal of millions of images, as each run does at its start. Writes benchmarks/results/crash_recovery.json.
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from multisa.benchmarks.harness import CLI, environment, interleave, make_parser, save_results
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.demo import IMAGES as DEMO_IMAGES
from multisa.runtime.jobs.finalize import FINALIZED
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.output import CONFIG, JOURNAL, LOCK, SNAPSHOT
from multisa.runtime.jobs.shards import FILES, listed_files, part_path

IMAGES = 120
SHARD_SIZE = 7
SHARDS = -(-IMAGES // SHARD_SIZE)
WRITERS = ("masks", "tar", "coco")
MOMENTS = ("any", "snapshot", "shards", "finishing")
_RUN_SECONDS = 120.0  # limit of one run


@dataclass
class CrashCounts:
    """What happened after the kills."""

    points: int = 0  # kills that hit a running process
    identical: int = 0
    recomputed: int = 0  # files of committed shards written again, or journal lines that occur twice
    runs: int = 0
    phases: Counter[str] = field(default_factory=Counter)  # in which the kills fell


def make_images(folder: Path, images: int = IMAGES) -> None:
    """Crops of the packaged images as small JPEGs in a few sizes; two files are damaged."""
    random_numbers = random.Random(0)
    originals = [Image.open(path).convert("RGB") for path in sorted(DEMO_IMAGES.glob("*.jpg"))]
    paths = [folder / f"{i % 5}" / f"{i:04d}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        image = originals[i % len(originals)]
        width, height = 64 + 8 * (i % 3), 64 + 8 * (i % 2)
        x, y = random_numbers.randrange(image.width - width), random_numbers.randrange(image.height - height)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((x, y, x + width, y + height)).save(path)
    for path in sorted(paths)[10 : images : images // 2]:
        path.write_bytes(path.read_bytes()[:100])


def public_bytes(out: Path) -> dict[str, bytes]:
    """Everything that must be the same in every run."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    private = (".multisa", "report.html", "report")
    return {str(path): (out / path).read_bytes() for path in files if path.parts[0] not in private}


class KilledRuns:
    """Runs of one command over the same images, each into its own folder below `work`."""

    def __init__(self, work: Path, command: str, bundle: Path, *, seed: int = 0) -> None:
        """Make the images and do the uninterrupted run, whose duration is measured."""
        self._random = random.Random(seed)
        self._work = work
        self._number = 0
        make_images(work / "images")
        options = ("--shard-size", SHARD_SIZE, "--writer", ",".join(WRITERS), "--workers", 2, "--batch", 3)
        words = (command, work / "images", "--bundle", bundle, "--max-failures", "10%", "--report-images", 0)
        self._command = [sys.executable, *CLI, *map(str, (*words, *options)), "-o"]
        out = work / "uninterrupted"
        with self._process(out) as process:
            _wait(process, (out / LOCK).exists)
            start = time.perf_counter()
            _end(process)
            self.seconds = time.perf_counter() - start  # from the lock to the end
        self.expected = public_bytes(out)

    def kill(self, points: int, kills_per_run: int) -> CrashCounts:
        """Kill until `points` kills have hit; each run is killed up to `kills_per_run` times."""
        found = CrashCounts()
        while found.points < points:
            out = self._work / f"killed-{self._number}"
            self._number += 1
            kills = 0
            files: dict[Path, tuple[int, int]] = {}
            for _ in range(min(kills_per_run, points - found.points)):
                if not self._kill_once(out, self._random.choice(MOMENTS)):
                    break
                kills += 1
                found.phases[phase(out)] += 1
                files = {**files_of_committed_shards(out), **files}
            with self._process(out) as process:
                _end(process)
            found.points += kills
            found.runs += 1
            found.identical += kills * (public_bytes(out) == self.expected)
            found.recomputed += sum(identity(path) != before for path, before in files.items())
            shards = committed(out)
            found.recomputed += len(shards) - len(set(shards))
        return found

    def _kill_once(self, out: Path, moment: str) -> bool:
        """Whether the kill came before the end of the run."""
        # The condition after which to kill, and the longest delay in seconds after it.
        condition, longest = {
            "any": ((out / LOCK).exists, self.seconds),
            "snapshot": (lambda: any((out / f"{SNAPSHOT}{end}").exists() for end in ("", ".tmp")), 0.03),
            "shards": (lambda: len(committed(out)) >= 1, self.seconds / 2),
            "finishing": (lambda: len(committed(out)) >= SHARDS, 0.015),
        }[moment]
        with self._process(out) as process:
            _wait(process, condition)
            time.sleep(self._random.uniform(0, longest))
            process.kill()
            return process.wait() < 0

    @contextlib.contextmanager
    def _process(self, out: Path) -> "Iterator[subprocess.Popen[bytes]]":
        words = [*self._command, str(out)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()


def _wait(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def _end(process: "subprocess.Popen[bytes]") -> None:
    _, stderr = process.communicate(timeout=_RUN_SECONDS)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {stderr.decode()}")


def phase(out: Path) -> str:
    """Where in a run a kill fell."""
    if not (out / CONFIG).exists():
        return "snapshot"
    shards = len(committed(out))
    if shards < SHARDS:
        return "shards" if shards else "before the first commit"
    return "end" if (out / FINALIZED).exists() else "finishing"


def committed(out: Path) -> list[int]:
    """The shards in the journal, without a line that was cut off."""
    journal = out / JOURNAL
    whole, _, _ = journal.read_bytes().rpartition(b"\n") if journal.exists() else (b"", b"", b"")
    return [json.loads(line)["shard"] for line in whole.splitlines()]


def files_of_committed_shards(out: Path) -> dict[Path, tuple[int, int]]:
    """Identity of every file of the shards in the journal."""
    parts = (out / part_path(FILES, shard) for shard in committed(out))
    return {out / file: identity(out / file) for part in parts for file, _ in listed_files(part)}


def identity(path: Path) -> tuple[int, int]:
    """Inode and modification time: different once the file is written again."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def journal_seconds(work: Path, images: int) -> dict[str, float]:
    """Seconds per million images to read the journal of a run that lacks its last shard, by shard size."""
    cases: dict[str, Callable[[], object]] = {}
    for size in (256, 1):  # the default, and a line for each image
        path = work / f"journal-{size}.jsonl"
        with path.open("wb") as lines:
            for shard in range(images // size - 1):
                lines.write(ShardResult(shard, size, 0, 1_000_000, "0123456789abcdef" * 4).line())
        cases[str(size)] = partial(_open_journal, path)
    times = interleave(cases, repeats=5)
    return {size: round(taken.median * 1_000_000 / images, 5) for size, taken in times.items()}


def _open_journal(path: Path) -> None:
    with Journal(path) as journal:
        assert not journal.torn and journal.shards


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, compare, write the results file."""
    parser = make_parser(__doc__)
    parser.add_argument("--points", type=int, default=100, help="number of kills")
    parser.add_argument("--kills-per-run", type=int, default=1)
    parser.add_argument("--command", choices=("segment", "label"), default="segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal-images", type=int, default=10_000_000, help="images of the journal")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        runs = KilledRuns(Path(work), options.command, default_bundle_path(), seed=options.seed)
        found = runs.kill(options.points, options.kills_per_run)
        read = journal_seconds(Path(work), options.journal_images)
    results = {
        "environment": environment("onnxruntime"),
        "command": options.command,
        "seed": options.seed,
        "writers": WRITERS,
        "images": IMAGES,
        "shard_size": SHARD_SIZE,
        "files": len(runs.expected),
        "uninterrupted_seconds": round(runs.seconds, 3),
        **vars(found),
        "journal": {"images": options.journal_images, "seconds_for_a_million_images": read},
    }
    save_results("crash_recovery", results, options.results)
    if found.identical < found.points or found.recomputed:
        raise SystemExit(f"{found}: expected {found.points} identical, none recomputed")


if __name__ == "__main__":
    main()
