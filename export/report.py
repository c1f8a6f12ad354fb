"""What the exporter writes and prints: parity.json, tables for people, JSON objects for programs."""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multisa.export.parity import ParityReport
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import BundleError, UsageError

REPORT_NAME = "parity.json"  # the parity report inside a bundle
INT8_FOR = "int8_for"  # key of the manifest's provenance: the int8 graphs are for "cpu" or for "tensorrt"


@dataclass(frozen=True)
class GraphFile:
    """One graph file that was written to a bundle."""

    graph: str  # "cam", "affinity" or "segmenter"
    precision: str
    file: str
    bytes: int
    seconds: float  # to make the graph, comparison excluded
    fp32_nodes: int = 0  # nodes kept in fp32 inside a graph of lower precision


def open_bundle(bundle: Bundle | str | Path) -> Bundle:
    """Return an open bundle as it is; load and verify one that is given as a folder.

    Raises UsageError for a folder that does not exist, BundleError as `load_bundle` does.
    """
    if isinstance(bundle, Bundle):
        return bundle
    path = Path(bundle)
    if not path.exists():
        raise UsageError(f"{path}: does not exist, expected a bundle folder as `multisa export` writes")
    return load_bundle(path)


def report_to_bytes(report: dict[str, Any]) -> bytes:
    """Serialize a report, one entry for each precision or way of running it, as indented JSON."""
    return (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def report_of_bundle(bundle: Bundle) -> dict[str, Any]:
    """Read a bundle's parity.json; empty for a bundle without one. Raises BundleError if it is malformed."""
    if REPORT_NAME not in bundle.manifest.files:
        return {}
    try:
        report = json.loads(bundle.read_file(REPORT_NAME))
    except ValueError as error:
        raise BundleError(f"{bundle.path / REPORT_NAME}: {error}, expected JSON") from error
    if not isinstance(report, dict):
        raise BundleError(f"{bundle.path / REPORT_NAME}: got {type(report).__name__}, expected an object")
    return report


def check_report(report: Path | None, bundle: Path) -> None:
    """Raise UsageError for a report inside a bundle's folder, which would invalidate the bundle."""
    if report and report.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(
            f"{report}: inside the bundle's folder {bundle}, expected a file elsewhere; a bundle's own "
            f"report is {REPORT_NAME}"
        )


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """Plain text columns; those named in `right` are aligned to the right."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.rjust if name in right else str.ljust for name in header]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def describe_graphs(graphs: Sequence[GraphFile]) -> str:
    """A table of the graph files that were written."""
    header = ("graph", "precision", "file", "MB", "fp32 nodes", "seconds")
    rows = []
    for graph in graphs:
        nodes = "all" if graph.precision == "fp32" else str(graph.fp32_nodes)
        numbers = (f"{graph.bytes / 1e6:.2f}", nodes, f"{graph.seconds:.1f}")
        rows.append((graph.graph, graph.precision, graph.file, *numbers))
    return format_table(header, rows, right=("MB", "fp32 nodes", "seconds"))


def describe_parity(title: str, report: ParityReport) -> str:
    """A table of all figures that have a limit."""
    header = ("output", "images", "figure", "measured", "limit", "")
    rows = []
    for output in report.differences.values():
        for figure, measured, limit, passed in output.rows():
            name = figure.replace("_", " ").replace("miou", "mIoU")
            bound = f"{'>=' if figure.endswith('agreement') else '<='} {_figure(figure, limit)}"
            verdict = "ok" if passed else "FAILED"
            rows.append((output.name, str(output.images), name, _figure(figure, measured), bound, verdict))
    table = format_table(header, rows, right=("images", "measured", "limit"))
    return f"parity: {title}\n{table}"


def graphs_as_json(graphs: Sequence[GraphFile]) -> list[dict[str, Any]]:
    """The graph files as JSON values; sizes in bytes, times in seconds."""
    return [{**asdict(graph), "seconds": round(graph.seconds, 2)} for graph in graphs]


def _figure(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    return f"{100 * value:.5g} %" if name.endswith("agreement") else f"{value:.3g}"
