"""Runs that are killed with SIGKILL at random moments, resumed, and compared with one that was not.

    python benchmarks/kills.py                    # 100 points, minutes
    python benchmarks/kills.py --command label

Every file outside OUT/.multisa and the page must be the same bytes as in the run that was not killed, and no
file of a shard that was committed when the kill came may have been written again. A quarter of the points
fall anywhere, a quarter into the freezing of the list of images, a quarter between the first commit and the
last, and a quarter about the end, where what is one file for the whole run is written. A run that ends before
its kill is counted as no point.
"""

import argparse
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
from pathlib import Path
from typing import Any

from PIL import Image

from multisa.benchmarks.harness import environment, save_results
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.jobs.finalize import FINALIZED
from multisa.runtime.jobs.output import CONFIG, JOURNAL, LOCK, SNAPSHOT
from multisa.runtime.jobs.shards import FILES, listed_files, part_path

PHOTOGRAPHS = default_bundle_path().parents[1] / "demo_images"
IMAGES, SHARD_SIZE = 120, 7
SINKS = ("masks", "tar", "coco")
MOMENTS = ("any", "freezing", "shards", "finishing")
_PATIENCE = 120.0  # seconds for one run


@dataclass
class Points:
    """What came of the kills."""

    points: int = 0
    identical: int = 0
    recomputed: int = 0  # files of committed shards that were written again, lines that are there twice
    runs: int = 0
    phases: Counter[str] = field(default_factory=Counter)  # in which the kill came


def make_photographs(folder: Path, images: int = IMAGES) -> None:
    """Pieces of the photographs of the package as small JPEGs in a few sizes; two files are damaged."""
    random_numbers = random.Random(0)
    folder.mkdir(parents=True)
    whole = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    for i in range(images):
        photograph, width, height = whole[i % len(whole)], 64 + 8 * (i % 3), 64 + 8 * (i % 2)
        x = random_numbers.randrange(photograph.width - width)
        y = random_numbers.randrange(photograph.height - height)
        path = folder / f"{i % 5}" / f"{i:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photograph.crop((x, y, x + width, y + height)).save(path)
    for path in sorted(folder.glob("*/*.jpg"))[10 : images : images // 2]:
        path.write_bytes(path.read_bytes()[:100])


def public_bytes(out: Path) -> dict[str, bytes]:
    """Everything that must be the same in every run."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    private = (".multisa", "report.html", "report")
    return {str(path): (out / path).read_bytes() for path in files if path.parts[0] not in private}


class KilledRuns:
    """Runs of one command over the same photographs, each into a folder of its own below `work`."""

    def __init__(self, work: Path, command: str, bundle: Path, *, seed: int = 0) -> None:
        """Make the photographs and do the run that is not killed, which is measured."""
        self._random = random.Random(seed)
        self._work, self._names = work, iter(range(10**6))
        make_photographs(work / "photographs")
        options = (
            "--shard-size",
            SHARD_SIZE,
            "--writer",
            ",".join(SINKS),
            "--workers",
            2,
            "--batch",
            3,
            "--report-images",
            0,
        )
        place = (command, work / "photographs", "--bundle", bundle, "--max-failures", "10%")
        self._command = [
            sys.executable,
            "-m",
            "multisa.runtime.cli.main",
            *map(str, (*place, *options)),
            "-o",
        ]
        unbroken = work / "unbroken"
        with self._process(unbroken) as process:
            self._wait(process, (unbroken / LOCK).exists)
            start = time.perf_counter()
            self._end(process)
            self.seconds = time.perf_counter() - start  # from the lock to the end
        self.expected = public_bytes(unbroken)

    def kill(self, points: int, kills_of_a_run: int) -> Points:
        """Kill until there are so many points; each run is killed up to `kills_of_a_run` times."""
        found = Points()
        while found.points < points:
            out = self._work / f"killed-{next(self._names)}"
            kills, committed = 0, dict[Path, tuple[int, int]]()
            for _ in range(min(kills_of_a_run, points - found.points)):
                if not self._kill_once(out, MOMENTS[self._random.randrange(len(MOMENTS))]):
                    break
                kills += 1
                found.phases[phase(out)] += 1
                committed = {**files_of_committed_shards(out), **committed}
            with self._process(out) as process:
                self._end(process)
            found.points += kills
            found.runs += 1
            found.identical += kills * (public_bytes(out) == self.expected)
            found.recomputed += sum(identity(path) != then for path, then in committed.items())
            lines = (out / JOURNAL).read_bytes().splitlines()
            found.recomputed += len(lines) - len({json.loads(line)["shard"] for line in lines})
        return found

    def _kill_once(self, out: Path, moment: str) -> bool:
        """Whether the kill came before the end of the run."""
        shards = -(-IMAGES // SHARD_SIZE)

        begins: dict[str, Callable[[], bool]] = {
            "any": (out / LOCK).exists,
            "freezing": lambda: any((out / f"{SNAPSHOT}{end}").exists() for end in ("", ".tmp")),
            "shards": lambda: committed_shards(out) >= 1,
            "finishing": lambda: committed_shards(out) >= shards,
        }
        longest = {"any": self.seconds, "freezing": 0.03, "shards": self.seconds / 2, "finishing": 0.015}[
            moment
        ]
        with self._process(out) as process:
            self._wait(process, begins[moment])
            time.sleep(self._random.uniform(0, longest))  # of seconds
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

    def _wait(self, process: "subprocess.Popen[bytes]", begun: Callable[[], bool]) -> None:
        while process.poll() is None and not begun():
            time.sleep(0.0005)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        _, said = process.communicate(timeout=_PATIENCE)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {said.decode()}")


def phase(out: Path) -> str:
    """Where a kill has met a run."""
    if not (out / CONFIG).exists():
        return "freezing"
    committed = committed_shards(out)
    if committed < -(-IMAGES // SHARD_SIZE):
        return "shards" if committed else "before the first commit"
    return "end" if (out / FINALIZED).exists() else "finishing"


def committed_shards(out: Path) -> int:
    """How many lines the journal has."""
    journal = out / JOURNAL
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def files_of_committed_shards(out: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file of the shards that the journal has."""
    journal = out / JOURNAL
    whole, _, _ = journal.read_bytes().rpartition(b"\n") if journal.exists() else (b"", b"", b"")
    shards = [json.loads(line)["shard"] for line in whole.splitlines()]
    parts = (out / part_path(FILES, shard) for shard in shards)
    files = (out / relative for part in parts for relative, _ in listed_files(part))
    return {path: identity(path) for path in files}


def identity(path: Path) -> tuple[int, int]:
    """Another one once the file was written again."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, compare, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--kills-of-a-run", type=int, default=1)
    parser.add_argument("--command", choices=("segment", "label"), default="segment")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        runs = KilledRuns(Path(work), options.command, default_bundle_path(), seed=options.seed)
        found = runs.kill(options.points, options.kills_of_a_run)
    result: dict[str, Any] = {
        "environment": environment("onnxruntime"),
        "command": options.command,
        "images": IMAGES,
        "shard_size": SHARD_SIZE,
        "writers": SINKS,
        "seed": options.seed,
        "unbroken_seconds": round(runs.seconds, 3),
        "files": len(runs.expected),
        "points": found.points,
        "identical": found.identical,
        "recomputed": found.recomputed,
        "phases": dict(sorted(found.phases.items())),
    }
    save_results("kills", result)
    if found.identical < found.points or found.recomputed:
        raise SystemExit(f"{found}: expected {found.points} identical, none recomputed")


if __name__ == "__main__":
    main()
