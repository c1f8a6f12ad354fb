"""The fully connected CRF that sharpens class probabilities along image edges.

    refined = DenseCRF(image, CrfParameters()).infer(probabilities)

Mean field of Kraehenbuehl & Koltun (2011): Potts model, a spatial and a bilateral Gaussian kernel with
symmetric normalisation, with the conventions and defaults of the pydensecrf package, so that published
parameters carry over.
"""

import functools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from multisa.kernels.backend import choose_backend
from multisa.kernels.native import native
from multisa.kernels.stencil import check_integer

if TYPE_CHECKING:
    from multisa.kernels._native import Lattice

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
CrfBackend = Literal["auto", "cpu", "cuda", "pydensecrf"]

# Probabilities below this count as this in the unary energy (pydensecrf's unary_from_softmax).
PROBABILITY_FLOOR = 1e-5

# Mean field settles within some ten iterations; more than this is a mistake that would take hours.
MAX_ITERATIONS = 1000

# Labels that may take part at once (csrc/cpu/mean_field.hpp), as many as uint8 masks can tell apart.
MAX_LABELS = 256

# Of float32, in which the kernels calculate.
SMALLEST, LARGEST = float(np.finfo(np.float32).smallest_normal), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CrfParameters:
    """Numbers of the dense CRF; the defaults are those of psa. Widths are standard deviations."""

    iterations: int = 10
    spatial_sxy: float = 3.0  # pixels
    spatial_compat: float = 3.0  # weight of the spatial kernel
    bilateral_sxy: float = 80.0  # pixels
    bilateral_srgb: float = 13.0  # grey levels of 0..255
    bilateral_compat: float = 10.0  # weight of the bilateral kernel

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError, naming the field, for a value without meaning."""
        if check_integer("iterations", self.iterations, minimum=0) > MAX_ITERATIONS:
            raise ValueError(f"iterations: got {self.iterations}, expected 0..{MAX_ITERATIONS}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name.endswith("compat"):
                valid, expected = 0 <= value <= LARGEST, "of at least 0"
            else:
                valid, expected = SMALLEST <= value <= LARGEST, "above 0"
            if not valid:
                raise ValueError(f"{field.name}: got {value}, expected a finite number {expected}")


class DenseCRF:
    """The dense CRF of one image; builds its lattices once and refines any number of unaries with them."""

    def __init__(self, image: UInt8, parameters: CrfParameters | None = None) -> None:
        """Prepare for an image, uint8 [h, w, 3] RGB; the default parameters are CrfParameters().

        Raises TypeError for another dtype, ValueError for another shape.
        """
        _check_image(image)
        self.parameters = CrfParameters() if parameters is None else parameters
        height, width = image.shape[:2]
        self._shape = (height, width)
        self._crf = native.dense_crf(
            np.ascontiguousarray(image),
            _spatial_lattice(height, width, self.parameters.spatial_sxy),
            self.parameters.bilateral_sxy,
            self.parameters.bilateral_srgb,
            self.parameters.bilateral_compat,
            self.parameters.spatial_compat,
        )

    def infer(self, probabilities: Float32) -> Float32:
        """Refine class probabilities, float32 [L, h, w] -> float32 [L, h, w] that sum to one over L.

        The unary energy is -log of the probabilities clipped to [1e-5, 1]; they need not sum to one. A label
        that is nowhere above 1e-5 while another is takes no part and stays 0: its share would be of that
        order, and the cost grows with the labels. Raises TypeError for another dtype, ValueError for another
        shape or NaN.
        """
        _check_probabilities(probabilities, self._shape)
        highest = probabilities.max(axis=(1, 2))
        present = np.flatnonzero(highest > PROBABILITY_FLOOR)
        if len(present) == 0:
            present = np.arange(len(probabilities))
        if len(present) > MAX_LABELS:
            raise ValueError(
                f"probabilities: got {len(present)} labels, expected at most {MAX_LABELS} present"
            )
        refined = np.zeros(probabilities.shape, dtype=np.float32)
        self._crf.infer(
            np.ascontiguousarray(probabilities), present.tolist(), refined, self.parameters.iterations
        )
        return refined

    def infer_labels(self, labels: UInt8, n_labels: int, confidence: float = 0.7) -> Float32:
        """Refine a hard label map, uint8 [h, w] of 0..n_labels-1, trusted with probability `confidence`.

        The other labels share 1 - confidence; label 0 is a label like any other. Returns float32
        [n_labels, h, w] that sums to one, all ones where n_labels is 1. Raises TypeError or ValueError.
        """
        if check_integer("n_labels", n_labels, minimum=1) > MAX_LABELS:
            raise ValueError(f"n_labels: got {n_labels}, expected at most {MAX_LABELS}")
        if not isinstance(labels, np.ndarray) or labels.dtype != np.uint8:
            raise TypeError(f"labels: got {_kind(labels)}, expected a uint8 array [h, w]")
        if labels.shape != self._shape or labels.max() >= n_labels:
            raise ValueError(
                f"labels: got shape {list(labels.shape)} with values up to {labels.max(initial=0)}, expected "
                f"{list(self._shape)} as the image and values below n_labels = {n_labels}"
            )
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence}, expected a probability between 0 and 1")
        if n_labels == 1:
            return np.ones((1, *self._shape), dtype=np.float32)
        refined = np.empty((n_labels, *self._shape), dtype=np.float32)
        self._crf.infer_labels(np.ascontiguousarray(labels), confidence, refined, self.parameters.iterations)
        return refined


def dense_crf(
    image: UInt8,
    probabilities: Float32,
    *,
    iterations: int = 10,
    spatial_sxy: float = 3.0,
    spatial_compat: float = 3.0,
    bilateral_sxy: float = 80.0,
    bilateral_srgb: float = 13.0,
    bilateral_compat: float = 10.0,
    backend: CrfBackend = "auto",
) -> Float32:
    """Refine class probabilities along the edges of an image.

    image: uint8 [h, w, 3] RGB; probabilities: float32 [L, h, w]; or both with a batch in front. Returns
    float32 of the probabilities' shape that sums to one over L. The numbers are those of `CrfParameters`.
    backend="pydensecrf" asks the reference package instead, to compare with; the others are as in
    `random_walk`. Raises TypeError, ValueError, or ImportError when that package is not installed.
    """
    parameters = CrfParameters(
        iterations, spatial_sxy, spatial_compat, bilateral_sxy, bilateral_srgb, bilateral_compat
    )
    if backend not in get_args(CrfBackend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(CrfBackend))}")
    if backend != "pydensecrf" and choose_backend("dense_crf", backend, image, probabilities) == "cuda":
        from multisa.kernels.cuda import calls

        there: Float32 = calls.dense_crf_on_device(image, probabilities, parameters, calls.default_device())
        return there
    refine = _infer_with_pydensecrf if backend == "pydensecrf" else _infer_on_cpu
    if getattr(image, "ndim", 3) != 4:
        return refine(image, probabilities, parameters)
    if len(image) != len(probabilities):
        raise ValueError(
            f"probabilities: got a batch of {len(probabilities)}, expected {len(image)} as the images"
        )
    return np.stack([refine(*pair, parameters) for pair in zip(image, probabilities, strict=True)])


def _infer_on_cpu(image: UInt8, probabilities: Float32, parameters: CrfParameters) -> Float32:
    """Run the compiled kernel."""
    return DenseCRF(image, parameters).infer(probabilities)


def _infer_with_pydensecrf(image: UInt8, probabilities: Float32, parameters: CrfParameters) -> Float32:
    """Run the same inference in the pydensecrf package."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "backend 'pydensecrf' needs the package pydensecrf2; run pip install pydensecrf2 or use "
            "backend='cpu'"
        ) from error
    _check_image(image)
    height, width = image.shape[:2]
    _check_probabilities(probabilities, (height, width))
    crf = DenseCRF2D(width, height, len(probabilities))
    crf.setUnaryEnergy(_unary_from_probabilities(probabilities))
    crf.addPairwiseGaussian(sxy=parameters.spatial_sxy, compat=parameters.spatial_compat)
    crf.addPairwiseBilateral(
        sxy=parameters.bilateral_sxy,
        srgb=parameters.bilateral_srgb,
        rgbim=np.array(image, order="C"),  # the package asks for a writable buffer
        compat=parameters.bilateral_compat,
    )
    belief = np.asarray(crf.inference(parameters.iterations), dtype=np.float32)
    return belief.reshape(probabilities.shape)


