"""Settings of the random walk and the Chebyshev series that shortens it."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import FLOAT32_LARGEST, FLOAT32_SMALLEST, Float32, check_integer
from multisa.kernels.common.stencil import Boundary, check_boundary, stencil_offsets

# Bound of the truncated Chebyshev tail, relative to the range of the scores. float32 sums err by 1e-5.
CHEBYSHEV_TOLERANCE = 1e-4

# The compiled kernel counts steps in an int; a walk converges long before.
MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class WalkSettings:
    """The numbers of `multisa.kernels.random_walk`, under the same names."""

    radius: int = 5  # of the stencil, in pixels of the grid
    beta: float = 8.0  # elementwise power of the affinities
    steps: int = 256
    exact: bool = False  # take every step instead of the Chebyshev series
    boundary: Boundary = "full"

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError, naming the field, for an invalid value."""
        stencil_offsets(self.radius)
        if check_integer("steps", self.steps, minimum=0) > MAX_STEPS:
            raise ValueError(f"steps: got {self.steps}, expected at most {MAX_STEPS}")
        if not FLOAT32_SMALLEST <= self.beta <= FLOAT32_LARGEST:
            raise ValueError(f"beta: got {self.beta}, expected a finite number above 0")
        check_boundary(self.boundary)

    def chebyshev_series(self) -> list[float]:
        """Return the coefficients that replace the steps, or an empty list to take every step."""
        degree = self.steps if self.exact else chebyshev_degree(self.steps)
        return chebyshev_coefficients(self.steps, degree) if degree < self.steps else []


def chebyshev_degree(steps: int) -> int:
    """Return the least degree whose tail bound 2 exp(-degree^2 / (2 steps)) is below CHEBYSHEV_TOLERANCE.

    It is 72 for 256 steps and never more than `steps`, where the series is exact.
    """
    degree = math.ceil(math.sqrt(2 * steps * math.log(2 / CHEBYSHEV_TOLERANCE)))
    return min(degree - (degree - steps) % 2, steps)  # coefficients of the other parity vanish


@functools.lru_cache(maxsize=16)
def chebyshev_coefficients(steps: int, degree: int) -> list[float]:
    """Expand x^steps on [-1, 1] in Chebyshev polynomials up to `degree`, scaled to sum to one.

    c_k = 2^(1-steps) binomial(steps, (steps - k) / 2), halved for k = 0, zero where steps - k is odd. The sum
    is the value at 1, the eigenvalue of a constant map: with sum one, a constant map stays unchanged.
    """
    series = [0.0] * (degree + 1)
    first = steps % 2
    series[first] = 1.0
    for k in range(first, degree - 1, 2):
        series[k + 2] = series[k] * (steps - k) / (steps + k + 2)  # ratio of neighbouring binomials
    series[0] /= 2
    total = math.fsum(series)
    return [coefficient / total for coefficient in series]


def check_walk_values(scores: Float32, affinity: Float32, mask: npt.NDArray[np.bool_]) -> None:
    """Raise ValueError unless the scores are finite and the affinities of the pairs in `mask` in [0, 1]."""
    if not np.isfinite(scores).all():
        raise ValueError("scores: got NaN or infinity, expected finite values; check the network's output")
    pairs = affinity[..., mask]
    if pairs.size and not (pairs.min() >= 0 and pairs.max() <= 1):
        raise ValueError(f"affinity: got values from {pairs.min()} to {pairs.max()}, expected [0, 1] without NaN")
