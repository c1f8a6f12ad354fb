"""Parameters and limits of the dense CRF."""

from dataclasses import dataclass, fields

from multisa.kernels.common.checks import FLOAT32_LARGEST, FLOAT32_SMALLEST, check_integer

# The unary energy treats probabilities below this as this value (unary_from_softmax of pydensecrf).
PROBABILITY_FLOOR = 1e-5

# Mean field converges within about ten iterations. A larger number is a mistake that would run for hours.
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class CrfParameters:
    """Parameters of the dense CRF. The defaults are those of psa; widths are standard deviations."""

    iterations: int = 10
    spatial_sxy: float = 3.0  # pixels
    spatial_compat: float = 3.0  # weight of the spatial kernel
    bilateral_sxy: float = 80.0  # pixels
    bilateral_srgb: float = 13.0  # grey levels of 0..255
    bilateral_compat: float = 10.0  # weight of the bilateral kernel

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError, naming the field, for an invalid value."""
        if check_integer("iterations", self.iterations, minimum=0) > MAX_ITERATIONS:
            raise ValueError(f"iterations: got {self.iterations}, expected 0..{MAX_ITERATIONS}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            is_weight = field.name.endswith("compat")
            smallest = 0.0 if is_weight else FLOAT32_SMALLEST
            if not smallest <= value <= FLOAT32_LARGEST:
                expected = "of at least 0" if is_weight else "above 0"
                raise ValueError(f"{field.name}: got {value}, expected a finite number {expected}")
