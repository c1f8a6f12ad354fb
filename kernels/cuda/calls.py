"""The kernels as one call on arrays: NumPy arrays go to the device and back, device arrays stay there.

`multisa.kernels.random_walk` and the others come here with backend="cuda", those of label_maps.py to
label_calls.py. Memory and graphs are made once for each shape and setting and kept for the next call. A
program that wants to choose streams itself, or to check at a moment of its own, uses `DeviceWalk`,
`DeviceAffinity`, `DeviceCRF` and `DeviceLabelMaps` instead.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.backend import is_device_array
from multisa.kernels.cuda.affinity import DeviceAffinity, GridShape
from multisa.kernels.cuda.crf import DeviceCRF
from multisa.kernels.cuda.device import Buffer, Device, DeviceMemory
from multisa.kernels.cuda.walk import DeviceWalk, WalkSettings, WalkShape
from multisa.kernels.dense_crf import PROBABILITY_FLOOR, CrfParameters
from multisa.kernels.random_walk import check_out
from multisa.kernels.stencil import stencil_offsets

KEPT = 8  # shapes and settings of walk and affinities whose memory is kept
KEPT_CRFS = 2  # of the dense CRF, which needs hundreds of megabytes for a photograph
# What __cuda_array_interface__ calls the default stream; all work here is queued on it.
LEGACY_STREAM = 1

# Calls share memory and the default stream, so one thread at a time queues its work.
_ONE_AT_A_TIME = threading.RLock()


class DeviceArray:
    """Contiguous device memory with a shape, for anything that reads `__cuda_array_interface__`."""

    def __init__(
        self, device: DeviceMemory, shape: tuple[int, ...], dtype: type[np.generic] = np.float32
    ) -> None:
        """Allocate; what it holds is not defined."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._device = device
        self._buffer: Buffer = device.allocate(int(np.prod(shape)) * self.dtype.itemsize)

    @property
    def pointer(self) -> int:
        """Device address of the first element."""
        return self._buffer.pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
            "stream": LEGACY_STREAM,
        }

    def numpy(self, stream: int = 0) -> npt.NDArray[Any]:
        """Wait for `stream` and copy to the host."""
        array = np.empty(self.shape, self.dtype)
        self._device.download(self.pointer, array, stream)
        return array


@functools.lru_cache(maxsize=1)
def default_device() -> Device:
    """The first GPU, opened once; raises DeviceUnavailableError, which says what is missing."""
    from multisa.kernels.cuda.pycuda_device import PycudaDevice

    return PycudaDevice()


