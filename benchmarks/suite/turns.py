"""Ratios of figures that were taken by turns."""

import statistics
from collections.abc import Sequence


def ratio_of_turns(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as many images a second: the median over turns, in each of which both do the same."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)
