"""Opening a run of millions of images: its journal is read at every start.

    python benchmarks/journal.py [--num-images 10000000]

Writes benchmarks/results/journal.json.
"""

import tempfile
from pathlib import Path

from multisa.benchmarks.harness import environment, interleave, make_parser, save_results
from multisa.runtime.jobs.journal import Journal, ShardResult

SHARD_SIZES = (256, 1)  # the default, and a line for each image
DIGEST = "0123456789abcdef" * 4


def write_journal(path: Path, images: int, shard_size: int) -> None:
    """Write the journal of a run that lacks only its last shard."""
    with path.open("wb") as journal:
        for shard in range(images // shard_size - 1):
            journal.write(ShardResult(shard, shard_size, 0, 1_000_000, DIGEST).line())


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
        journals = {size: Path(work, f"journal-{size}.jsonl") for size in SHARD_SIZES}
        for size, path in journals.items():
            write_journal(path, images, size)
        cases = {str(size): (lambda path=path: open_journal(path)) for size, path in journals.items()}
        times = interleave(cases, repeats=5)
    seconds = {size: round(taken.median * 1_000_000 / images, 5) for size, taken in times.items()}
    results = {"images": images, "journal_seconds_for_a_million_images": seconds}  # by shard size
    save_results("journal", {"environment": environment(), **results}, options.results)


if __name__ == "__main__":
    main()