def queued_alone(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread at a time run a call."""

    @functools.wraps(call)
    def alone(*arguments: Any) -> Any:
        with _ONE_AT_A_TIME:
            return call(*arguments)

    return alone


@queued_alone
def random_walk_on_device(
    scores: Any, affinity: Any, settings: WalkSettings, out: Any, device: Device
) -> Any:
    """`multisa.kernels.random_walk` on a device; scores and affinity both on the host or both there."""
    scores_in, affinity_in = View(device, "scores", scores), View(device, "affinity", affinity)
    batch, (channels, height, width) = _batch("scores", scores_in.shape, 3)
    expected = (*scores_in.shape[:-3], len(stencil_offsets(settings.radius)), height, width)
    affinity_in.expect_shape(expected)
    walk = _walk_of(device, WalkShape(batch, channels, height, width), settings)
    return _answer(
        device,
        scores_in,
        scores_in.shape,
        out,
        lambda target: walk.walk(scores_in.pointer, affinity_in.pointer, target),
        walk.check,
    )


@queued_alone
def affinity_on_device(name: str, array: Any, radius: int, device: Device) -> Any:
    """`affinity_from_features` or `affinity_from_boundary`, by the name of their argument, on a device."""
    view = View(device, name, array)
    batch, shape = _batch(name, view.shape, 3 if name == "features" else 2)
    height, width = shape[-2:]
    kernel = _affinity_of(device, GridShape(batch, height, width), radius)

    def run(target: int) -> None:
        if name == "features":
            kernel.from_features(view.pointer, shape[0], target)
        else:
            kernel.from_boundary(view.pointer, target)

    leading = view.shape[: len(view.shape) - len(shape)]
    planes = len(stencil_offsets(radius))
    return _answer(device, view, (*leading, planes, height, width), None, run, kernel.check)


@queued_alone
def dense_crf_on_device(image: Any, probabilities: Any, parameters: CrfParameters, device: Device) -> Any:
    """`multisa.kernels.dense_crf` on a device; absent labels take no part where the host can see them."""
    pixels = View(device, "image", image, np.uint8)
    maps = View(device, "probabilities", probabilities)
    batch, (labels, height, width) = _batch("probabilities", maps.shape, 3)
    pixels.expect_shape((*maps.shape[:-3], height, width, 3))
    channels = None
    taking_part = labels
    if not is_device_array(probabilities):
        channels = _present_labels(np.asarray(probabilities).reshape(batch, labels, height, width))
        taking_part = channels.shape[-1]
    crf = _crf_of(device, batch, height, width, taking_part, parameters)
    listed = View(device, "channels", channels, np.int32) if channels is not None else None

    def run(target: int) -> None:
        crf.set_images(pixels.pointer)
        if listed is None:
            crf.infer(maps.pointer, target)
        else:
            crf.infer(maps.pointer, target, channels=listed.pointer, classes=labels)

    return _answer(device, maps, maps.shape, None, run, crf.check)


class View:
    """An argument where the device can read it: an array that is there, or a copy of a NumPy array."""

    def __init__(self, device: Device, name: str, array: Any, dtype: type[np.generic] = np.float32) -> None:
        self._name, expected = name, np.dtype(dtype)
        self.on_device = is_device_array(array)
        if self.on_device:
            interface = array.__cuda_array_interface__
            self.shape = tuple(int(size) for size in interface["shape"])
            self._check_dtype(np.dtype(interface["typestr"]), expected)
            self._check_contiguous(interface.get("strides"), expected.itemsize)
            self.pointer, self._kept = int(interface["data"][0]), array
            stream = interface.get("stream")
            if stream not in (None, LEGACY_STREAM):
                device.download(self.pointer, np.empty(0, dtype), stream)  # waits for who is still writing it
            return
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: got {type(array).__name__}, expected a {expected} array")
        self._check_dtype(array.dtype, expected)
        self.shape = array.shape
        copy = DeviceArray(device, array.shape, dtype)
        device.upload(copy.pointer, np.ascontiguousarray(array))
        self.pointer, self._kept = copy.pointer, copy

    def expect_shape(self, expected: tuple[int, ...]) -> None:
        if self.shape != expected:
            raise ValueError(f"{self._name}: got shape {list(self.shape)}, expected {list(expected)}")

    def _check_dtype(self, got: np.dtype[Any], expected: np.dtype[Any]) -> None:
        if got != expected:
            raise TypeError(f"{self._name}: got {got}, expected {expected}; convert it first")

    def _check_contiguous(self, strides: tuple[int, ...] | None, itemsize: int) -> None:
        step = itemsize
        for size, stride in zip(reversed(self.shape), reversed(strides or ()), strict=False):
            if size > 1 and stride != step:
                raise ValueError(f"{self._name}: got strides {strides}, expected a contiguous device array")
            step *= size


def _batch(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, tuple[int, ...]]:
    """Split a shape of `rank` dimensions, or one more in front, into the batch and the rest."""
    if len(shape) not in (rank, rank + 1) or 0 in shape:
        raise ValueError(
            f"{name}: got shape {list(shape)}, expected {rank} or {rank + 1} sizes, none of them 0"
        )
    return (shape[0] if len(shape) > rank else 1), shape[-rank:]


def _answer(
    device: Device,
    like: View,
    shape: tuple[int, ...],
    out: Any,
    run: Callable[[int], None],
    check: Callable[[], None],
) -> Any:
    """Run into `out` or new memory, which is where the input was; a result for the host is checked."""
    if like.on_device:
        target = DeviceArray(device, shape) if out is None else out
        view = View(device, "out", target)
        if not view.on_device:
            raise TypeError("out: got a NumPy array for input on a device, expected a device array")
        view.expect_shape(shape)
        run(view.pointer)
        return target
    check_out(out, shape)
    with contextlib.suppress(ValueError):
        check()  # of an earlier call on device arrays, which nobody asked about
    memory = DeviceArray(device, shape)
    run(memory.pointer)
    check()
    result = memory.numpy()
    if out is None:
        return result
    out[...] = result
    return out


def _present_labels(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """List the labels of each image that are anywhere above the floor, -1 after the last: [1, N, most]."""
    present = maps.max(axis=(2, 3)) > PROBABILITY_FLOOR
    present[~present.any(axis=1)] = True
    channels = np.full((1, len(maps), int(present.sum(axis=1).max())), -1, dtype=np.int32)
    for row, labels in zip(channels[0], present, strict=True):
        row[: int(labels.sum())] = np.flatnonzero(labels)
    return channels


@functools.lru_cache(maxsize=KEPT)
def _walk_of(device: Device, shape: WalkShape, settings: WalkSettings) -> DeviceWalk:
    return DeviceWalk(device, shape, settings)


@functools.lru_cache(maxsize=KEPT)
def _affinity_of(device: Device, shape: GridShape, radius: int) -> DeviceAffinity:
    return DeviceAffinity(device, shape, radius)


@functools.lru_cache(maxsize=KEPT_CRFS)
def _crf_of(
    device: Device, images: int, height: int, width: int, labels: int, parameters: CrfParameters
) -> DeviceCRF:
    return DeviceCRF(device, images, height, width, labels, parameters)
