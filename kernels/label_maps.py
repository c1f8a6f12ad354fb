"""From class maps to labels: bilinear resizing, a constant background and the division by the sum, argmax.

For example:

    probabilities = scores_to_probabilities(walked, (375, 500), background=0.3)   # [C, h, w] -> [1 + C, H, W]
    mask, confidence = argmax_labels(probabilities, (0, 3, 5))                    # uint8 [H, W] each

Device arrays stay on their device. On the CPU these are plain NumPy and the reference of the CUDA kernels;
`multisa.runtime.predict.postprocess` resizes with Pillow, whose BILINEAR filter this is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.backend import Backend, choose_backend
from multisa.kernels.stencil import check_integer

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]

MAX_LABEL_ID = 255  # masks are uint8


@dataclass(frozen=True)
class Taps:
    """Which inputs make each output of one axis, and how much of them.

    first, count: int32 [outputs]; weights: float32 [outputs, most], 0 from `count` on; they sum to one.
    """

    first: Int32
    count: Int32
    weights: Float32


def bilinear_taps(inputs: int, outputs: int) -> Taps:
    """Lay out Pillow's BILINEAR filter along one axis: half-pixel centres, widened when shrinking.

    After precompute_coeffs of Pillow's libImaging/Resample.c, in double. Where the sizes are equal each
    output is its input.
    """
    check_integer("inputs", inputs, minimum=1)
    check_integer("outputs", outputs, minimum=1)
    scale = inputs / outputs
    widened = max(scale, 1.0)
    centres = (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centres - widened + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + widened + 0.5).astype(np.int64), inputs)
    count = last - first
    most = int(count.max())
    steps = np.arange(most)
    distance = np.abs((first[:, None] + steps - centres[:, None] + 0.5) / widened)
    weights = np.where(steps < count[:, None], np.maximum(1.0 - distance, 0.0), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return Taps(first.astype(np.int32), count.astype(np.int32), weights.astype(np.float32))


def resize_maps(maps: Float32, size: tuple[int, int], *, backend: Backend = "auto") -> Float32:
    """Resize float32 [C, h, w] to [C, *size] as Pillow's BILINEAR does, within 1e-5 of the maps' range.

    `backend` is as in `random_walk`. Raises TypeError for another dtype, ValueError for another shape.
    """
    if choose_backend("resize_maps", backend, maps) == "cuda":
        from multisa.kernels.cuda import calls, label_calls

        there: Float32 = label_calls.resize_on_device(maps, size, calls.default_device())
        return there
    _check_maps("maps", maps)
    rows, columns = (bilinear_taps(*pair) for pair in zip(maps.shape[1:], size, strict=True))
    across = _resampled(maps.swapaxes(1, 2), columns).swapaxes(1, 2)
    return np.ascontiguousarray(_resampled(across, rows), dtype=np.float32)


def scores_to_probabilities(
    scores: Float32,
    size: tuple[int, int],
    *,
    background: float,
    gains: Sequence[float] | None = None,
    to_peak: bool = False,
    backend: Backend = "auto",
) -> Float32:
    """Resize class scores, weigh them, put a constant background before them and divide by the sum.

    scores: float32 [C, h, w] >= 0, C >= 1; gains: C factors, None for ones; to_peak: divide by the one
    highest score first, where it is above 0. Returns float32 [1 + C, *size], each pixel summing to one.
    `backend` is as in `random_walk`. Raises TypeError for another dtype, ValueError for another shape or
    value.
    """
    if not 0 < background < math.inf:
        raise ValueError(f"background: got {background}, expected a finite number above 0")
    channels = scores.shape[0] if len(scores.shape) == 3 else 0
    factors = np.ones(channels, np.float32) if gains is None else np.asarray(gains, dtype=np.float32)
    if factors.shape != (channels,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"gains: got {gains}, expected {channels} finite numbers above 0, one for each map")
    if choose_backend("scores_to_probabilities", backend, scores) == "cuda":
        from multisa.kernels.cuda import calls, label_calls

        there: Float32 = label_calls.probabilities_on_device(
            scores, size, background, factors, to_peak, calls.default_device()
        )
        return there
    _check_maps("scores", scores)
    peak = float(scores.max(initial=0.0)) if to_peak else 1.0
    resized = resize_maps(scores, size, backend="cpu") / np.float32(peak if peak > 0 else 1.0)
    stacked = np.concatenate([np.full((1, *size), background, np.float32), resized * factors[:, None, None]])
    return np.asarray(stacked / stacked.sum(axis=0, keepdims=True), dtype=np.float32)


def argmax_labels(
    probabilities: Float32, ids: Sequence[int], *, backend: Backend = "auto"
) -> tuple[UInt8, UInt8]:
    """Give each pixel the id of its most probable label, the first of equals, and how sure that is.

    probabilities: float32 [L, H, W] in [0, 1]; ids: L class ids, 0..255. Returns the mask, uint8 [H, W], and
    the confidence, uint8 [H, W]: 255 times the highest probability, rounded as the segmenter's graph does.
    `backend` is as in `random_walk`. Raises TypeError for another dtype, ValueError for another shape or
    value.
    """
    labels = probabilities.shape[0] if len(probabilities.shape) == 3 else 0
    listed = np.asarray(ids, dtype=np.int32)
    if listed.shape != (labels,) or not ((listed >= 0) & (listed <= MAX_LABEL_ID)).all():
        raise ValueError(f"ids: got {list(ids)}, expected {labels} class ids of 0..{MAX_LABEL_ID}")
    if choose_backend("argmax_labels", backend, probabilities) == "cuda":
        from multisa.kernels.cuda import calls, label_calls

        there: tuple[UInt8, UInt8] = label_calls.argmax_on_device(
            probabilities, listed, calls.default_device()
        )
        return there
    _check_maps("probabilities", probabilities)
    mask = listed.astype(np.uint8)[probabilities.argmax(axis=0)]
    return mask, confidence_levels(probabilities.max(axis=0))


def confidence_levels(confidence: Float32) -> UInt8:
    """Turn probabilities, float32 in [0, 1], into uint8 0..255, rounded as the segmenter's graph does."""
    return np.asarray(confidence.clip(0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _resampled(maps: Float32, taps: Taps) -> Float32:
    """Apply the taps along the middle axis of [C, n, m]: sums in double, rounded once, as Pillow does."""
    index = np.minimum(taps.first[:, None] + np.arange(taps.weights.shape[1]), maps.shape[1] - 1)
    total = np.zeros((maps.shape[0], len(taps.first), maps.shape[2]))
    for tap in range(index.shape[1]):
        total += maps[:, index[:, tap]] * taps.weights[:, tap, None].astype(np.float64)
    return total.astype(np.float32)


def _check_maps(name: str, maps: Float32) -> None:
    """Raise TypeError or ValueError unless these are float32 [C, h, w] with something in them."""
    if not isinstance(maps, np.ndarray) or maps.dtype != np.float32:
        got = getattr(maps, "dtype", type(maps).__name__)
        raise TypeError(f"{name}: got {got}, expected a float32 array; use .astype(numpy.float32)")
    if maps.ndim != 3 or maps.size == 0:
        raise ValueError(f"{name}: got shape {list(maps.shape)}, expected [C, h, w] with no size 0")
