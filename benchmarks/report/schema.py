"""What a bench.json may hold, and a check of one that somebody else has written.

The file is a dictionary of schema version 1: `environment`, and a list of rows for each stage in STAGES.
Most keys may be missing or null; keys that are not known are never looked at. README says what they mean.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multisa.benchmarks.report.cells import cut_text
from multisa.runtime.errors import UsageError

SCHEMA_VERSION = 1
STAGES = {"segment": "Segmenting", "label": "Labelling", "kernels": "Kernels"}  # and their titles
# What makes a row the one it is, in the order of its name.
ROW_KEYS = {
    "segment": ("engine", "precision", "device"),
    "label": ("recipe", "engine", "precision", "device"),
    "kernels": ("kernel", "way", "threads", "size"),
}
LARGEST_FILE = 16 << 20  # bytes; a report of all engines has a few hundred thousand
MOST_ROWS = 500  # of a stage
MOST_POINTS = 64  # of a curve
MOST_REPEATS = 2000  # of a measurement
LONGEST_TEXT = 2000  # characters
_LARGEST_NUMBER = 1e18
_REMEDY = "give a bench.json that `multisa bench` wrote"

Check = Callable[[Any, str], None]


def read_bench(path: Path) -> dict[str, Any]:
    """Read and check a bench.json. Raises UsageError saying what keeps it from being one."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}: {_REMEDY}") from error
    if len(content) > LARGEST_FILE:
        raise UsageError(f"{path}: got more than {LARGEST_FILE >> 20} MiB, expected less: {_REMEDY}")
    try:
        data = json.loads(content)
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else "nested too deeply"
        raise UsageError(f"{path}: is not JSON that can be read ({reason}): {_REMEDY}") from error
    try:
        validate_bench(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return dict(data)


def validate_bench(data: object) -> None:
    """Check that `data`, which may come from anybody's JSON, is a report of schema version 1.

    Raises UsageError with the key, what it holds, what was expected and what to do: for wrong types, numbers
    that are not finite or out of range, texts and lists without end, and two rows of one name.
    """
    if not isinstance(data, Mapping):
        raise _wrong("the file", data, "an object")
    if data.get("schema_version") != SCHEMA_VERSION or isinstance(data.get("schema_version"), bool):
        raise _wrong("schema_version", data.get("schema_version"), str(SCHEMA_VERSION))
    _ENVIRONMENT(data.get("environment"), "environment")
    for stage, check in _ROWS.items():
        rows = data.get(stage)
        if rows is None:
            continue
        _listing(check, MOST_ROWS)(rows, stage)
        seen: dict[tuple[str, ...], int] = {}
        for index, row in enumerate(rows):
            first = seen.setdefault(row_key(stage, row), index)
            if first != index:
                raise UsageError(
                    f"{stage}[{index}]: got the same {', '.join(ROW_KEYS[stage])} as {stage}[{first}], "
                    f"expected each row once: {_REMEDY}"
                )


def cut_texts(bench: Mapping[str, Any]) -> dict[str, Any]:
    """A report of our own, with what its rows say of failures cut to LONGEST_TEXT: nobody knows how much
    others' code says. Of reports of others nothing is cut: `validate_bench` refuses them.
    """
    stages = {stage: bench[stage] for stage in STAGES if isinstance(bench.get(stage), list)}
    return {**bench, **{stage: [_cut(row) for row in rows] for stage, rows in stages.items()}}


def _cut(row: Any) -> Any:
    said = {key: row[key] for key in ("problem", "notes") if row.get(key)} if isinstance(row, Mapping) else {}
    return {**row, **{key: _cut_value(value) for key, value in said.items()}} if said else row


def _cut_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_cut_value(item) if isinstance(item, str) else item for item in value]
    return cut_text(value, LONGEST_TEXT) if isinstance(value, str) else value


