"""bench.json as files for people and for programs: bench.csv, bench.md, bench.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multisa.benchmarks.report.page import page
from multisa.benchmarks.report.schema import cut_texts, validate_bench
from multisa.benchmarks.report.text import markdown, tidy_csv
from multisa.runtime.files import write_bytes_atomically


def write_report(bench: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report of `bench` into `folder`, each file atomically, and return their paths.

    The same dictionary gives the same bytes. Raises UsageError for what is not of the schema (schema.py).
    """
    bench = cut_texts(bench)
    validate_bench(bench)
    contents = {"bench.csv": tidy_csv(bench), "bench.md": markdown(bench), "bench.html": page(bench)}
    for name, text in contents.items():
        write_bytes_atomically(folder / name, text.encode())
    return [folder / name for name in contents]
