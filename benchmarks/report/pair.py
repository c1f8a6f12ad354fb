"""One stage of two reports: which rows are the same, and which of their figures can be compared."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from multisa.benchmarks.report.cells import Row, full_name, number, plain
from multisa.benchmarks.report.changes import BETTER, SAME, WORSE, Change
from multisa.benchmarks.report.figures import (
    ACCURACIES,
    RATIO,
    RATIOS,
    TIME,
    Figure,
    common,
    figures,
    is_ours,
)
from multisa.benchmarks.report.judge import judge, noise_of
from multisa.benchmarks.report.schema import row_key

# Keys of the environment by which times, and by which accuracies, are not comparable.
_MACHINE = ("processor", "cores", "instruction_set", "quick")
_DATA = ("data.digest", "bundle.sha256")
_NAMES = {
    "data.digest": "the photographs",
    "bundle.sha256": "the bundle",
    "instruction_set": "instruction set",
}
_YARDSTICK_FIGURES = ("latency p50", "end to end", "median")


class StagePair:
    """The rows of one stage in two reports, both checked."""

    def __init__(self, stage: str, new: Mapping[str, Any], old: Mapping[str, Any], tolerance: float) -> None:
        self.stage, self.tolerance = stage, tolerance
        self._environments = new["environment"], old["environment"]
        self._new, self._old = ({row_key(stage, row): row for row in bench[stage]} for bench in (new, old))
        # Kernels know neither photographs nor networks.
        data = () if stage == "kernels" else _DATA
        self._machine = self._differing(*_MACHINE, *data)
        self._accuracy = self._differing("quick", *data)
        self._gpus = self._differing("gpus")
        reference = [
            next((key for key, row in rows.items() if row.get("reference")), None)
            for rows in (self._new, self._old)
        ]
        self._one_reference = reference[0] == reference[1]
        self._yardsticks = self._found_yardsticks()

    def notes(self) -> Iterator[str]:
        """What was not compared and why, and whether the machine was as it was."""
        if self._machine:
            yield (
                f"{'; '.join(self._machine)}. Times, start-up and memory are not compared, only ratios to "
                "what was measured beside them."
            )
            if self._accuracy and self.stage != "kernels":
                yield "mIoU and agreement of labels are not compared either."
            if not self._one_reference:
                yield "the reference is not as then: ratios to it are not compared."
            return
        for found in self._yardsticks.values():
            for name, factor in found:
                if abs(factor - 1) > self.tolerance:
                    yield (
                        f"{name} takes {number(factor)} times as long as then, and is not ours: the machine "
                        "was not as it was."
                    )

    def changes(self) -> Iterator[Change]:
        """Every figure that can be compared, row by row of the old report."""
        for key, old in self._old.items():
            new = self._new.get(key)
            if new is None or self._other_gpus(old):
                continue
            name = full_name(self.stage, new)
            runs, ran = not new.get("problem"), not old.get("problem")
            if ran and not runs:
                reason = f"ran then, and now: {plain(str(new['problem']))}"
                yield Change(self.stage, name, "runs", "", None, None, WORSE, reason)
            elif runs and not ran:
                yield Change(self.stage, name, "runs", "", None, None, BETTER, "did not run then")
            elif runs:
                yield from self._row(name, old, new)

    def unmatched(self) -> Iterator[str]:
        """What only one of the reports has."""
        for one, other, which in ((self._old, self._new, "old"), (self._new, self._old, "new")):
            for key, row in one.items():
                name = f"{self.stage}: {full_name(self.stage, row)}"
                if key not in other:
                    yield f"{name}: only in the {which} report"
                elif self._other_gpus(row):
                    if which == "old":
                        yield f"{name}: {'; '.join(self._gpus)}"
                elif not row.get("problem") and not other[key].get("problem"):
                    mine, theirs = figures(self.stage, row), figures(self.stage, other[key])
                    for figure in mine:
                        if figure not in theirs:
                            yield f"{name}, {figure}: only in the {which} report"

    def _row(self, name: str, old: Row, new: Row) -> Iterator[Change]:
        then, now = figures(self.stage, old), figures(self.stage, new)
        for label, figure in then.items():
            if label not in now or not self._comparable(figure, new):
                continue
            values = common(figure, now[label])
            if values is None:
                continue
            noise = noise_of(figure, now[label], self.tolerance)
            drift = 1.0 if figure.kind in RATIOS else self._drift(new)
            outcome, verdict = judge(figure.kind, *values, noise, drift)
            if (
                noise is not None
                and figure.kind not in RATIOS
                and not is_ours(self.stage, new)
                and outcome != SAME
            ):
                outcome, verdict = SAME, f"{verdict}, not ours"
            yield Change(self.stage, name, label, figure.unit, *values, outcome, verdict, noise)

    def _differing(self, *keys: str) -> list[str]:
        """What of the environment is not as it was, in words."""
        found = []
        for key in keys:
            new, old = (_of_environment(environment, key) for environment in self._environments)
            if new != old:
                values = "" if "." in key else f" ({old} then, {new} now)"  # digests say nothing to people
                found.append(f"{_NAMES.get(key, key)} not as then{values}")
        return found

    def _other_gpus(self, row: Row) -> bool:
        return bool(self._gpus) and row.get("device") == "cuda"

    def _comparable(self, figure: Figure, row: Row) -> bool:
        if figure.kind in ACCURACIES:
            return not self._accuracy
        if figure.kind not in RATIOS:
            return not self._machine
        # On one machine the times say it already; the reference's ratio to itself says nothing.
        to_reference = figure.kind == RATIO
        return bool(self._machine) and not (
            to_reference and (row.get("reference") or not self._one_reference)
        )

    def _found_yardsticks(self) -> dict[tuple[str, str], list[tuple[str, float]]]:
        """(name, how many times as long as then) of what is not ours and ran in both, by kernel and size."""
        found = defaultdict(list)
        for key, old in self._old.items():
            new = self._new.get(key)
            if new is None or is_ours(self.stage, new) or old.get("problem") or new.get("problem"):
                continue
            if self.stage == "segment" and not (old.get("reference") and new.get("reference")):
                continue
            then, now = figures(self.stage, old), figures(self.stage, new)
            label = next((one for one in _YARDSTICK_FIGURES if one in then and one in now), None)
            if label is not None:
                factor = now[label].value / then[label].value
                time = factor if then[label].kind == TIME else 1 / factor
                found[self._place(new)].append((full_name(self.stage, new), time))
        return dict(found)

    def _drift(self, row: Row) -> float:
        """How many times as long the machine takes for what has not changed; 1 where nothing tells."""
        found = self._yardsticks.get(self._place(row))
        return median(factor for _, factor in found) if found else 1.0

    def _place(self, row: Row) -> tuple[str, str]:
        return (str(row["kernel"]), str(row.get("size"))) if self.stage == "kernels" else ("", "")


def _of_environment(environment: Row, key: str) -> str:
    """The value of "key" or "key.key" as text."""
    first, _, second = key.partition(".")
    found = (environment.get(first) or {}).get(second) if second else environment.get(first)
    if key == "quick":
        return "yes" if found else "no"
    return (
        plain(", ".join(map(str, found)) if isinstance(found, list | tuple) else str(found or "")) or "none"
    )
