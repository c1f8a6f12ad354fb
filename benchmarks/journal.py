"""Opening a run of millions: its list of images written once, its journal read at every start.

Writes benchmarks/results/journal.json.

    python benchmarks/journal.py [--images 10000000]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from multisa.benchmarks.harness import environment, interleave, save_results
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.snapshot import Snapshot, take_snapshot
from multisa.runtime.jobs.spec import SHARD_SIZE
from multisa.runtime.sources.base import SourceItem

DIGEST = "0123456789abcdef" * 4
LAST_SHARD = 100  # how often one shard is looked up


def write_journal(path: Path, images: int, shard_size: int) -> None:
    """Write the journal of a run that is complete but for its last shard."""
    with path.open("wb") as journal:
        for shard in range(images // shard_size - 1):
            journal.write(ShardResult(shard, shard_size, 0, 1_000_000, DIGEST).line())


def items(count: int) -> Iterator[SourceItem]:
    """A listing of so many photographs, a thousand in a folder."""
    for i in range(count):
        name = f"{i // 1000:05d}/{i:08d}.jpg"
        yield SourceItem(name, name, 100_000 + i, str(i))


def open_journal(path: Path) -> None:
    """Read it as a run does when it begins."""
    with Journal(path) as journal:
        assert not journal.torn and journal.shards


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    images: int = parser.parse_args().images
    with tempfile.TemporaryDirectory() as work:
        journals = {size: Path(work, f"journal-{size}.jsonl") for size in (SHARD_SIZE, 1)}
        for size, path in journals.items():
            write_journal(path, images, size)
        cases = {str(size): (lambda path=path: open_journal(path)) for size, path in journals.items()}
        times = interleave(cases, repeats=5)
        start = time.perf_counter()
        take_snapshot(Path(work, "inventory.sqlite"), items(images), lambda item: None)
        frozen = time.perf_counter() - start
        with Snapshot(Path(work, "inventory.sqlite")) as inventory:
            start = time.perf_counter()
            for i in range(LAST_SHARD):
                inventory.shard(images // SHARD_SIZE - 1 - i, SHARD_SIZE)
            found = (time.perf_counter() - start) / LAST_SHARD
        size = Path(work, "inventory.sqlite").stat().st_size
    save_results(
        "journal",
        {
            "environment": environment(),
            "images": images,
            # By the images of a shard; with one image a shard the journal has a line for each image.
            "journal_seconds_for_a_million_images": {
                name: round(times[name].median * 1_000_000 / images, 5) for name in times
            },
            "inventory": {
                "seconds_to_freeze_a_million": round(frozen * 1_000_000 / images, 2),
                "bytes_an_image": round(size / images, 1),
                "milliseconds_to_find_a_shard": round(1000 * found, 3),
            },
        },
    )


if __name__ == "__main__":
    main()
