"""Whether a plan is for every photograph that a bundle may meet."""

from collections.abc import Sequence
from itertools import product

from multisa.runtime.engines.plans import Profile, Shape
from multisa.runtime.images import MINIMUM_SIDE


def uncovered_shape(profiles: Sequence[Profile], long_side: int) -> Shape | None:
    """The first shape of one photograph with sides of MINIMUM_SIDE..long_side that no profile covers.

    None where there is none. What is not covered is made of rectangles, and the smallest corner of each lies
    where a profile begins or has just ended, or at the smallest side, so those corners are all to look at.
    """
    sides = []
    for axis in (1, 2):
        edges = {edge for p in profiles for edge in (p.minimum[axis], p.maximum[axis] + 1)}
        sides.append(sorted({MINIMUM_SIDE} | {e for e in edges if MINIMUM_SIDE <= e <= long_side}))
    shapes = ((1, height, width) for height, width in product(*sides))
    return next((shape for shape in shapes if not any(p.covers(shape) for p in profiles)), None)
