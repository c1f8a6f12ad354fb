"""DIR/summary.md of a run of benchmarks/gpu.sh, and DIR.tar.gz with all but the plans."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multisa.benchmarks.gpu.runner import Row
from multisa.runtime.files import write_bytes_atomically

SUMMARY = "summary.md"
NOT_PACKED = ("work",)  # bundle and plans: hundreds of megabytes that the same machine builds again
_WORDS = {0: "all passed", 3: "a gate failed", 5: "no GPU, driver or engine that can be used"}


def write_summary(output: Path, rows: Sequence[Row], code: int) -> Path:
    """Write it from the rows and the steps' own files, as far as they are there; returns its path."""
    lines = ["# multisa on a GPU", "", f"Exit code {code}: {_WORDS.get(code, 'not all was done')}.", ""]
    lines += [*_machine(output), *_table(("step", "seconds", "outcome", "why"), _steps(rows))]
    lines += [*_kernels(output), *_parity(output), *_bench(output)]
    path = output / SUMMARY
    write_bytes_atomically(path, "\n".join([*lines, ""]).encode())
    return path


def pack(output: Path) -> Path:
    """Write DIR.tar.gz beside DIR; a reader sees the old archive or the new one. Returns its path."""
    target = output.with_name(f"{output.name}.tar.gz")
    written = output.with_name(f".{output.name}.tar.gz.tmp")
    with tarfile.open(written, "w:gz") as archive:
        for path in sorted(output.iterdir()):
            if path.name not in NOT_PACKED:
                archive.add(path, f"{output.name}/{path.name}")
    written.replace(target)
    return target


def _read(path: Path) -> Any:
    """What a step has written, an empty value where it has not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _machine(output: Path) -> Iterator[str]:
    seen, driver = _read(output / "look.json"), _read(output / "driver.json")
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


def _kernels(output: Path) -> Iterator[str]:
    found = _read(output / "kernels.json")
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


def _parity(output: Path) -> Iterator[str]:
    """Each report of `multisa parity`: {title: {"passed": ..., "problems": [...], ...}}."""
    rows = [
        (title, "passed" if figures.get("passed") else "failed", "; ".join(figures.get("problems", ())))
        for path in sorted(output.glob("parity-*.json"))
        for title, figures in _read(path).items()
        if isinstance(figures, dict)
    ]
    if rows:
        yield from ("", "## Parity with fp32 on the CPU", "")
        yield from _table(("engine", "gate", "problems"), rows)


def _bench(output: Path) -> Iterator[str]:
    found = _read(output / "bench" / "bench.json")
    rows = [
        (
            row.get("engine"),
            row.get("precision"),
            row.get("images_per_second"),
            (row.get("latency_ms") or {}).get("p50"),
            row.get("miou"),
            row.get("label_agreement"),
        )
        for row in found.get("segment") or ()
    ]
    if rows:
        names = ("engine", "precision", "images a second", "p50 ms", "mIoU", "labels alike")
        yield from ("", "## The suite: segment", "", *_table(names, rows))


def _table(
    names: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]
) -> Iterator[str]:
    yield _cells(names)
    yield _cells(["---"] * len(names))
    for row in rows:
        yield _cells(["" if value is None else value for value in row])


def _cells(values: Sequence[object]) -> str:
    return f"| {' | '.join(str(value).replace('|', '/') for value in values)} |"
