"""The fully connected CRF that sharpens class probabilities along image edges.

    refined = DenseCRF(image, CrfParameters()).infer(probabilities)

Mean field of Kraehenbuehl & Koltun (2011): Potts model, a spatial and a bilateral Gaussian kernel with
symmetric normalisation, and the conventions and defaults of the pydensecrf package, so that published
parameters carry over.
"""

from typing import Literal, get_args

import numpy as np

from multisa.kernels import cpu
from multisa.kernels.common.checks import Float32, UInt8, check_dtype, check_integer, choose_backend
from multisa.kernels.common.crf import PROBABILITY_FLOOR, CrfParameters

CrfBackend = Literal["auto", "cpu", "cuda", "pydensecrf"]

# Labels that may be present at once (csrc/cpu/mean_field.hpp): as many as a uint8 mask can distinguish.
MAX_LABELS = 256


class DenseCRF:
    """The dense CRF of one image on the CPU. Builds its lattices once and refines any number of unaries."""

    def __init__(self, image: UInt8, parameters: CrfParameters | None = None) -> None:
        """Build the lattices for an image, uint8 [h, w, 3] RGB; None stands for CrfParameters().

        Raises TypeError for another dtype, ValueError for another shape or widths too small for the image.
        """
        _check_image(image)
        self.parameters = CrfParameters() if parameters is None else parameters
        self._shape = (image.shape[0], image.shape[1])
        self._crf = cpu.dense_crf(image, self.parameters)

    def infer(self, probabilities: Float32) -> Float32:
        """Refine class probabilities, float32 [L, h, w] -> float32 [L, h, w] that sum to one over L.

        The unary energy is -log of the probabilities clipped to [1e-5, 1]; they need not sum to one. A label
        that exceeds 1e-5 nowhere, while another does, is left out and stays 0: its share would be of that
        order, and the cost grows with the number of labels. Raises TypeError for another dtype, ValueError
        for another shape, for NaN, or for more than 256 labels above 1e-5.
        """
        _check_probabilities(probabilities, self._shape)
        highest = probabilities.max(axis=(1, 2))
        present = np.flatnonzero(highest > PROBABILITY_FLOOR)
        if len(present) == 0:
            present = np.arange(len(probabilities))
        if len(present) > MAX_LABELS:
            raise ValueError(f"probabilities: got {len(present)} labels, expected at most {MAX_LABELS} present")
        refined = np.zeros(probabilities.shape, dtype=np.float32)
        self._crf.infer(np.ascontiguousarray(probabilities), present.tolist(), refined, self.parameters.iterations)
        return refined

    def infer_labels(self, labels: UInt8, n_labels: int, confidence: float = 0.7) -> Float32:
        """Refine a hard label map, uint8 [h, w] of 0..n_labels-1, trusted with probability `confidence`.

        The other labels share 1 - confidence; label 0 is an ordinary label. Returns float32 [n_labels, h, w]
        that sums to one over labels. Raises TypeError for another dtype, ValueError for another shape, labels
        out of range, n_labels outside 1..256 or a confidence outside (0, 1).
        """
        if check_integer("n_labels", n_labels, minimum=1) > MAX_LABELS:
            raise ValueError(f"n_labels: got {n_labels}, expected at most {MAX_LABELS}")
        check_dtype("labels", labels, np.uint8, "a uint8 array [h, w]")
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
    image: UInt8, probabilities: Float32, parameters: CrfParameters | None = None, *, backend: CrfBackend = "auto"
) -> Float32:
    """Refine class probabilities along the edges of an image (Kraehenbuehl & Koltun 2011).

    image: uint8 [h, w, 3] RGB, or [N, h, w, 3]. probabilities: float32 [L, h, w], or [N, L, h, w].
    parameters: None stands for CrfParameters(), the defaults of psa.
    backend: "pydensecrf" runs the reference package instead, for comparison; the others are as in
        `random_walk`.

    Returns float32 of the probabilities' shape that sums to one over L. Raises TypeError for another dtype,
    ValueError for another shape or value, ImportError if pydensecrf is chosen and not installed.
    """
    if backend not in get_args(CrfBackend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(CrfBackend))}")
    parameters = CrfParameters() if parameters is None else parameters
    if backend != "pydensecrf" and choose_backend("dense_crf", backend, image, probabilities) == "cuda":
        from multisa.kernels.cuda import calls

        on_device: Float32 = calls.dense_crf_on_device(image, probabilities, parameters, calls.default_device())
        return on_device
    refine = _infer_with_pydensecrf if backend == "pydensecrf" else _infer_on_cpu
    if getattr(image, "ndim", 3) != 4:
        return refine(image, probabilities, parameters)
    if len(image) != len(probabilities):
        raise ValueError(f"probabilities: got a batch of {len(probabilities)}, expected {len(image)} as the images")
    return np.stack([refine(*pair, parameters) for pair in zip(image, probabilities, strict=True)])


def _infer_on_cpu(image: UInt8, probabilities: Float32, parameters: CrfParameters) -> Float32:
    return DenseCRF(image, parameters).infer(probabilities)


def _infer_with_pydensecrf(image: UInt8, probabilities: Float32, parameters: CrfParameters) -> Float32:
    """Run the same inference in the pydensecrf package."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "backend 'pydensecrf' needs the package pydensecrf2; run pip install pydensecrf2 or use backend='cpu'"
        ) from error
    _check_image(image)
    height, width = image.shape[:2]
    _check_probabilities(probabilities, (height, width))
    # Energies [L, h * w], with the floor of pydensecrf's unary_from_softmax.
    unary = -np.log(np.clip(probabilities, np.float32(PROBABILITY_FLOOR), np.float32(1)))
    crf = DenseCRF2D(width, height, len(probabilities))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(len(probabilities), -1)))
    crf.addPairwiseGaussian(sxy=parameters.spatial_sxy, compat=parameters.spatial_compat)
    crf.addPairwiseBilateral(
        sxy=parameters.bilateral_sxy,
        srgb=parameters.bilateral_srgb,
        rgbim=np.array(image, order="C"),  # the package needs a writeable buffer
        compat=parameters.bilateral_compat,
    )
    belief = np.asarray(crf.inference(parameters.iterations), dtype=np.float32)
    return belief.reshape(probabilities.shape)


def _check_image(image: UInt8) -> None:
    """Raise TypeError or ValueError unless `image` is uint8 [h, w, 3] with at least one pixel."""
    check_dtype("image", image, np.uint8, "a uint8 array [h, w, 3] of 0..255 RGB")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: got shape {list(image.shape)}, expected [h, w, 3] RGB with h, w >= 1")


def _check_probabilities(probabilities: Float32, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless `probabilities` is float32 [L, *shape] without NaN, L >= 1."""
    expected = "a float32 array [L, h, w]; use .astype(numpy.float32)"
    check_dtype("probabilities", probabilities, np.float32, expected)
    if probabilities.ndim != 3 or probabilities.shape[1:] != shape or len(probabilities) == 0:
        raise ValueError(
            f"probabilities: got shape {list(probabilities.shape)}, expected [L, {shape[0]}, {shape[1]}] as "
            "the image, L >= 1; resize the maps to the image first"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: got NaN or infinity, expected finite values")
