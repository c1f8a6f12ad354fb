"""`multisa bench --compare OLD`: a run that is slower than an old one, beyond noise, fails."""

from collections.abc import Mapping
from typing import Any

from multisa.benchmarks.report import compare_benches
from multisa.runtime.errors import MultisaError, UsageError


class RegressionError(MultisaError):
    """Something is slower, larger or less accurate than it was."""

    exit_code = 3


def check_against(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """The comparison as text. Raises RegressionError, the text its message, where something got worse."""
    comparison = compare_benches(new, old)
    text = comparison.text()
    if not comparison.changes:
        raise UsageError(f"nothing was compared, expected a report with some of the same stages:\n{text}")
    if comparison.regressions:
        raise RegressionError(f"worse than before:\n{text}")
    return text
