"""Which nodes of a graph a lower precision harms: measured in groups, a bounded number of times.

The graph is run with one group of nodes lowered and all others as they were; groups that take more than their
share of what may differ are halved until the nodes at fault stand alone, and those keep their precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GROUPS = 8  # to start with
MAX_RUNS = 40


@dataclass(frozen=True)
class Trial:
    """One measurement: these nodes lowered, `lowered` of them in number, from `first` to `last`."""

    first: str
    last: str
    lowered: int
    share: float  # of what the parity gate allows, 1 = its limit; infinite where values were not finite


@dataclass(frozen=True)
class SelectedBackend:
    """The nodes that keep their precision, with the share that lowering them alone takes, and all trials."""

    kept: dict[str, float]
    share: float  # with all other nodes lowered
    trials: tuple[Trial, ...]

    def as_json(self) -> dict[str, object]:
        """Values for a report; an infinite share is null."""
        return {
            "kept": self.kept_json(),
            "share_of_limit": _number(self.share),
            "trials": [
                {"first": t.first, "last": t.last, "lowered": t.lowered, "share_of_limit": _number(t.share)}
                for t in self.trials
            ],
        }

    def kept_json(self) -> dict[str, float | None]:
        """The nodes kept and their shares, infinite ones as null."""
        return {name: _number(share) for name, share in self.kept.items()}


@dataclass
class _Search:
    share_of: Callable[[Sequence[str]], float]
    trials: list[Trial] = field(default_factory=list)

    def measure(self, nodes: Sequence[str]) -> float:
        if not nodes:
            return 0.0
        share = self.share_of(nodes)
        # A NaN compares as neither more nor less than anything, so it is never let through as a number.
        share = share if math.isfinite(share) else math.inf
        self.trials.append(Trial(nodes[0], nodes[-1], len(nodes), share))
        return share


def choose_kept(
    nodes: Sequence[str],
    share_of: Callable[[Sequence[str]], float],
    *,
    allowed: float = 0.5,
    max_runs: int = MAX_RUNS,
) -> SelectedBackend:
    """Choose what of `nodes`, in the order they run, keeps its precision.

    share_of: the share of the parity limits used when only the given nodes are lowered. The choice is done
    when lowering all that are left takes at most `allowed`. After `max_runs` measurements whole groups are
    kept, the worse half of them at a time, so that at most 2 log2(len(nodes)) more are made.
    """
    search = _Search(share_of)
    kept: dict[str, float] = {}
    share = search.measure(nodes)
    if share <= allowed:
        return SelectedBackend({}, share, tuple(search.trials))
    size = max(math.ceil(len(nodes) / GROUPS), 1)
    groups = [(search.measure(part), part) for part in _split(nodes, size)]
    while share > allowed and groups:
        groups.sort(key=lambda group: group[0], reverse=True)
        spent = len(search.trials) >= max_runs
        worst = [part for _, part in groups[: (len(groups) + 1) // 2 if spent else 1]]
        if not spent and len(worst[0]) > 1:
            halves = _split(worst[0], math.ceil(len(worst[0]) / 2))
            groups[:1] = [(search.measure(part), part) for part in halves]
            continue
        for single, part in groups[: len(worst)]:
            kept.update(dict.fromkeys(part, single))
        del groups[: len(worst)]
        share = search.measure([name for name in nodes if name not in kept])
    return SelectedBackend(kept, share, tuple(search.trials))


def _split(nodes: Sequence[str], size: int) -> list[Sequence[str]]:
    return [nodes[start : start + size] for start in range(0, len(nodes), size)]


def _number(share: float) -> float | None:
    return float(f"{share:.3g}") if math.isfinite(share) else None
