"""The search finds the nodes at fault, in a bounded number of runs, and never ends above what is allowed."""

import math
from collections.abc import Sequence

import pytest

from multisa.export.sensitivity import find_sensitive_nodes

NODES = [f"n{i}" for i in range(200)]


def test_nothing_is_kept_when_nothing_harms() -> None:
    result = find_sensitive_nodes(NODES, lambda nodes: 0.5)
    assert result.kept == {} and len(result.trials) == 1


@pytest.mark.parametrize("harm", [2.0, math.inf, math.nan])
def test_the_nodes_at_fault_are_found(harm: float) -> None:
    guilty = {"n17": harm, "n150": harm}

    def share(nodes: Sequence[str]) -> float:
        return sum(guilty.get(name, 1e-3) for name in nodes)

    result = find_sensitive_nodes(NODES, share)
    assert set(result.kept) == set(guilty)
    assert result.share == pytest.approx(0.198)
    assert len(result.trials) < 40
    assert set(result.kept_json().values()) == {harm if math.isfinite(harm) else None}


def test_harm_spread_over_all_nodes_ends_within_the_limit_and_the_runs() -> None:
    runs = 0

    def share(nodes: Sequence[str]) -> float:
        nonlocal runs
        runs += 1
        return 0.01 * len(nodes)

    result = find_sensitive_nodes(NODES, share, max_runs=30)
    assert result.share <= 0.5
    assert 0 < len(result.kept) < len(NODES)
    assert runs == len(result.trials) <= 30 + 2 * math.log2(len(NODES))


def test_a_graph_that_fails_whatever_is_converted_keeps_everything() -> None:
    result = find_sensitive_nodes(NODES, lambda nodes: math.nan if nodes else 0.0)
    assert set(result.kept) == set(NODES)
    assert result.share == 0
