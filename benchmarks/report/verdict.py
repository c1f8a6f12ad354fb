"""The report in sentences, each made of its figures: how fast, against what, at which mIoU."""

from collections.abc import Callable, Mapping
from typing import Any

from multisa.benchmarks.report.cells import (
    Row,
    baseline_of,
    count,
    end_to_end,
    engine_name,
    is_ours,
    number,
    plain,
    rate,
    rows_of,
    value,
)

_SAME = 0.03  # of images a second: less apart is as fast
_EQUAL = 0.1  # points of mIoU: less apart is as accurate
_GRAPH = "onnxruntime-cpu"  # what runs the bundle's fp32 graph as it is


def verdict(bench: Mapping[str, Any]) -> list[str]:
    """The sentences, the most important first; [] for a report without figures of segmenting or labelling."""
    return [*_segmenting(bench), *_labelling(bench)]


def machine(bench: Mapping[str, Any]) -> str:
    """The machine in a few words: "Intel(R) Xeon(R) Processor, 2 cores, AVX512"."""
    environment = bench["environment"]
    cores = environment.get("cores")
    parts = [
        str(environment.get("processor") or "an unknown processor"),
        f"{cores:g} core{'' if cores == 1 else 's'}" if cores else "",
        str(environment.get("instruction_set") or "").upper(),
        *(str(gpu) for gpu in environment.get("gpus") or ()),
    ]
    return plain(", ".join(part for part in parts if part))


