"""The head of Multi-SA with its layers as trained, computing what a folded one does: the inverse of fold.py.

Folding multiplies matrices, so their factors are lost; any that have the products will do, and cost as much:

    query = M^T g^2,  M = W_1^T W_2       W_1 = query, W_2 = 1, g = 1
    direct = P g                          fusion 1, the classifier's columns of a level = direct
    value = beta P W_3 g                  beta = 1, W_3 = the least squares solution of direct W_3 = value
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Of value: the part that no W_3 gives. Folded from a network there is one; where there are more classes than
# channels, rounding to float16 puts some 5e-4 of direct and value beside it.
LARGEST_REST = 0.01


def unfolded_head(folded: Mapping[str, Tensor], n_levels: int) -> dict[str, Tensor]:
    """State of `MultiSACAM`, but for the backbone and `level_gain`, from that of `FoldedMultiSACAM`.

    folded: float32 levels.I.{query,direct,value}.weight [c or C, c, 1, 1] of the `n_levels` taps, or
    classifier.weight without taps. Raises ValueError, naming the level, where value has no such factor.
    """
    if not n_levels:
        return {"classifier.weight": folded["classifier.weight"]}
    state: dict[str, Tensor] = {}
    projections = []
    for level in range(n_levels):
        query, direct, value = (
            folded[f"levels.{level}.{name}.weight"].double()[:, :, 0, 0]
            for name in ("query", "direct", "value")
        )
        state |= {
            f"attention.{level}.query.weight": _weight(query),
            f"attention.{level}.key.weight": _weight(torch.eye(len(query), dtype=torch.float64)),
            f"attention.{level}.value.weight": _weight(_factor(direct, value, level)),
            f"attention.{level}.beta": torch.ones(()),
        }
        projections.append(direct)
    classifier = torch.cat(projections, 1)
    state["fuse.weight"] = _weight(torch.eye(classifier.shape[1], dtype=torch.float64))
    state["classifier.weight"] = _weight(classifier)
    return state


def _factor(direct: Tensor, value: Tensor, level: int) -> Tensor:
    """Solve direct W = value, float64 [C, c] both, for W [c, c], the smallest where there are many."""
    factor = torch.linalg.lstsq(direct, value, driver="gelsd").solution
    rest = float(torch.linalg.norm(direct @ factor - value))
    size = float(torch.linalg.norm(value))
    if not rest <= LARGEST_REST * size:
        raise ValueError(
            f"levels.{level}: no projection makes value out of direct: got a rest of {rest:.3g} beside "
            f"{size:.3g}, expected at most {LARGEST_REST:g} of it"
        )
    return torch.as_tensor(factor)


def _weight(matrix: Tensor) -> Tensor:
    return matrix.float()[:, :, None, None]
