"""DIR/summary.md of a run of benchmarks/gpu.sh, and DIR.tar.gz with all but the plans."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from multisa.benchmarks.gpu.runner import DONE, Row
from multisa.runtime.files import write_bytes_atomically

SUMMARY = "summary.md"
NOT_PACKED = ("work",)  # bundle and plans: hundreds of megabytes that the same machine builds again
_WORDS = {0: "all passed", 3: "a gate failed", 5: "no GPU, driver or engine that can be used"}


class Results:
    """Files of the steps in the folder of the results, without those that an earlier run has left."""

    def __init__(self, output: Path, outdated: frozenset[Path] = frozenset()) -> None:
        """`outdated`: files and folders that are neither shown nor packed."""
        self.output, self._outdated = output, outdated

    def has(self, path: Path) -> bool:
        """Whether a path in the folder is of this run."""
        return self._outdated.isdisjoint((path, *path.parents))

    def read(self, *names: str) -> Any:
        """What a step has written, an empty value where it has not."""
        path = self.output.joinpath(*names)
        try:
            return json.loads(path.read_text(encoding="utf-8")) if self.has(path) else {}
        except (OSError, ValueError):
            return {}


def write_summary(results: Results, rows: Sequence[Row], code: int) -> Path:
    """Write it from the rows and the steps' own files, as far as they are there; returns its path."""
    lines = ["# multisa on a GPU", "", f"Exit code {code}: {_WORDS.get(code, 'not all was done')}.", ""]
    lines += [*_machine(results), *_table(("step", "seconds", "outcome", "why"), _steps(rows))]
    lines += [*_kernels(results), *_parity(results), *_bench(results, rows)]
    path = results.output / SUMMARY
    write_bytes_atomically(path, "\n".join([*lines, ""]).encode())
    return path


def archive_path(output: Path) -> Path:
    """DIR.tar.gz, beside DIR."""
    return output.with_name(f"{output.name}.tar.gz")


def pack(results: Results) -> Path:
    """Write DIR.tar.gz beside DIR; a reader sees the old archive or the new one. Returns its path."""
    output = results.output
    target = archive_path(output)
    written = output.with_name(f".{target.name}.tmp")
    hidden = [output / name for name in NOT_PACKED]

    def chosen(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = output.parent / member.name
        return member if path not in hidden and results.has(path) else None

    with tarfile.open(written, "w:gz") as archive:
        archive.add(output, output.name, filter=chosen)
    written.replace(target)
    return target


def _machine(results: Results) -> Iterator[str]:
    seen, driver = results.read("look.json"), results.read("driver.json")
    if seen:
        nvcc = seen["nvcc"] or "from wheels"
        yield f"- {seen['system']}, {seen['machine']}, {seen['cores']} cores, nvcc {nvcc}"
    if driver:
        yield f"- {', '.join(driver['gpus'])}; the driver runs CUDA up to {driver['driver_runs_cuda']}"
        reached = "reaches the GPU" if driver["torch"]["available"] else "does not reach the GPU"
        yield f"- PyTorch {driver['torch']['version']} {reached}"
        for name, library in driver["libraries"].items():
            yield f"- {name} {library['version']}: {library['problem'] or 'fits'}"
    yield ""


def _steps(rows: Sequence[Row]) -> Iterator[Sequence[object]]:
    for row in rows:
        yield row.name, f"{row.seconds:.1f}", row.outcome, row.reason


def _kernels(results: Results) -> Iterator[str]:
    found = results.read("kernels.json")
    rows = [
        (row["kernel"], shape, way, times["median_ms"], times["times_ours"], f"{row['max_error']:.1e}")
        for row in found.get("rows", ())
        for shape in [" ".join(f"{name} {size}" for name, size in row["shape"].items())]
        for way, times in row["ways"].items()
    ]
    if rows:
        yield from ("", "## Kernels", "")
        yield "Medians in turn; the error is of the resident call, against the reference."
        yield ""
        yield from _table(("kernel", "shape", "way", "ms", "times the resident call", "error"), rows)


def _parity(results: Results) -> Iterator[str]:
    """Each report of `multisa parity`: {title: {"passed": ..., "problems": [...], ...}}."""
    rows = [
        (title, "passed" if figures.get("passed") else "failed", "; ".join(figures.get("problems", ())))
        for path in sorted(results.output.glob("parity-*.json"))
        for title, figures in results.read(path.name).items()
        if isinstance(figures, dict)
    ]
    if rows:
        yield from ("", "## Parity with fp32 on the CPU", "")
        yield from _table(("engine", "gate", "problems"), rows)


def _bench(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """A row for each contender, with the reason where it could not run; the whole is in DIR/bench."""
    found = results.read("bench", "bench.json").get("segment") or ()
    if found:
        is_whole = any(row.name == "bench" and row.outcome == DONE for row in rows)
        yield from ("", f"## The suite: segment{'' if is_whole else ' (it did not get to its end)'}", "")
        names = ("engine", "precision", "device", "images a second", "in one loop", "p50 ms", "mIoU")
        yield from _table((*names, "labels alike", "problem"), map(_contender, found))


def _contender(row: dict[str, Any]) -> Sequence[object]:
    rates = (row.get("loop") or {}).get("images_per_second")
    return (
        *(row.get(name) for name in ("engine", "precision", "device", "images_per_second")),
        round(median(rates), 2) if rates else None,
        (row.get("latency_ms") or {}).get("p50"),
        *(row.get(name) for name in ("miou", "label_agreement", "problem")),
    )


def _table(
    names: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]
) -> Iterator[str]:
    yield _cells(names)
    yield _cells(["---"] * len(names))
    for row in rows:
        yield _cells(["" if value is None else value for value in row])


def _cells(values: Sequence[object]) -> str:
    return f"| {' | '.join(str(value).replace('|', '/') for value in values)} |"