def environment_facts(bench: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, text) of everything that is known about the run."""
    environment = bench["environment"]
    data, bundle = environment.get("data") or {}, environment.get("bundle") or {}
    counts = (data.get("photographs") or {}).items()
    photographs = ", ".join(f"{count} {name}" for name, count in counts if count is not None)
    versions = (environment.get("versions") or {}).items()
    memory, load, seconds = (value(environment, key) for key in ("memory_gib", "load_at_start", "seconds"))
    facts = {
        "machine": machine(bench),
        "memory": "" if memory is None else f"{number(memory)} GiB",
        "load at start": "" if load is None else number(load),
        "system": str(environment.get("system") or ""),
        "Python": str(environment.get("python") or ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions if version is not None),
        "bundle": " ".join(part for part in (bundle.get("name"), _short(bundle.get("sha256"))) if part),
        "photographs": " ".join(
            part for part in (data.get("name"), f"({photographs})" if photographs else "") if part
        ),
        "digest of the data": _short(data.get("digest")),
        "measured peaks": ", ".join(_peaks(environment)),
        "commit": _short(environment.get("commit")),
        "started": str(environment.get("started") or ""),
        "took": ""
        if seconds is None
        else f"{number(seconds)} s{', quick' if environment.get('quick') else ''}",
    }
    return [(name, plain(text)) for name, text in facts.items() if plain(text)]


def _short(digest: object) -> str:
    return str(digest or "")[:12]


def _peaks(environment: Row) -> list[str]:
    operations = value(environment, "peaks", "multiply_adds_per_second")
    copied = value(environment, "peaks", "copied_bytes_per_second")
    return [
        *([] if operations is None else [f"{number(operations / 1e9)} G multiply-adds/s"]),
        *([] if copied is None else [f"{number(copied / 1e9)} GB/s copied"]),
    ]


def _segmenting(bench: Mapping[str, Any]) -> list[str]:
    rows = rows_of(bench, "segment")
    default = next((row for row in rows if row.get("default")), None)
    if default is None:
        return []
    baseline = baseline_of(rows, default)
    parts = _figures(default, None if baseline is default else baseline)
    if not parts:
        return []
    head = f"On this machine ({machine(bench)}) the default is {_named(default)}: "
    return [f"{head}{'; '.join(parts)}.", *_choices(rows, default)]


def _figures(row: Row, baseline: Row | None) -> list[str]:
    """How fast the command, the engine alone and one photograph are, beside the baseline; the mIoU."""
    parts = []
    speed, loop = end_to_end(row), rate(row, "loop")
    beside: Row = baseline or {}
    ratio, alone = (value(row, key, "times_baseline") if beside else None for key in ("end_to_end", "loop"))
    if speed is not None:
        against = f", {number(ratio)} times {engine_name(beside)} in a plain loop" if ratio else ""
        parts.append(f"it segments {number(speed)} images/s from file to file{against} (opening not counted)")
    if loop is not None:
        against = f", {number(alone)} times" if alone else ""
        parts.append(f"the engine alone, in the same loop, does {number(loop)} images/s{against}")
    own, other = (value(one, "latency_ms", "p50") for one in (row, beside))
    if own is not None:
        parts.append(f"one photograph takes {number(own)} ms{_against(other, number)}")
    own, other = (value(one, "miou") for one in (row, beside))
    if own is not None:
        parts.append(f"its mIoU is {own:.2f}{_against(other, '{:.2f}'.format)}")
    return parts


def _against(figure: float | None, shown: Callable[[float], str]) -> str:
    return "" if figure is None else f" against {shown(figure)}"


def _named(row: Row) -> str:
    return f"{engine_name(row)}, on the {'GPU' if row.get('device') == 'cuda' else 'CPU'}"


def _choices(rows: list[Row], default: Row) -> list[str]:
    """Which engine is the fastest at no loss of mIoU, whether "auto" takes it, and what a loss would buy."""
    found = [(speed, row) for row in rows if (speed := end_to_end(row)) is not None]
    least = _least_miou(rows)
    accurate = [(speed, row) for speed, row in found if least is None or (value(row, "miou") or 0) >= least]
    if len(found) < 2 or not accurate:
        return []
    speed, fastest = max(accurate, key=lambda one: one[0])
    condition = (
        "among all, mIoU not being known,"
        if least is None
        else f"at equal mIoU (not more than {_EQUAL} below the bundle's fp32 graph)"
    )
    text = f"The fastest from file to file {condition} is {_named(fastest)}, with {number(speed)} images/s"
    quicker = sorted(((one, row) for one, row in found if one > speed), key=lambda one: -one[0])
    named = "; ".join(f"{_named(row)} ({number(one)} images/s, {_loss(row, least)})" for one, row in quicker)
    return [
        f"{text}: {_beside(speed, fastest, default, least)}.",
        *([f"Faster at a lower mIoU: {named}."] if named else []),
    ]


def _least_miou(rows: list[Row]) -> float | None:
    """The lowest mIoU that is as good as the bundle's fp32 graph's; None where that was not measured."""
    graphs = [row for row in rows if is_ours("segment", row) and row.get("precision") == "fp32"]
    known = [row for row in graphs if value(row, "miou") is not None]
    if not known:
        return None
    graph = next((row for row in known if row["engine"] == _GRAPH), known[0])
    return (value(graph, "miou") or 0.0) - _EQUAL - 1e-9


def _loss(row: Row, least: float | None) -> str:
    miou = value(row, "miou")
    return "mIoU not measured" if miou is None or least is None else f"mIoU {least + _EQUAL - miou:.2f} lower"


def _beside(speed: float, fastest: Row, default: Row, least: float | None) -> str:
    """What the default is, beside the fastest of those that are as accurate."""
    if fastest is default:
        return "the default"
    own, miou = end_to_end(default), value(default, "miou")
    if own is None:
        return "not the default"
    if least is not None and miou is not None and miou < least:
        return f"not the default, whose mIoU is {least + _EQUAL - miou:.2f} lower"
    if speed <= own * (1 + _SAME):
        return f"not the default, which is within {_SAME:.0%} of it"
    return f"not the default, and {number(speed / own)} times as fast"


def _labelling(bench: Mapping[str, Any]) -> list[str]:
    rows = rows_of(bench, "label")
    ours = [row for row in rows if is_ours("label", row)]
    default = next((row for row in ours if row.get("default")), ours[0] if ours else None)
    speed = None if default is None else end_to_end(default)
    if default is None or speed is None:
        return []
    others = [
        f"{number(ratio)} times as fast as {plain(str(row['recipe']))}{_of_others(row, default)}"
        for row in rows
        if row not in ours and (ratio := value(row, "default_times_as_fast")) is not None
    ]
    named = f": {'; '.join(others)}, on the same photographs" if others else ""
    return [
        f"{plain(str(default['recipe']))} ({engine_name(default)}) does {number(speed)} images/s "
        f"from file to file{named}."
    ]


def _of_others(row: Row, default: Row) -> str:
    """Which photographs the two were compared on, where they are not those of the default's own rate."""
    pixels = value(row, "mean_pixels")
    return "" if pixels in (None, value(default, "mean_pixels")) else f" (of {count(pixels)} pixels each)"