def forget_lattices() -> None:
    """Give back the lattices that are kept for the next images of the same sizes."""
    _spatial_lattice.cache_clear()


@functools.lru_cache(maxsize=4)
def _spatial_lattice(height: int, width: int, sxy: float) -> "Lattice":
    """Build the spatial kernel's lattice, which depends on the image's size alone: corpora repeat a few."""
    return native.spatial_lattice(height, width, sxy)


def _unary_from_probabilities(probabilities: Float32) -> Float32:
    """Turn [L, h, w] into energies [L, h * w]."""
    unary = -np.log(np.clip(probabilities, np.float32(PROBABILITY_FLOOR), np.float32(1)))
    return np.ascontiguousarray(unary.reshape(len(probabilities), -1))


def _kind(value: object) -> str:
    """Name what was given instead of an array of the right type."""
    return f"{getattr(value, 'dtype', type(value).__name__)}"


def _check_image(image: UInt8) -> None:
    """Raise TypeError or ValueError unless `image` is uint8 [h, w, 3] with at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise TypeError(f"image: got {_kind(image)}, expected a uint8 array [h, w, 3] of 0..255 RGB")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: got shape {list(image.shape)}, expected [h, w, 3] RGB with h, w >= 1")


def _check_probabilities(probabilities: Float32, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless `probabilities` is float32 [L, *shape] without NaN, L >= 1."""
    if not isinstance(probabilities, np.ndarray) or probabilities.dtype != np.float32:
        raise TypeError(
            f"probabilities: got {_kind(probabilities)}, expected a float32 array [L, h, w]; "
            "use .astype(numpy.float32)"
        )
    if probabilities.ndim != 3 or probabilities.shape[1:] != shape or len(probabilities) == 0:
        raise ValueError(
            f"probabilities: got shape {list(probabilities.shape)}, expected [L, {shape[0]}, {shape[1]}] as "
            "the image, L >= 1; resize the maps to the image first"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: got NaN or infinity, expected finite values")
