"""Two reports compared: what is slower, larger or less accurate than it was, beyond noise.

comparison = compare_benches(new, read_bench(Path("old/bench.json")))
print(comparison.text())
"""

from collections.abc import Mapping
from typing import Any

from multisa.benchmarks.report.changes import Change, Comparison
from multisa.benchmarks.report.pair import StagePair
from multisa.benchmarks.report.schema import STAGES, cut_texts, validate_bench
from multisa.runtime.errors import UsageError

_LARGEST_TOLERANCE = 10.0


def compare_benches(new: Mapping[str, Any], old: Mapping[str, Any], *, tolerance: float = 0.1) -> Comparison:
    """Compare the rows of two reports that have the same names.

    tolerance: the share by which a time may be longer, unless its repeats scatter by more. Times count only
    where they are longer also against PyTorch eager and the recipes and kernels of others, measured beside
    them; on another machine these ratios alone are compared. Memory, start-up, mIoU, agreement of labels and
    the model's size have limits of their own (judge.py). A row that ran then and has a problem now is a
    regression; rows of others' code are none for being slower, or for not running. What failures
    say is cut in the new one, where it is too long for a report.

    Raises UsageError for what is no report, and for a tolerance outside 0 to 10.
    """
    if not 0 <= tolerance <= _LARGEST_TOLERANCE:
        raise UsageError(f"tolerance: got {tolerance}, expected a share from 0 to 10, such as 0.1")
    new = cut_texts(new) if isinstance(new, dict) else new
    validate_bench(new)
    validate_bench(old)
    changes: list[Change] = []
    unmatched: list[str] = []
    notes: dict[str, list[str]] = {}  # the stages that each is of
    for stage in STAGES:
        present = [name for name, bench in (("old", old), ("new", new)) if bench.get(stage)]
        if len(present) < 2:
            unmatched += [f"{stage}: only in the {name} report" for name in present]
            continue
        pair = StagePair(stage, new, old, tolerance)
        for note in pair.notes():
            notes.setdefault(note, []).append(stage)
        changes += pair.changes()
        unmatched += pair.unmatched()
    told = (f"{', '.join(stages)}: {note}" for note, stages in notes.items())
    return Comparison(tuple(changes), tuple(unmatched), tuple(told))
