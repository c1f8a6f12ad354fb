"""The README's tables of engines and recipes, from segmenting.json, labelling.json and start_up.json.

Figures that a row lacks, as a step that failed late or a quick run leaves them out, are dashes.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from multisa.benchmarks import start_up as start
from multisa.benchmarks.readme_sources import Files, source

Row = dict[str, Any]
NONE = "-"


def segmenting(files: Files) -> str:
    """Every way to segment that ran, the fastest from file to file first."""
    lines = [
        "| segmenting | precision | images/s, file to file (times eager) | in a plain loop (times eager) "
        "| ms a photograph: p50, p90, p99 | mIoU | labels alike | start, s | peak MiB | model MB |",
        f"|{'---|' * 10}",
    ]
    ran = _ran(files["segmenting"]["segment"])
    for row in sorted(ran, key=lambda row: -float(row.get("images_per_second") or 0)):
        latency = row.get("latency_ms") or {}
        size = row.get("model_bytes")
        cells = (
            f"**{_engine(row)}** (default)" if row["default"] else _engine(row),
            row["precision"],
            _rate(row.get("end_to_end")),
            _rate(row.get("loop")),
            ", ".join(_text(latency.get(key), ".0f") for key in ("p50", "p90", "p99")),
            _text(row.get("miou"), ".2f"),
            _text(row.get("label_agreement"), ".2%"),
            _text(row.get("startup_seconds"), ".1f"),
            _text((row.get("peak_mib") or {}).get("host"), ",.0f"),
            _text(size and size / 1e6, ".1f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def segmenting_conditions(files: Files) -> list[str]:
    """What the table is of, as pieces of a paragraph."""
    results = files["segmenting"]
    ran, machine = _ran(results["segment"]), results["environment"]
    default = next(row for row in ran if row["default"])
    eager = next((r for r in ran if r["baseline"] and r["device"] == default["device"]), default)
    pieces = [
        f"All in one run on {machine['cores']} cores of an {machine['processor']}, each in a process of its",
        "own, by turns. From file to file: `multisa segment`, and for PyTorch the plain loop: Pillow, the",
        "network, Pillow, one photograph after the other, its opening not counted; the next column is",
        "that loop for all. The",
        f"network alone takes {_text(_p50(default), '.0f')} ms on the default engine,",
        f"{_text(_p50(eager), '.0f')} ms in PyTorch eager",
        f"({_text(default.get('times_baseline'), '.2f')} times).",
        f"mIoU and labels of {_text(default.get('photographs'), 'd')} photographs, against the fp32 graph on",
        "ONNX Runtime.",
    ]
    scaling = default.get("cores") or []
    if len(scaling) > 1:
        faster = scaling[-1]["images_per_second"] / scaling[0]["images_per_second"]
        pieces.append(
            f"{scaling[-1]['cores']} cores segment {faster:.2f} times as many as {scaling[0]['cores']}."
        )
    return [*pieces, *_floor(default.get("limit")), source(files, "segmenting")]


def labelling(files: Files) -> str:
    """Every way to label that ran."""
    lines = [
        "| labelling | engine | precision | images/s, file to file | default is faster by | mIoU "
        "| labels alike | photographs | ms of work a photograph: cam, affinity, walk, CRF | peak MiB |",
        f"|{'---|' * 10}",
    ]
    for row in _ran(files["labelling"]["label"]):
        stages, rate = row.get("stages_ms") or {}, row.get("images_per_second")
        cells = (
            f"**{row['recipe']}** (default)" if row["default"] else row["recipe"],
            _engine(row),
            row["precision"],
            _text(rate, ".2f" if rate is None or rate >= 0.1 else ".4f"),
            _text(row.get("default_times_as_fast"), ",.1f"),
            _text(row.get("miou"), ".2f"),
            _text(row.get("label_agreement"), ".2%"),
            _text(row.get("photographs"), "d"),
            ", ".join(_text(stages.get(name), ",.0f") for name in ("cam", "affinity", "walk", "crf")),
            _text((row.get("peak_mib") or {}).get("host"), ",.0f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def labelling_conditions(files: Files) -> list[str]:
    """What the table is of, as pieces of a paragraph."""
    dense = [row for row in _ran(files["labelling"]["label"]) if "dense walk" in row["recipe"]]
    pieces = [
        "Labelling photographs of the train list by their image-level labels, mIoU at their own size, by",
        "turns. The recipe is the literature's in PyTorch eager: networks not folded, each scale with its",
        "mirror image, the random walk on a sparse matrix (SciPy) or by squaring the dense one (denormal",
        "numbers flushed, which their code does not do), pydensecrf.",
    ]
    if dense and dense[0].get("mean_pixels"):
        pieces.append(
            f"The dense one was given one photograph of {dense[0]['mean_pixels']:,} pixels, and so was ours, "
            "many times over, for that ratio; its cost grows with the third power of the pixels."
        )
    return [*pieces, source(files, "labelling")]


def start_up(files: Files) -> list[str]:
    """How long a first mask takes, as pieces of a paragraph."""
    ways, limit = files["start_up"]["ways"], files["start_up"]["limit"]
    ours, eager = (ways[name] for name in (start.OURS, start.EAGER_START))
    openvino = ways.get(start.on_engine("openvino"))
    return [
        "From a command to its first mask, with a new process:",
        f"{ours['median_ms'] / 1000:.2f} s,",
        *([f"with `--backend openvino` {openvino['median_ms'] / 1000:.2f} s,"] if openvino else []),
        f"PyTorch eager {eager['median_ms'] / 1000:.2f} s",
        f"({eager['times_ours']:.1f} times), {limit['text']} alone {limit['floor_ms'] / 1000:.2f} s.",
        source(files, "start_up"),
    ]


def _ran(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["problem"] is None]


def _engine(row: Row) -> str:
    return f"{row['engine']} on the GPU" if row["device"] == "cuda" else str(row["engine"])


def _rate(measured: Row | None) -> str:
    """Images a second, the median of the turns, and how many times the baseline's."""
    if not measured or not measured.get("images_per_second"):
        return NONE
    rate = f"{statistics.median(measured['images_per_second']):.1f}"
    return f"{rate} ({_text(measured.get('times_baseline'), '.2f')})"


def _p50(row: Row) -> float | None:
    p50: float | None = (row.get("latency_ms") or {}).get("p50")
    return p50


def _floor(limit: Row | None) -> list[str]:
    if not limit or not limit["share"]:
        return []
    return [
        f"The floor, {limit['text']}, is {limit['floor_ms']:.0f} ms: {limit['share']:.0%} of what is taken."
    ]


def _text(value: float | None, style: str) -> str:
    return NONE if value is None else format(value, style)
