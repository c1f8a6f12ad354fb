"""bench.json: reading one that a user gives, the names of its rows, its values as numbers and text.

The file is an object with `schema_version`, `environment`, and a list of rows for each stage in STAGES. A row
has the keys of ROW_KEYS; it has either figures or the reason why it did not run as "problem".
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from multisa.runtime.errors import UsageError

SCHEMA_VERSION = 2
STAGES = {"segment": "Segmenting", "label": "Labelling", "kernels": "Kernels"}  # and their titles
# The keys that identify a row; the first ones (how many: REQUIRED) must be there.
ROW_KEYS = {
    "segment": ("backend", "precision", "device"),
    "label": ("recipe", "backend", "precision", "device"),
    "kernels": ("kernel", "way", "threads", "size"),
}
REQUIRED = {"segment": 2, "label": 1, "kernels": 2}
NOTHING = "–"  # a cell without a value
OURS = "multisa"  # how the names of our own recipes and kernels begin
_REMEDY = "give a bench.json written by this version of `multisa bench`"
_TITLES = {
    "pytorch-eager": "PyTorch eager",
    "pytorch-channels-last-autocast": "PyTorch channels_last + autocast",
    "pytorch-compile": "torch.compile",
    "onnxruntime-cpu": "ONNX Runtime, CPU",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}

Row = Mapping[str, Any]
Bench = Mapping[str, Any]


def read_bench(path: Path) -> dict[str, Any]:
    """Read and check a bench.json. Raises UsageError with what is wrong and what to do."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}: {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: got a file that is not JSON, expected a report: {_REMEDY}") from error
    try:
        validate_bench(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return dict(data)


def validate_bench(data: object) -> None:
    """Check schema version, structure and the needed keys. Raises UsageError (got, expected, what to do)."""
    if not isinstance(data, Mapping):
        raise _wrong("the file", data, "an object")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise _wrong("schema_version", version, str(SCHEMA_VERSION))
    if not isinstance(data.get("environment"), Mapping):
        raise _wrong("environment", data.get("environment"), "an object")
    for stage, keys in ROW_KEYS.items():
        rows = data.get(stage, [])
        if not isinstance(rows, list):
            raise _wrong(stage, rows, "a list")
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise _wrong(f"{stage}[{index}]", row, "an object")
            for key in keys[: REQUIRED[stage]]:
                if not isinstance(row.get(key), str):
                    raise _wrong(f"{stage}[{index}].{key}", row.get(key), "a text")


def _wrong(where: str, value: object, expected: str) -> UsageError:
    kinds = {list: "a list", dict: "an object", str: "a text"}
    got = next((name for kind, name in kinds.items() if isinstance(value, kind)), str(value)[:40])
    return UsageError(f"{where}: got {got}, expected {expected}: {_REMEDY}")


def row_key(stage: str, row: Row) -> tuple[str, ...]:
    """The values by which rows of two reports are the same row."""
    return tuple(str(row.get(key) or "") for key in ROW_KEYS[stage])


def rows_of(bench: Bench, stage: str) -> list[Row]:
    """The rows of a stage that ran; [] for a stage that is not in the report."""
    return [row for row in bench.get(stage) or () if not row.get("problem")]


def baseline_of(rows: Sequence[Row], device: object) -> Row | None:
    """The row that others on this device are compared with, else one of another device."""
    baselines = [row for row in rows if row.get("baseline") and not row.get("problem")]
    same = [row for row in baselines if row.get("device") == device]
    return next(iter([*same, *baselines]), None)


def is_ours(stage: str, row: Row) -> bool:
    """Whether the row runs our code; the others are what ours is compared with."""
    if stage == "segment":
        return not str(row["backend"]).startswith("pytorch")
    return str(row["recipe" if stage == "label" else "way"]).startswith(OURS)


def nested(row: Row, keys: Sequence[str]) -> Any:
    """What is at nested `keys`; None where nothing is."""
    found: Any = row
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _finite(found: object) -> float | None:
    is_number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if is_number else None  # type: ignore[arg-type]


def value(row: Row, *keys: str) -> float | None:
    """The finite number at nested `keys`; None where there is none."""
    return _finite(nested(row, keys))


def numbers(row: Row, *keys: str) -> tuple[float, ...]:
    """The positive numbers of the list at nested `keys`; empty where there is none."""
    found = nested(row, keys)
    figures = map(_finite, found if isinstance(found, list) else ())
    return tuple(figure for figure in figures if figure is not None and figure > 0)


def curve(row: Row, name: str, x: str, y: str) -> dict[float, float]:
    """A curve's positive values by x, of the points that have both."""
    points = row.get(name)
    pairs = [(value(p, x), value(p, y)) for p in points] if isinstance(points, list) else []
    return dict(sorted((a, b) for a, b in pairs if a and b and a > 0 and b > 0))


def end_to_end(row: Row) -> float | None:
    """Images per second from file to file: the row's own figure, else the median of its rounds."""
    own = value(row, "images_per_second")
    return own if own is not None else _median(row, "end_to_end")


def loop_rate(row: Row) -> float | None:
    """Images per second in the plain loop: the median of its rounds."""
    return _median(row, "loop")


def _median(row: Row, key: str) -> float | None:
    rates = numbers(row, key, "images_per_second")
    return float(median(rates)) if rates else None


def backend_name(row: Row) -> str:
    """Backend and precision: "ONNX Runtime, CPU fp32"."""
    backend = str(row.get("backend") or "")
    device = str(row.get("device") or "cpu")
    elsewhere = device != "cpu" and device not in backend and not backend.startswith("tensorrt")
    name = f"{_TITLES.get(backend, backend)} {row.get('precision') or ''}"
    return one_line(f"{name}, {device}" if elsewhere else name)


def row_name(stage: str, row: Row) -> str:
    """Name of a row in tables, figures and comparisons of its stage."""
    if stage == "segment":
        return backend_name(row)
    if stage == "kernels":
        threads = row.get("threads")
        several = f", {threads} threads" if threads not in (None, 1) else ""
        return one_line(f"{row['kernel']}: {row['way']} {row.get('size') or ''}{several}")
    recipe = str(row["recipe"])
    return one_line(f"{recipe}, {backend_name(row)}" if recipe.startswith(OURS) else recipe)


def one_line(text: str) -> str:
    """`text` in one line without control characters: names may come from somebody else's file."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def number(figure: float | None, digits: int = 3) -> str:
    """A figure with about `digits` significant digits: "25,349", "31.2", "0.0021"; NOTHING for None."""
    if figure is None:
        return NOTHING
    if figure == 0:
        return "0"
    if abs(figure) < 1e-4:
        return f"{figure:.1e}"
    if abs(figure) < 1:
        return f"{figure:.{digits}g}"
    return f"{figure:,.{max(digits - len(str(int(abs(figure)))), 0)}f}"
