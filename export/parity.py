"""Does a graph answer as the network it came from? Measured elementwise and on labels."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import ParityError

Array = npt.NDArray[np.generic]
Outputs = dict[str, Array]


@dataclass(frozen=True)
class Limit:
    """What one output may differ by; None where a figure does not apply."""

    max_error: float | None = None
    mean_error: float | None = None
    agreement: float | None = None  # share of equal labels, at least


# The only table of tolerances. Weights are stored as float16 (relative rounding 5e-4), sums are float32.
LIMITS: dict[str, Limit] = {
    "cam": Limit(max_error=0.05, mean_error=2e-3),
    "scores": Limit(max_error=0.01),
    "affinity": Limit(max_error=0.1, mean_error=2e-3),
    "labels": Limit(agreement=0.999),
    "confidence": Limit(mean_error=1.0),  # of 255
    "pseudo_mask": Limit(agreement=0.998),
}


@dataclass
class Difference:
    """Running comparison of one output over many photographs."""

    max_error: float = 0.0
    total_error: float = 0.0
    equal: int = 0
    count: int = 0
    not_finite: int = 0

    def add(self, reference: Array, answer: Array) -> None:
        """Compare two arrays of one shape."""
        if reference.shape != answer.shape:
            raise ParityError(f"shapes differ: network {reference.shape}, graph {answer.shape}")
        self.count += reference.size
        self.equal += int((reference == answer).sum())
        wide = np.abs(reference.astype(np.float64) - answer.astype(np.float64))
        finite = np.isfinite(wide)
        self.not_finite += int((~finite).sum())
        self.max_error = max(self.max_error, float(wide[finite].max(initial=0.0)))
        self.total_error += float(wide[finite].sum())

    @property
    def mean_error(self) -> float:
        """Mean absolute difference."""
        return self.total_error / max(self.count, 1)

    @property
    def agreement(self) -> float:
        """Share of equal values."""
        return self.equal / max(self.count, 1)

    def problems(self, name: str) -> list[str]:
        """What exceeds the limits of the output `name`, in words."""
        limit, found = LIMITS[name], []
        if self.not_finite:
            found.append(f"{name}: {self.not_finite} values are not finite")
        if limit.max_error is not None and self.max_error > limit.max_error:
            found.append(f"{name}: largest difference {self.max_error:.3g}, allowed {limit.max_error:g}")
        if limit.mean_error is not None and self.mean_error > limit.mean_error:
            found.append(f"{name}: mean difference {self.mean_error:.3g}, allowed {limit.mean_error:g}")
        if limit.agreement is not None and self.agreement < limit.agreement:
            found.append(f"{name}: {self.agreement:.4%} of the labels agree, needed {limit.agreement:.2%}")
        return found


@dataclass
class ParityReport:
    """Differences by output name over `photographs` photographs."""

    photographs: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Everything beyond its limit; empty when the graphs may be shipped."""
        return [line for name, difference in self.differences.items() for line in difference.problems(name)]

    def as_json(self) -> dict[str, object]:
        """Figures for the bundle's manifest."""
        return {
            "photographs": self.photographs,
            **{
                name: {
                    "max_error": float(f"{d.max_error:.3g}"),
                    "mean_error": float(f"{d.mean_error:.3g}"),
                    "equal": round(d.agreement, 6),
                }
                for name, d in self.differences.items()
            },
        }


def check_parity(pairs: Iterable[tuple[Outputs, Outputs]]) -> ParityReport:
    """Compare what the networks and the graphs gave for each photograph, output by output.

    pairs: (outputs of the networks, outputs of the graphs), with equal names. Raises ParityError, naming
    every figure beyond its limit.
    """
    report = ParityReport()
    for expected, got in pairs:
        for name, values in expected.items():
            report.differences.setdefault(name, Difference()).add(values, got[name])
        report.photographs += 1
    if report.photographs == 0:
        raise ParityError("no photograph to compare on; give a data set with at least one")
    problems = report.problems()
    if problems:
        raise ParityError("the exported graphs answer differently from the networks: " + "; ".join(problems))
    return report
