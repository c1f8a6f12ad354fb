"""Reading a report that was checked: values that may be missing, names of rows, figures as text."""

import unicodedata
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]

NOTHING = "–"  # a cell without a value
OURS = "multisa"  # how the names of our own recipes and ways begin
# Engines as people write them; others are named as they are.
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


def baseline_of(rows: Sequence[Row], row: Row) -> Row | None:
    """The row whose speed that of `row` is compared with: of its device, where there is one."""
    baselines = [one for one in rows if one.get("baseline") and not one.get("problem")]
    same = [one for one in baselines if one.get("device") == row.get("device")]
    return next(iter([*same, *baselines]), None)


def rows_of(bench: Mapping[str, Any], stage: str) -> list[Row]:
    """The rows of a stage that ran; [] for a stage that is not in the report."""
    return [row for row in bench.get(stage) or () if not row.get("problem")]


def value(row: Row, *keys: str) -> float | None:
    """The number at `keys`, one inside the other; None where any of them is missing or null."""
    found: Any = row
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def points(row: Row, curve: str, x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of a curve's points that have both, by x."""
    found = [(point.get(x), point.get(y)) for point in row.get(curve) or ()]
    return sorted((float(a), float(b)) for a, b in found if a is not None and b is not None)


def engine_name(row: Row) -> str:
    """Engine and precision: "ONNX Runtime, CPU fp32"."""
    backend, precision = str(row.get("engine") or ""), str(row.get("precision") or "")
    device = str(row.get("device") or "cpu")
    elsewhere = device != "cpu" and device not in backend and not backend.startswith("tensorrt")
    return plain(f"{_TITLES.get(backend, backend)} {precision}{f', {device}' if elsewhere else ''}")


def row_name(stage: str, row: Row) -> str:
    """What a row is called in tables and charts of its stage."""
    if stage == "segment":
        return engine_name(row)
    if stage == "kernels":
        return plain(f"{row['kernel']}: {row['way']}" if row["way"] else row["kernel"])
    # A recipe of others says itself what it runs on; ours runs on any engine.
    recipe = str(row["recipe"])
    return plain(f"{recipe}, {engine_name(row)}" if recipe.startswith(OURS) and row.get("engine") else recipe)


def full_name(stage: str, row: Row) -> str:
    """The row's name with all that tells it from others: of kernels also the size, and threads if several."""
    if stage != "kernels":
        return row_name(stage, row)
    threads = row.get("threads")
    several = f", {threads} threads" if threads is not None and threads != 1 else ""
    return plain(f"{row_name(stage, row)} {row.get('size') or ''}{several}")


def is_ours(stage: str, row: Row) -> bool:
    """Whether the row runs our code: the others are what ours is measured against."""
    if stage == "segment":
        return not str(row["engine"]).startswith("pytorch")
    return str(row["recipe" if stage == "label" else "way"]).startswith(OURS)


def end_to_end(row: Row) -> float | None:
    """Images a second from decoding to the written file: the row's figure, else the median of its repeats."""
    own = value(row, "images_per_second")
    return rate(row, "end_to_end") if own is None else own


def rate(row: Row, key: str) -> float | None:
    """Images a second, the median of the repeats: "end_to_end", or all in the same plain "loop"."""
    repeats = (row.get(key) or {}).get("images_per_second")
    return float(median(repeats)) if repeats else None


def cut_text(text: str, limit: int) -> str:
    """`text` with at most `limit` characters: its start and its end, which of a traceback says most.

    What cannot be written as UTF-8 becomes a question mark.
    """
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= limit:
        return text
    left_out = " [...] "
    start = max(limit - len(left_out), 0) // 2
    end = max(limit - len(left_out) - start, 0)
    return (text[:start] + left_out + text[len(text) - end :])[:limit]


def plain(text: str) -> str:
    """`text` in one line, without what steers a terminal or is not allowed in XML."""
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(kept).split())


def number(figure: float | None, digits: int = 3) -> str:
    """A figure with about `digits` digits that count: "25,349", "31.2", "0.0021"; NOTHING for None."""
    if figure is None:
        return NOTHING
    if figure == 0:
        return "0"
    if abs(figure) < 1e-4:
        return f"{figure:.1e}"
    whole = len(str(int(abs(figure)))) if abs(figure) >= 1 else 0
    if whole:
        return f"{figure:,.{max(digits - whole, 0)}f}"
    return f"{figure:.{digits}g}"


def count(figure: float | None) -> str:
    """A whole number: "1,024"."""
    return NOTHING if figure is None else f"{figure:,.0f}"


def short(figure: float) -> str:
    """A large number for an axis: "786k", "12.6M"; smaller ones as they are."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if figure >= size:
            return f"{figure / size:.3g}{letter}"
    return f"{figure:.3g}"


def times(ratio: float | None) -> str:
    """A ratio: "2.60×"."""
    return NOTHING if ratio is None else f"{number(ratio)}×"


def share(fraction: float | None, digits: int = 0) -> str:
    """A fraction in percent: "31 %"."""
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"
