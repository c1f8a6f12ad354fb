"""The kernels as one call on arrays: NumPy arrays go to the device and back, device arrays stay there.

The operations of `multisa.kernels` call these functions for backend="cuda". Memory and graphs are created
once for each shape and setting and kept for the next call. Programs that choose streams themselves, or check
errors later, use `DeviceWalk`, `DeviceAffinity`, `DeviceCRF` and `DeviceLabelMaps` instead.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.common.checks import Float32, Int32, check_out, is_device_array
from multisa.kernels.common.crf import PROBABILITY_FLOOR, CrfParameters
from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.affinity import DeviceAffinity, GridShape
from multisa.kernels.cuda.crf import CrfShape, DeviceCRF
from multisa.kernels.cuda.device import Buffer, Device, DeviceMemory
from multisa.kernels.cuda.label_maps import queue_enlarge
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape

CACHED_SHAPES = 8  # shapes and settings of walk and affinities whose memory is kept
CACHED_CRFS = 2  # of the dense CRF, which needs hundreds of megabytes per image
LEGACY_STREAM = 1  # the default stream in __cuda_array_interface__; all calls here use it

# Calls share memory and the default stream, so one thread at a time queues its work.
_QUEUE_LOCK = threading.RLock()


class DeviceArray:
    """Contiguous device memory with a shape, for anything that reads `__cuda_array_interface__`."""

    def __init__(self, device: DeviceMemory, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> None:
        """Allocate; the contents are undefined."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
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


class DeviceInput:
    """An argument that the device can read: a device array, or a copy of a NumPy array."""

    def __init__(self, device: Device, name: str, array: Any, dtype: type[np.generic] = np.float32) -> None:
        """Copy NumPy arrays. Raises TypeError for another dtype, ValueError for strided device arrays."""
        self._name = name
        self.on_device = is_device_array(array)
        if self.on_device:
            self._read_interface(device, array, np.dtype(dtype))
            return
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: got {type(array).__name__}, expected a {np.dtype(dtype)} array")
        self._check_dtype(array.dtype, np.dtype(dtype))
        copy = DeviceArray(device, array.shape, dtype)
        device.upload(copy.pointer, np.ascontiguousarray(array))
        self.shape = array.shape
        self.pointer = copy.pointer
        self._owner: Any = copy  # keeps the memory alive

    def check_shape(self, expected: tuple[int, ...]) -> None:
        """Raise ValueError unless the array has the expected shape."""
        if self.shape != expected:
            raise ValueError(f"{self._name}: got shape {list(self.shape)}, expected {list(expected)}")

    def _read_interface(self, device: Device, array: Any, dtype: np.dtype[Any]) -> None:
        """Take shape and address from `__cuda_array_interface__`, and wait for the stream that writes it."""
        interface = array.__cuda_array_interface__
        self.shape = tuple(int(size) for size in interface["shape"])
        self._check_dtype(np.dtype(interface["typestr"]), dtype)
        self._check_contiguous(interface.get("strides"), dtype.itemsize)
        self.pointer = int(interface["data"][0])
        self._owner = array
        stream = interface.get("stream")
        if stream not in (None, LEGACY_STREAM):
            device.download(self.pointer, np.empty(0, dtype), stream)

    def _check_dtype(self, got: np.dtype[Any], expected: np.dtype[Any]) -> None:
        if got != expected:
            raise TypeError(f"{self._name}: got {got}, expected {expected}; convert it first")

    def _check_contiguous(self, strides: tuple[int, ...] | None, itemsize: int) -> None:
        step = itemsize
        for size, stride in zip(reversed(self.shape), reversed(strides or ()), strict=False):
            if size > 1 and stride != step:
                raise ValueError(f"{self._name}: got strides {strides}, expected a contiguous device array")
            step *= size


@functools.lru_cache(maxsize=1)
def default_device() -> Device:
    """Open the first GPU once. Raises DeviceUnavailableError, which names the cause."""
    from multisa.kernels.cuda.pycuda_device import PycudaDevice

    return PycudaDevice()


