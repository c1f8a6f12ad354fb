"""The report in sentences, each made of its figures: how fast, against what, at which mIoU."""

from collections.abc import Mapping
from typing import Any

from multisa.benchmarks.report.cells import (
    OURS,
    Row,
    count,
    end_to_end,
    engine_name,
    number,
    plain,
    rows_of,
    value,
)

_SAME = 0.03  # of images a second: less apart is as fast


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
    reference = next((row for row in rows if row.get("reference") and row is not default), None)
    speed, ratio = end_to_end(default), value(default, "end_to_end", "times_reference")
    latency = value(default, "latency_ms", "p50")
    text = f"On this machine ({machine(bench)}) the default ({engine_name(default)}) segments "
    if speed is not None:
        text += f"{number(speed)} images/s end to end"
    elif latency is not None:
        text += f"one photograph in {number(latency)} ms"
        ratio = value(default, "times_reference")
    else:
        return []
    if reference is not None and ratio is not None:
        text += f", {number(ratio)} times {engine_name(reference)}"
    text += _at_miou(default, reference)
    return [f"{text}.", *_choices(rows, default)]


def _at_miou(default: Row, reference: Row | None) -> str:
    other = None if reference is None else value(reference, "miou")
    own = _miou(default)
    return own if not own or other is None else f"{own} against {other:.2f}"


def _miou(row: Row) -> str:
    found = value(row, "miou")
    return "" if found is None else f", at mIoU {found:.2f}"


def _choices(rows: list[Row], default: Row) -> list[str]:
    """Whether another engine on the default's device would have been the faster choice."""
    own = end_to_end(default)
    others = [
        (speed, row)
        for row in rows
        if row is not default
        and row.get("device") == default.get("device")
        and (speed := end_to_end(row)) is not None
    ]
    if own is None or not others:
        return []
    faster = sorted(
        ((speed, engine_name(row), _miou(row)) for speed, row in others if speed > own * (1 + _SAME)),
        reverse=True,
    )
    if not faster:
        return [
            f"None of the {len(others)} others measured there is more than {_SAME:.0%} faster end to end."
        ]
    named = ", ".join(f"{name} ({number(speed / own)} times{miou})" for speed, name, miou in faster)
    return [f"Faster end to end than the default: {named}."]


def _labelling(bench: Mapping[str, Any]) -> list[str]:
    rows = rows_of(bench, "label")
    ours = [row for row in rows if str(row["recipe"]).startswith(OURS)]
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
    return [f"{plain(str(default['recipe']))} ({engine_name(default)}) does {number(speed)} images/s{named}."]


def _of_others(row: Row, default: Row) -> str:
    """Which photographs the two were compared on, where they are not those of the default's own rate."""
    pixels = value(row, "mean_pixels")
    return "" if pixels in (None, value(default, "mean_pixels")) else f" (of {count(pixels)} pixels each)"
