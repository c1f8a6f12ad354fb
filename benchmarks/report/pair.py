"""One stage of two reports: which rows are the same, and which of their figures can be compared."""

from collections.abc import Iterator, Mapping
from typing import Any

from multisa.benchmarks.report.cells import OURS, Row, baseline_of, full_name, is_ours, plain, rows_of, value
from multisa.benchmarks.report.changes import BETTER, SAME, WORSE, Change
from multisa.benchmarks.report.figures import ACCURACIES, RATIO, RATIOS, SIZE, SPEEDS, Figure, common, figures
from multisa.benchmarks.report.judge import judge, noise_of
from multisa.benchmarks.report.schema import row_key
from multisa.benchmarks.report.yardsticks import Yardsticks

# Keys of the environment by which times, and by which accuracies, are not comparable.
_MACHINE = ("processor", "cores", "instruction_set", "quick")
_DATA = ("data.digest", "bundle.sha256")
_NAMES = {
    "data.digest": "the photographs",
    "bundle.sha256": "the bundle",
    "instruction_set": "instruction set",
}


class Beside:
    """Which row of a report each row's ratios are to."""

    def __init__(self, stage: str, bench: Mapping[str, Any]) -> None:
        self._stage = stage
        rows = rows_of(bench, stage)
        ours = [row for row in rows if is_ours(stage, row)]
        if stage == "kernels":
            firsts = [row for row in ours if row["way"] == OURS]
        else:
            firsts = ([row for row in ours if row.get("default")] or ours)[:1]
        self._ours = {self._place(row): row for row in firsts}
        devices = {row.get("device"): row for row in rows}
        self._baselines = {device: baseline_of(rows, row) for device, row in devices.items()}

    def of(self, row: Row) -> Row | None:
        """The baseline of one of ours; what of ours another's row is compared with."""
        if is_ours(self._stage, row):
            return self._baselines.get(row.get("device"))
        return self._ours.get(self._place(row))

    def _place(self, row: Row) -> tuple[str, ...]:
        return (str(row["kernel"]), str(row.get("size"))) if self._stage == "kernels" else ()


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
        self._beside = Beside(stage, new), Beside(stage, old)
        self._yardsticks = Yardsticks(stage, self._new, self._old, self._environments)

    def notes(self) -> Iterator[str]:
        """What was not compared and why, whether the machine was as it was, and what is not a figure."""
        if self._machine:
            yield (
                f"{'; '.join(self._machine)}. Times, start-up and memory are not compared, only ratios to "
                "what was measured beside them."
            )
            if self._accuracy and self.stage != "kernels":
                yield "mIoU and agreement of labels are not compared either."
            both = (row for key, row in self._old.items() if key in self._new and is_ours(self.stage, row))
            if not all(map(self._one_beside, both)):
                yield "the baseline is not as then: ratios to it are not compared."
        if not self._machine or not self._yardsticks.are_alike:
            yield from self._yardsticks.notes(self.tolerance)
        then, now = (
            next((row for row in rows.values() if row.get("default")), None)
            for rows in (self._old, self._new)
        )
        if then and now and row_key(self.stage, then) != row_key(self.stage, now):
            yield f"the default is {full_name(self.stage, now)}; then it was {full_name(self.stage, then)}."
        for key, old in self._old.items():
            new = self._new.get(key, {})
            if (
                new.get("problem")
                and not old.get("problem")
                and not (is_ours(self.stage, old) or self._other_gpus(old))
            ):
                name = full_name(self.stage, old)
                yield f"{name} ran then, and is not ours: now {plain(str(new['problem']))}"

    def changes(self) -> Iterator[Change]:
        """Every figure that can be compared, row by row of the old report."""
        for key, old in self._old.items():
            new = self._new.get(key)
            if new is None or self._other_gpus(old):
                continue
            name = full_name(self.stage, new)
            runs, ran = not new.get("problem"), not old.get("problem")
            if runs != ran and not is_ours(self.stage, new):
                continue  # told in the notes
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
        now, then = (
            figures(self.stage, row, beside.of(row))
            for row, beside in zip((new, old), self._beside, strict=True)
        )
        for label, figure in then.items():
            if label not in now or not self._comparable(figure, old, new):
                continue
            pair = common(figure, now[label])
            if pair is None:
                continue
            noise = noise_of(figure.kind, pair.scatter, self.tolerance)
            drift = 1.0 if figure.kind in RATIOS else self._yardsticks.drift(new)
            judged = pair.new if pair.ratio is None else pair.old * pair.ratio
            outcome, verdict = judge(figure.kind, pair.old, judged, noise, drift)
            nobodys = figure.kind not in (*RATIOS, *ACCURACIES) and not is_ours(self.stage, new)
            if nobodys and outcome != SAME:
                outcome, verdict = SAME, f"{verdict}, not ours"
            values = (pair.old, pair.new)
            yield Change(
                self.stage, name, label, figure.unit, *values, outcome, verdict, noise, by_turns=pair.ratio
            )

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

    def _comparable(self, figure: Figure, old: Row, new: Row) -> bool:
        if figure.kind in ACCURACIES:
            return not self._accuracy
        if figure.kind == SIZE:
            return not self._differing("bundle.name")  # exported anew, it is still that model
        if figure.kind in (*SPEEDS, *RATIOS) and value(old, "mean_pixels") != value(new, "mean_pixels"):
            return False  # a full run has other photographs than a quick one
        if figure.kind not in RATIOS:
            return not self._machine
        # On one machine the times say it already; the baseline's ratio to itself says nothing.
        if not self._machine or not self._yardsticks.are_alike:
            return False
        return self._one_beside(new) and not (figure.kind == RATIO and new.get("baseline"))

    def _one_beside(self, row: Row) -> bool:
        """Whether the row's ratios are to the same other row in both reports."""
        new, old = (beside.of(row) for beside in self._beside)
        return (new and row_key(self.stage, new)) == (old and row_key(self.stage, old))


def _of_environment(environment: Row, key: str) -> str:
    """The value of "key" or "key.key" as text."""
    first, _, second = key.partition(".")
    found = (environment.get(first) or {}).get(second) if second else environment.get(first)
    if key == "quick":
        return "yes" if found else "no"
    return (
        plain(", ".join(map(str, found)) if isinstance(found, list | tuple) else str(found or "")) or "none"
    )
