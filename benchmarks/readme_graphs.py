"""The README's passages about the exported graphs: folding, precisions, plans."""

from typing import Any

from multisa.benchmarks.readme_sources import Files, source


def head(files: Files) -> list[str]:
    """What folding and blocks of queries are worth, as pieces of a paragraph."""

    parts: dict[str, Any] = files["cam_head"]
    heads, costs, whole, memory = (parts[name]["networks"] for name in ("head", "cost", "whole", "memory"))

    def fraction(network: str, scale: float) -> float:
        row = next(row for row in costs[network] if row["scale"] == scale)
        return float(row["folded_over_unfolded"])

    lite, resnet = (heads[network]["ratio"] for network in ("lite0", "resnet50"))
    before, after = (row["peak_mib"] for row in memory["packaged"])
    largest = [
        name for name, rows in costs.items() if any(r["head_is_largest"] for r in rows if r["scale"] == 2)
    ]
    return [
        f"Folding leaves {fraction('resnet50', 1.0):.2f} (ResNet-50) and {fraction('resnest101', 1.0):.2f}",
        "(ResNeSt-101) of the CAM network's multiply-adds at 512 pixels. The exported head is",
        f"{lite:.1f} (lite0) and {resnet:.1f} times (ResNet-50) as fast as in PyTorch eager, the whole graph",
        f"with {len(parts['scales'])} scales and their mirror images",
        f"{whole['lite0']['ratio']:.1f} times at {whole['lite0']['size']} and",
        f"{whole['resnet50']['ratio']:.1f} times at {whole['resnet50']['size']}",
        "pixels. Blocks of queries take the peak memory of the packaged cam.onnx at 1000 x 1000 pixels from",
        f"{before:,} to {after:,} MiB.",
        *([f"Attention stays the largest term at twice that size for {', '.join(largest)}."] * bool(largest)),
        source(files, "cam_head"),
    ]


def precisions(files: Files) -> list[str]:
    """How the graphs of lower precision answer, as pieces of a paragraph."""

    results = files["precisions"]

    def miou(title: str) -> str:
        labels = results[title]["figures"]["labels"]
        return f"{labels['miou']:.2f} against {labels['miou_reference']:.2f}"

    half, whole = (results[title]["figures"]["labels"] for title in ("fp16", "int8"))
    masks = results["fp16"]["figures"]["pseudo_mask"]
    one, two = (row["ratio"] for row in results["int8"]["speed"]["rows"])
    return [
        "Graphs of lower precision against the fp32 ones, on ONNX Runtime. fp16, each value between nodes",
        f"rounded: {half['agreement']:.3%} of labels alike, {half['firm_agreement']:.3%} away from ties,",
        f"mIoU {miou('fp16')}; pseudo-masks {masks['agreement']:.3%} alike. int8 segmenter:",
        f"{whole['agreement']:.2%} alike, {whole['firm_agreement']:.2%} away from ties, mIoU {miou('int8')},",
        f"{one:.2f} times as fast as fp32 on one thread and {two:.2f} times on two.",
        source(files, "precisions"),
    ]


def plans(files: Files) -> str:
    """A table of what was built, and where no plan came out."""
    lines = [
        "Plans that TensorRT-RTX built on this machine, for GPUs that are not here; none of them was run:",
        "",
        "| network | graph | targets | MB | seconds for one | largest error of the graph against eager |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in files["plans"]["bundles"].items():
        for graph in dict.fromkeys(plan["graph"] for plan in entry["plans"]):
            built = [p for p in entry["plans"] if p["graph"] == graph and "failure" not in p]
            sizes, seconds = ([p[key] for p in built] for key in ("megabytes", "build_seconds"))
            errors = entry["graphs"].get(graph, {}).get("onnxruntime_against_eager", {})
            cells = [
                name,
                graph,
                " ".join(p["target"] for p in built),
                _range(sizes),
                _range(seconds),
                f"{max(errors.values()):.0e}" if errors else "in its parity.json",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(files, "plans")])


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"
