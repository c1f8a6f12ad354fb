"""Find the nodes of a graph that a lower precision harms, with a bounded number of measurements.

Each measurement runs the graph with one group of nodes converted and all others in fp32. Groups that use more
than their share of the parity limits are halved until the harmful nodes stand alone; those stay in fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GROUPS = 8  # the search starts with this many
MAX_RUNS = 40  # measurements before whole groups are kept; each runs the graph on a few images
# Share of the parity limits that the measured images may use: the other half is left for images unlike them.
ALLOWED_SHARE = 0.5


@dataclass(frozen=True)
class Trial:
    """One measurement, with `converted` nodes from `first` to `last` in the lower precision."""

    first: str
    last: str
    converted: int
    share: float  # of the parity limits, 1 = at the limit; infinite if values were not finite

    def as_json(self) -> dict[str, object]:
        nodes = {"first": self.first, "last": self.last, "converted": self.converted}
        return {**nodes, "share_of_limit": _number(self.share)}


@dataclass(frozen=True)
class SearchResult:
    """The nodes that stay in fp32, and every measurement that led to them."""

    kept: dict[str, float]  # node -> share of the limits used when it (or its group) alone is converted
    share: float  # used when all other nodes are converted
    trials: tuple[Trial, ...]

    def as_json(self) -> dict[str, object]:
        """JSON values for a report; an infinite share is null."""
        return {
            "kept": self.kept_json(),
            "share_of_limit": _number(self.share),
            "trials": [trial.as_json() for trial in self.trials],
        }

    def kept_json(self) -> dict[str, float | None]:
        """The kept nodes and their shares; an infinite share is null."""
        return {name: _number(share) for name, share in self.kept.items()}


def find_sensitive_nodes(
    nodes: Sequence[str], share_of: Callable[[Sequence[str]], float], *, max_runs: int = MAX_RUNS
) -> SearchResult:
    """Choose which of `nodes`, in the order they run, stay in fp32.

    share_of: measures the share of the parity limits used when only the given nodes are converted. The
    search ends when converting all remaining nodes uses at most ALLOWED_SHARE. After `max_runs` measurements
    whole groups are kept, the worse half at a time, so at most 2 log2(len(nodes)) more measurements follow.
    """
    trials: list[Trial] = []
    kept: dict[str, float] = {}

    def measure(nodes: Sequence[str]) -> float:
        if not nodes:
            return 0.0
        share = share_of(nodes)
        # NaN compares as neither more nor less than any number, so it becomes infinite.
        share = share if math.isfinite(share) else math.inf
        trials.append(Trial(nodes[0], nodes[-1], len(nodes), share))
        return share

    share = measure(nodes)
    if share <= ALLOWED_SHARE:
        return SearchResult({}, share, tuple(trials))
    size = max(math.ceil(len(nodes) / GROUPS), 1)
    groups = [(measure(part), part) for part in _split(nodes, size)]
    while share > ALLOWED_SHARE and groups:
        groups.sort(key=lambda group: group[0], reverse=True)
        spent = len(trials) >= max_runs
        worst = [part for _, part in groups[: (len(groups) + 1) // 2 if spent else 1]]
        if not spent and len(worst[0]) > 1:
            halves = _split(worst[0], math.ceil(len(worst[0]) / 2))
            groups[:1] = [(measure(part), part) for part in halves]
            continue
        for single, part in groups[: len(worst)]:
            kept.update(dict.fromkeys(part, single))
        del groups[: len(worst)]
        share = measure([name for name in nodes if name not in kept])
    return SearchResult(kept, share, tuple(trials))


def _split(nodes: Sequence[str], size: int) -> list[Sequence[str]]:
    return [nodes[start : start + size] for start in range(0, len(nodes), size)]


def _number(share: float) -> float | None:
    return float(f"{share:.3g}") if math.isfinite(share) else None
