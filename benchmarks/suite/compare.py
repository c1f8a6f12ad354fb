"""`multisa bench --compare OLD`: a run that is slower than an old one, beyond noise, fails."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multisa.benchmarks.report import compare_benches, validate_bench
from multisa.runtime.errors import MultisaError, UsageError

_LARGEST = 64 << 20  # bytes of a bench.json


class RegressionError(MultisaError):
    """Something is slower, larger or less accurate than it was."""

    exit_code = 3


def read_bench(path: Path) -> dict[str, Any]:
    """Read a bench.json. Raises UsageError for what is none."""
    if not path.is_file():
        raise UsageError(f"{path}: is no file, expected the bench.json of an earlier `multisa bench`")
    if path.stat().st_size > _LARGEST:
        raise UsageError(f"{path}: over {_LARGEST >> 20} MiB, expected a bench.json")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no JSON ({error}), expected a bench.json") from error
    try:
        validate_bench(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return dict(data)


def check_against(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """The comparison as text. Raises RegressionError, the text its message, where something got worse."""
    comparison = compare_benches(new, old)
    text = str(comparison.text())
    if comparison.regressions:
        raise RegressionError(f"worse than before:\n{text}")
    return text
