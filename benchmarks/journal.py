"""Opening a run of millions of images: its list is written once, its journal is read at every start.

    python benchmarks/journal.py [--num-images 10000000]

Writes benchmarks/results/journal.json.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from multisa.benchmarks.harness import environment, interleave, make_parser, save_results
from multisa.runtime.jobs.journal import Journal, ShardResult
from multisa.runtime.jobs.snapshot import Snapshot, freeze
from multisa.runtime.jobs.spec import SHARD_SIZE
from multisa.runtime.sources.base import SourceItem

DIGEST = "0123456789abcdef" * 4
LOOKUPS = 100  # of shards


def write_journal(path: Path, images: int, shard_size: int) -> None:
    """Write the journal of a run that lacks only its last shard."""
    with path.open("wb") as journal:
        for shard in range(images // shard_size - 1):
            journal.write(ShardResult(shard, shard_size, 0, 1_000_000, DIGEST).line())


def items(count: int) -> Iterator[SourceItem]:
    """A listing of `count` images, a thousand per folder."""
    for i in range(count):
        name = f"{i // 1000:05d}/{i:08d}.jpg"
        yield SourceItem(name, name, 100_000 + i, str(i))


def open_journal(path: Path) -> None:
    """Read it as a run does when it starts."""
    with Journal(path) as journal:
        assert not journal.torn and journal.shards


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-images", type=int, default=10_000_000)
    options = parser.parse_args()
    images: int = options.num_images
    with tempfile.TemporaryDirectory() as work:
        journals = {size: Path(work, f"journal-{size}.jsonl") for size in (SHARD_SIZE, 1)}
        for size, path in journals.items():
            write_journal(path, images, size)
        cases = {str(size): (lambda path=path: open_journal(path)) for size, path in journals.items()}
        times = interleave(cases, repeats=5)
        database = Path(work, "snapshot.sqlite")
        start = time.perf_counter()
        freeze(database, items(images), lambda item: None)
        written = time.perf_counter() - start
        with Snapshot(database) as snapshot:
            start = time.perf_counter()
            for i in range(LOOKUPS):
                snapshot.shard(images // SHARD_SIZE - 1 - i, SHARD_SIZE)
            found = (time.perf_counter() - start) / LOOKUPS
        size = database.stat().st_size
    results = {
        "environment": environment(),
        "images": images,
        # By shard size; with one image per shard the journal has a line for each image.
        "journal_seconds_for_a_million_images": {
            name: round(taken.median * 1_000_000 / images, 5) for name, taken in times.items()
        },
        "snapshot": {
            "seconds_to_write_a_million": round(written * 1_000_000 / images, 2),
            "bytes_an_image": round(size / images, 1),
            "milliseconds_to_find_a_shard": round(1000 * found, 3),
        },
    }
    save_results("journal", results, options.results)


if __name__ == "__main__":
    main()