def _serialized(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread at a time run a call."""

    @functools.wraps(call)
    def locked(*arguments: Any) -> Any:
        with _QUEUE_LOCK:
            return call(*arguments)

    return locked


@_serialized
def random_walk_on_device(scores: Any, affinity: Any, settings: WalkSettings, out: Any, device: Device) -> Any:
    """Run `multisa.kernels.random_walk`. Scores and affinity may each be a NumPy or a device array.

    The result, and `out`, are where the scores are.
    """
    scores_in = DeviceInput(device, "scores", scores)
    affinity_in = DeviceInput(device, "affinity", affinity)
    batch, (channels, height, width) = _split_batch("scores", scores_in.shape, 3)
    affinity_in.check_shape((*scores_in.shape[:-3], len(stencil_offsets(settings.radius)), height, width))
    walk = _cached_walk(device, WalkShape(batch, channels, height, width), settings)
    return _run(
        device,
        scores_in,
        scores_in.shape,
        out,
        lambda target: walk.walk(scores_in.pointer, affinity_in.pointer, target),
        walk.check,
    )


@_serialized
def affinity_on_device(name: str, array: Any, radius: int, device: Device) -> Any:
    """Run `affinity_from_features` or `affinity_from_boundary`, by the name of its argument."""
    maps = DeviceInput(device, name, array)
    batch, shape = _split_batch(name, maps.shape, 3 if name == "features" else 2)
    height, width = shape[-2:]
    kernel = _cached_affinity(device, GridShape(batch, height, width), radius)

    def queue(target: int) -> None:
        if name == "features":
            kernel.from_features(maps.pointer, shape[0], target)
        else:
            kernel.from_boundary(maps.pointer, target)

    leading = maps.shape[: len(maps.shape) - len(shape)]
    planes = len(stencil_offsets(radius))
    return _run(device, maps, (*leading, planes, height, width), None, queue, kernel.check)


@_serialized
def dense_crf_on_device(image: Any, probabilities: Any, parameters: CrfParameters, device: Device) -> Any:
    """Run `multisa.kernels.dense_crf`. For probabilities on the host, absent labels are left out."""
    pixels = DeviceInput(device, "image", image, np.uint8)
    maps = DeviceInput(device, "probabilities", probabilities)
    batch, (labels, height, width) = _split_batch("probabilities", maps.shape, 3)
    pixels.check_shape((*maps.shape[:-3], height, width, 3))
    present: DeviceInput | None = None
    count = labels
    if not maps.on_device:
        channels = _present_labels(np.asarray(probabilities).reshape(batch, labels, height, width))
        present = DeviceInput(device, "channels", channels, np.int32)
        count = channels.shape[-1]
    crf = _cached_crf(device, CrfShape(batch, height, width, count), parameters)

    def queue(target: int) -> None:
        crf.set_images(pixels.pointer)
        if present is None:
            crf.infer(maps.pointer, target)
        else:
            crf.infer(maps.pointer, target, channels=present.pointer, classes=labels)

    return _run(device, maps, maps.shape, None, queue, crf.check)


@_serialized
def enlarge_on_device(probabilities: Any, size: tuple[int, int], class_ids: tuple[int, ...], device: Device) -> Any:
    """Run `multisa.kernels.enlarge_probabilities`. Labels and confidence are where the probabilities are."""
    maps = DeviceInput(device, "probabilities", probabilities)
    ids = _cached_ids(device, class_ids)
    labels, confidence = (DeviceArray(device, size, np.uint8) for _ in range(2))
    classes, height, width = maps.shape
    addresses = maps.pointer, ids.pointer, classes, (height, width), size, labels.pointer, confidence.pointer
    queue_enlarge(device, *addresses)
    return (labels, confidence) if maps.on_device else (labels.numpy(), confidence.numpy())


def _split_batch(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, tuple[int, ...]]:
    """Split a shape of `rank` dimensions, or one more in front, into the batch and the rest."""
    if len(shape) not in (rank, rank + 1) or 0 in shape:
        raise ValueError(f"{name}: got shape {list(shape)}, expected {rank} or {rank + 1} sizes, none of them 0")
    return (shape[0] if len(shape) > rank else 1), shape[-rank:]


def _run(
    device: Device,
    source: DeviceInput,
    shape: tuple[int, ...],
    out: Any,
    queue: Callable[[int], None],
    check: Callable[[], None],
) -> Any:
    """Queue a kernel into `out`, or into new memory, on the side of its source.

    A result for the host is checked; one on the device is not, since that would wait.
    """
    if source.on_device:
        target = DeviceArray(device, shape) if out is None else out
        output = DeviceInput(device, "out", target)
        if not output.on_device:
            raise TypeError("out: got a NumPy array for input on a device, expected a device array")
        output.check_shape(shape)
        queue(output.pointer)
        return target
    check_out(out, shape)
    with contextlib.suppress(ValueError):
        check()  # clears errors of an earlier, unchecked call on device arrays
    memory = DeviceArray(device, shape)
    queue(memory.pointer)
    check()
    result = memory.numpy()
    if out is None:
        return result
    out[...] = result
    return out


def _present_labels(maps: Float32) -> Int32:
    """List the labels of each image that exceed the floor anywhere, then -1: int32 [1, N, most]."""
    present = maps.max(axis=(2, 3)) > PROBABILITY_FLOOR
    present[~present.any(axis=1)] = True
    channels = np.full((1, len(maps), int(present.sum(axis=1).max())), -1, dtype=np.int32)
    for row, labels in zip(channels[0], present, strict=True):
        row[: int(labels.sum())] = np.flatnonzero(labels)
    return channels


@functools.lru_cache(maxsize=CACHED_SHAPES)
def _cached_walk(device: Device, shape: WalkShape, settings: WalkSettings) -> DeviceWalk:
    return DeviceWalk(device, shape, settings)


@functools.lru_cache(maxsize=CACHED_SHAPES)
def _cached_affinity(device: Device, shape: GridShape, radius: int) -> DeviceAffinity:
    return DeviceAffinity(device, shape, radius)


@functools.lru_cache(maxsize=CACHED_SHAPES)
def _cached_ids(device: Device, class_ids: tuple[int, ...]) -> DeviceInput:
    return DeviceInput(device, "class_ids", np.array(class_ids, np.int32), np.int32)


@functools.lru_cache(maxsize=CACHED_CRFS)
def _cached_crf(device: Device, shape: CrfShape, parameters: CrfParameters) -> DeviceCRF:
    return DeviceCRF(device, shape, parameters)
