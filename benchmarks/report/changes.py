"""What a comparison of two reports finds, and how it is told."""

from dataclasses import dataclass

from multisa.benchmarks.report.cells import number, times
from multisa.benchmarks.report.text import aligned

WORSE, BETTER, SAME = "regression", "improvement", "same"
_EXACT = ("mIoU", "labels alike")  # figures whose fifth digit counts


@dataclass(frozen=True)
class Change:
    """One figure then and now; both None where the change is that a row runs, or does not."""

    stage: str
    row: str
    figure: str
    unit: str
    old: float | None
    new: float | None
    outcome: str  # WORSE, BETTER or SAME
    verdict: str
    noise: float | None = None  # the share by which a time must be longer to count
    by_turns: float | None = None  # now over then: the median over turns, where these are compared

    @property
    def ratio(self) -> float | None:
        """Now over then."""
        if self.by_turns is not None:
            return self.by_turns
        return self.new / self.old if self.new is not None and self.old else None

    def __str__(self) -> str:
        """One line: "segment: OpenVINO fp32, latency p50: 30.0 ms then, 40.0 ms now: slower"."""
        what = f"{self.stage}: {self.row}, {self.figure}"
        if self.old is None or self.new is None:
            return f"{what}: {self.verdict}"
        unit = f" {self.unit}".rstrip()
        turns = "" if self.by_turns is None else f" ({times(self.by_turns)} turn by turn)"
        return (
            f"{what}: {self._shown(self.old)}{unit} then, {self._shown(self.new)}{unit} now{turns}: "
            f"{self.verdict}"
        )

    def cells(self) -> tuple[str, ...]:
        """Its line of the table, as `Comparison.text` has it."""
        return (
            f"{self.stage}: {self.row}",
            self.figure,
            "" if self.old is None else self._shown(self.old),
            "" if self.new is None else self._shown(self.new),
            self.unit,
            self._difference(),
            "" if self.noise is None else f"{self.noise:.0%}",
            f"{'WORSE: ' * (self.outcome == WORSE)}{self.verdict}",
        )

    def _difference(self) -> str:
        """The ratio; of shares of pixels the difference, which is what counts there."""
        if self.old is None or self.new is None:
            return ""
        if self.figure in _EXACT:
            return f"{self.new - self.old:+.{2 if self.figure == 'mIoU' else 4}f}"
        return "" if self.ratio is None else times(self.ratio)

    def _shown(self, figure: float) -> str:
        return number(figure, 5 if self.figure in _EXACT else 3)


@dataclass(frozen=True)
class Comparison:
    """All figures that both reports have, what only one has, and notes on what was not compared and why."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What is worse than it was."""
        return tuple(change for change in self.changes if change.outcome == WORSE)

    @property
    def improvements(self) -> tuple[Change, ...]:
        """What is better than it was."""
        return tuple(change for change in self.changes if change.outcome == BETTER)

    def text(self) -> str:
        """The notes, a table of all that was compared, what only one report has, and the sum."""
        lines = [*self.notes]
        if self.changes:
            head = ("compared", "figure", "then", "now", "unit", "change", "noise", "verdict")
            rows = [head, *(change.cells() for change in self.changes)]
            lines += [*([""] if lines else []), *aligned(rows, words={0, 1, 4, 7}), ""]
        lines += [f"not compared: {line}" for line in self.unmatched]
        worse, better = len(self.regressions), len(self.improvements)
        rest = len(self.changes) - worse - better
        found = [f"worse: {change}" for change in self.regressions]
        return "\n".join([*lines, *found, f"{worse} worse, {better} better, {rest} as before"])