def row_key(stage: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The values by which rows of two reports are the same row."""
    return tuple("" if row.get(key) is None else str(row[key]) for key in ROW_KEYS[stage])


def _wrong(where: str, value: object, expected: str) -> UsageError:
    if value is None or isinstance(value, bool | float):
        got = str(value)
    elif isinstance(value, int):
        got = str(value) if abs(value) < _LARGEST_NUMBER else "a number beyond 1e18"
    elif isinstance(value, str):
        got = ascii(value[:40])
    else:
        got = {"list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)
    return UsageError(f"{where}: got {got}, expected {expected}: {_REMEDY}")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _wrong(where, value, "a text")
    if len(value) > LONGEST_TEXT:
        raise UsageError(
            f"{where}: got a text of {len(value)} characters, expected at most {LONGEST_TEXT}: {_REMEDY}"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong(where, value, "a text that can be written as UTF-8")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")


def _number(least: float = 0, most: float = _LARGEST_NUMBER) -> Check:
    """A finite number from `least` to `most`."""

    def check(value: Any, where: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:  # which is not so for what is not a number, nan
            raise _wrong(where, value, f"a number from {least:g} to {most:g}")

    return check


def _count(value: Any, where: str) -> None:
    if not isinstance(value, int):
        raise _wrong(where, value, "a whole number")
    _number()(value, where)


def _listing(check: Check, most: int = MOST_REPEATS) -> Check:
    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple):
            raise _wrong(where, value, "a list")
        if len(value) > most:
            raise UsageError(f"{where}: got {len(value)} entries, expected at most {most}: {_REMEDY}")
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return check_all


def _record(checks: Mapping[str, Check], required: tuple[str, ...] = ()) -> Check:
    """An object; keys that are not required may be missing or null, others are not looked at."""

    def check_record(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object")
        for key, check in checks.items():
            if key in required or value.get(key) is not None:
                check(value.get(key), f"{where}.{key}")

    return check_record


def _table(check: Check, most: int = 200) -> Check:
    """An object whose keys are free; a value may be null."""

    def check_table(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object")
        if len(value) > most:
            raise UsageError(f"{where}: got {len(value)} keys, expected at most {most}: {_REMEDY}")
        for key, item in value.items():
            _text(key, f"a key of {where}")
            if item is not None:
                check(item, f"{where}.{ascii(key[:40])[1:-1]}")

    return check_table


_POSITIVE = _number(1e-12)
_ANY = _number()
_SHARE = _number(0, 1)
_LIMIT = _record({"floor_ms": _ANY, "share": _ANY, "text": _text})
_RATES = _record(
    {
        "by": _text,
        "photographs": _count,
        "turns": _count,  # where each repeat is of other photographs
        "images_per_second": _listing(_POSITIVE),
        "times_baseline": _POSITIVE,
    }
)
_LATENCY = _record(
    {
        **dict.fromkeys(("p50", "p90", "p99", "min", "max", "mean"), _POSITIVE),
        "count": _count,
        "repeats": _listing(_POSITIVE),
    }
)


def _curve(at: Mapping[str, Check], **values: Check) -> Check:
    return _listing(_record({**at, **values}, required=tuple(at)), MOST_POINTS)


def _name(value: Any, where: str) -> None:
    """A text, or a count: threads are 1, 2 or "all"."""
    (_text if isinstance(value, str) else _count)(value, where)


# All keys of all stages: a stage that has another's key is read alike.
_ROW: dict[str, Check] = {
    **dict.fromkeys(("engine", "precision", "device", "problem"), _text),
    **dict.fromkeys(("recipe", "kernel", "way", "size"), _text),
    "threads": _name,
    **dict.fromkeys(("default", "baseline"), _flag),
    **dict.fromkeys(("images_per_second", "startup_seconds"), _POSITIVE),
    **dict.fromkeys(("times_baseline", "default_times_as_fast", "times_ours"), _POSITIVE),
    **dict.fromkeys(("median_ms", "min_ms", "max_ms", "mean_pixels"), _POSITIVE),
    **dict.fromkeys(("photographs", "repeats"), _count),
    **dict.fromkeys(("model_bytes", "max_error"), _ANY),
    "end_to_end": _RATES,
    "loop": _RATES,
    "notes": _listing(_text, MOST_POINTS),
    "latency_ms": _LATENCY,
    "batches": _curve({"batch": _POSITIVE}, images_per_second=_POSITIVE),
    "sizes": _curve({"pixels": _POSITIVE}, long_side=_POSITIVE, latency_ms=_POSITIVE),
    "cores": _curve({"cores": _POSITIVE}, images_per_second=_POSITIVE),
    "stages_ms": _table(_ANY),
    "peak_mib": _record({"host": _ANY, "device": _ANY}),
    "miou": _number(0, 100),
    "label_agreement": _SHARE,
    "limit": _LIMIT,
}
_ROWS: dict[str, Check] = {
    "segment": _record(_ROW, required=("engine", "precision")),
    "label": _record(_ROW, required=("recipe",)),
    "kernels": _record(_ROW, required=("kernel", "way")),
}
_ENVIRONMENT = _record(
    {
        **dict.fromkeys(("processor", "instruction_set", "system", "python", "started", "commit"), _text),
        "cores": _POSITIVE,
        **dict.fromkeys(("memory_gib", "load_at_start", "seconds"), _ANY),
        "gpus": _listing(_text, 100),
        "versions": _table(_text),
        "quick": _flag,
        "bundle": _record({"name": _text, "sha256": _text}),
        "data": _record({"name": _text, "photographs": _table(_count), "digest": _text}),
        "peaks": _table(_ANY),
    }
)
