"""The README's tables of engines and recipes, from segmenting.json and labelling.json."""

from collections.abc import Sequence
from typing import Any

from multisa.benchmarks import start_up as start

Row = dict[str, Any]


def segmenting(results: dict[str, Any]) -> str:
    """Every way to segment that ran, the fastest from file to file first."""
    lines = [
        "| segmenting | precision | images/s, file to file | times eager | ms a photograph: p50, p90, p99 "
        "| mIoU | labels alike | start, s | peak MiB | model MB |",
        f"|{'---|' * 10}",
    ]
    ran = _ran(results["segment"])
    for row in sorted(ran, key=lambda row: -float(row["images_per_second"])):
        latency = row["latency_ms"]
        cells = (
            f"**{row['engine']}** (default)" if row["default"] else row["engine"],
            row["precision"],
            f"{row['images_per_second']:.1f}",
            f"{row['end_to_end']['times_reference']:.2f}",
            f"{latency['p50']:.0f}, {latency['p90']:.0f}, {latency['p99']:.0f}",
            f"{row['miou']:.2f}",
            _share(row["label_agreement"]),
            f"{row['startup_seconds']:.1f}",
            f"{row['peak_mib']['host']:.0f}",
            f"{row['model_bytes'] / 1e6:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def segmenting_conditions(results: dict[str, Any]) -> list[str]:
    """What the table is of, as pieces of a paragraph."""
    ran, machine = _ran(results["segment"]), results["environment"]
    default = next(row for row in ran if row["default"])
    eager = next(row for row in ran if row["reference"])
    limit = default["limit"]
    scaling = default["cores"]
    faster = scaling[-1]["images_per_second"] / scaling[0]["images_per_second"]
    pieces = [
        f"All in one run on {machine['cores']} cores of an {machine['processor']}, each in a process of its",
        "own, by turns. From file to file: `multisa segment`, and for PyTorch a plain loop; the",
        f"network alone takes {default['latency_ms']['p50']:.0f} ms on the default engine,",
        f"{eager['latency_ms']['p50']:.0f} ms in PyTorch eager ({default['times_reference']:.2f} times).",
        f"mIoU and labels of {default['photographs']} photographs, against the fp32 graph on ONNX Runtime.",
        f"{scaling[-1]['cores']} cores segment {faster:.2f} times as many as {scaling[0]['cores']}.",
    ]
    if limit and limit["share"]:
        floor = f"The floor, {limit['text']}, is {limit['floor_ms']:.0f} ms:"
        pieces.append(f"{floor} {limit['share']:.0%} of what is taken.")
    return [*pieces, "[benchmarks/results/segmenting.json](benchmarks/results/segmenting.json)"]


def labelling(results: dict[str, Any]) -> str:
    """Every way to label that ran."""
    lines = [
        "| labelling | engine | precision | images/s, file to file | default is faster by | mIoU "
        "| labels alike | photographs | ms of work a photograph: cam, affinity, walk, CRF | peak MiB |",
        f"|{'---|' * 10}",
    ]
    for row in _ran(results["label"]):
        stages = row["stages_ms"]
        work = ", ".join(f"{stages.get(name, 0):,.0f}" for name in ("cam", "affinity", "walk", "crf"))
        rate = row["images_per_second"]
        cells = (
            f"**{row['recipe']}** (default)" if row["default"] else row["recipe"],
            row["engine"],
            row["precision"],
            f"{rate:.2f}" if rate >= 0.1 else f"{rate:.4f}",
            f"{row['default_times_as_fast']:,.1f}",
            "" if row.get("miou") is None else f"{row['miou']:.2f}",
            _share(row.get("label_agreement")),
            f"{row['photographs']}",
            work,
            f"{row['peak_mib']['host']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def labelling_conditions(results: dict[str, Any]) -> list[str]:
    """What the table is of, as pieces of a paragraph."""
    dense = [row for row in _ran(results["label"]) if "dense" in row["recipe"]]
    pieces = [
        "Labelling photographs of the train list by their image-level labels, mIoU at their own size, by",
        "turns. The recipe is the literature's in PyTorch eager: networks not folded, each scale with its",
        "mirror image, the random walk on a sparse matrix (SciPy) or by squaring the dense one (denormal",
        "numbers flushed, which their code does not do), pydensecrf.",
    ]
    if dense:
        pieces.append(
            f"The dense one was given one photograph of {dense[0]['mean_pixels']:,} pixels, and so was ours, "
            "many times over, for that ratio; its cost grows with the third power of the pixels."
        )
    return [*pieces, "[benchmarks/results/labelling.json](benchmarks/results/labelling.json)"]


def start_up(results: dict[str, Any]) -> list[str]:
    """How long a first mask takes, as pieces of a paragraph."""
    ways, limit = results["ways"], results["limit"]
    ours, eager = (ways[name] for name in (start.OURS, start.EAGER_START))
    return [
        "From a command to its first mask, with a new process:",
        f"{ours['median_ms'] / 1000:.2f} s, PyTorch eager {eager['median_ms'] / 1000:.2f} s",
        f"({eager['times_ours']:.1f} times), {limit['text']} alone {limit['floor_ms'] / 1000:.2f} s.",
        "[benchmarks/results/start_up.json](benchmarks/results/start_up.json)",
    ]


def _ran(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["problem"] is None]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
