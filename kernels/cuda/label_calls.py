"""The functions of label_maps.py as one call: device arrays stay there, NumPy arrays go there and back."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.calls import KEPT, DeviceArray, View, queued_alone
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.label_maps import DeviceLabelMaps, queue_argmax


@queued_alone
def resize_on_device(maps: Any, size: tuple[int, int], device: Device) -> Any:
    """`multisa.kernels.resize_maps` on a device."""
    view, (count, *source) = _maps(device, "maps", maps)
    out = DeviceArray(device, (count, *size))
    _maps_of(device, (source[0], source[1]), size).resize(view.pointer, count, out.pointer)
    return out if view.on_device else out.numpy()


@queued_alone
def probabilities_on_device(
    scores: Any,
    size: tuple[int, int],
    background: float,
    gains: npt.NDArray[np.float32],
    to_peak: bool,
    device: Device,
) -> Any:
    """`multisa.kernels.scores_to_probabilities` on a device; waits for the upload of the gains."""
    view, (count, *source) = _maps(device, "scores", scores)
    out = DeviceArray(device, (1 + count, *size))
    factors = View(device, "gains", gains)
    _maps_of(device, (source[0], source[1]), size).probabilities(
        view.pointer, count, out.pointer, background=background, gains=factors.pointer, to_peak=to_peak
    )
    return out if view.on_device else out.numpy()


@queued_alone
def argmax_on_device(probabilities: Any, ids: npt.NDArray[np.int32], device: Device) -> tuple[Any, Any]:
    """`multisa.kernels.argmax_labels` on a device; waits for the upload of the ids."""
    view, (labels, height, width) = _maps(device, "probabilities", probabilities)
    listed = View(device, "ids", ids, np.int32)
    mask, confidence = (DeviceArray(device, (height, width), np.uint8) for _ in range(2))
    queue_argmax(
        device, view.pointer, listed.pointer, labels, height * width, mask.pointer, confidence.pointer
    )
    return (mask, confidence) if view.on_device else (mask.numpy(), confidence.numpy())


def _maps(device: Device, name: str, array: Any) -> tuple[View, tuple[int, ...]]:
    """Where the device can read float32 [C, h, w], and its shape; raises as on the CPU."""
    view = View(device, name, array)
    if len(view.shape) != 3 or 0 in view.shape:
        raise ValueError(f"{name}: got shape {list(view.shape)}, expected [C, h, w] with no size 0")
    return view, view.shape


@functools.lru_cache(maxsize=KEPT)
def _maps_of(device: Device, source: tuple[int, int], target: tuple[int, int]) -> DeviceLabelMaps:
    return DeviceLabelMaps(device, source, target)
