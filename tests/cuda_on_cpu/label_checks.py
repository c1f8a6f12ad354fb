"""What the kernels around the walk must do on any `Device`: on the CPU, under sanitisers and on a GPU.

LD_PRELOAD=libtsan.so python label_checks.py LIBRARY      # every kernel once on a library of kernels.cu
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crf_checks import put
from PIL import Image

from multisa.kernels import confidence_levels
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.label_maps import DeviceLabelMaps, queue_argmax, queue_enlarge, queue_take_errors

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
TOLERANCE = 2e-6  # of values up to 1: sums of a few products in float32, of shrinking many


def scores(count: int, height: int, width: int, seed: int = 0) -> Float32:
    """Class maps in [0, 1] that leave neither end out."""
    maps = np.random.default_rng(seed).random((count, height, width), dtype=np.float32) ** 3
    maps.flat[0] = 0
    maps.flat[-1] = 1
    return maps


def fetch(device: Device, pointer: int, shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Copy an array from the device."""
    array = np.empty(shape, dtype)
    device.download(pointer, array)
    return array


def resize_reference(maps: Float32, size: tuple[int, int]) -> Float32:
    """Resize float32 [C, h, w] to [C, *size] with Pillow, whose BILINEAR filter the kernels implement."""
    images = [Image.fromarray(one).resize(size[::-1], Image.Resampling.BILINEAR) for one in maps]
    return np.stack([np.asarray(image) for image in images])


def probabilities_reference(
    maps: Float32, size: tuple[int, int], background: float, gains: tuple[float, ...] | None, to_peak: bool
) -> Float32:
    """Resize class maps, weigh them, put the background before them and divide by the sum."""
    peak = float(maps.max()) if to_peak and maps.max() > 0 else 1.0
    factors = np.ones(len(maps), np.float32) if gains is None else np.array(gains, np.float32)
    weighed = resize_reference(maps, size) / np.float32(peak) * factors[:, None, None]
    stacked = np.concatenate([np.full((1, *size), background, np.float32), weighed])
    return np.asarray(stacked / stacked.sum(axis=0), np.float32)


def check_resize(device: Device, count: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    """All maps, and some of them in another order."""
    maps = scores(count, *source)
    there = put(device, maps)
    resizer = DeviceLabelMaps(device, source, target)
    out = device.allocate(4 * count * target[0] * target[1])
    resizer.resize(there.pointer, count, out.pointer)
    expected = resize_reference(maps, target)
    np.testing.assert_allclose(fetch(device, out.pointer, expected.shape), expected, rtol=0, atol=TOLERANCE)
    chosen = np.arange(count, dtype=np.int32)[::-2].copy()
    listed = put(device, chosen)
    resizer.resize(there.pointer, len(chosen), out.pointer, channels=listed.pointer)
    got = fetch(device, out.pointer, (len(chosen), *target))
    np.testing.assert_allclose(got, expected[chosen], rtol=0, atol=TOLERANCE)


def check_probabilities(
    device: Device,
    count: int,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    to_peak: bool = False,
    gains: tuple[float, ...] | None = None,
) -> None:
    """Against NumPy; the result sums to one and no label wins everywhere."""
    maps = scores(count, *source) * np.float32(0.6)
    there, factors = put(device, maps), put(device, np.array(gains or (1.0,) * count, np.float32))
    out = device.allocate(4 * (1 + count) * target[0] * target[1])
    DeviceLabelMaps(device, source, target).probabilities(
        there.pointer, count, out.pointer, background=0.25, gains=factors.pointer if gains else 0, to_peak=to_peak
    )
    expected = probabilities_reference(maps, target, 0.25, gains, to_peak)
    got = fetch(device, out.pointer, expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.sum(axis=0), 1, atol=1e-6)
    if source[0] * source[1] > 20:
        assert len(np.unique(got.argmax(axis=0))) == 1 + count


def check_no_peak(device: Device) -> None:
    """Maps that are all zero: background everywhere, no division by zero."""
    maps = put(device, np.zeros((2, 5, 4), np.float32))
    out = device.allocate(4 * 3 * 9 * 8)
    DeviceLabelMaps(device, (5, 4), (9, 8)).probabilities(maps.pointer, 2, out.pointer, background=0.3, to_peak=True)
    got = fetch(device, out.pointer, (3, 9, 8))
    np.testing.assert_array_equal(got[0], 1)
    np.testing.assert_array_equal(got[1:], 0)


def check_argmax(device: Device, labels: int, height: int, width: int) -> None:
    """Exactly NumPy's answer, ties included; the copied probabilities are rounded once."""
    probabilities = scores(labels, height, width)
    # A few values over and over, so that most pixels have a tie.
    probabilities[:, : height // 2] = np.round(probabilities[:, : height // 2] * 3) / np.float32(3)
    ids = np.random.default_rng(1).permutation(256)[:labels].astype(np.int32)
    pixels = height * width
    there, listed = put(device, probabilities), put(device, ids)
    mask, confidence, copy = (device.allocate(size) for size in (pixels, pixels, 2 * labels * pixels))
    addresses = there.pointer, listed.pointer, labels, pixels, mask.pointer, confidence.pointer
    queue_argmax(device, *addresses, probabilities_out=copy.pointer)
    expected = (ids.astype(np.uint8)[probabilities.argmax(axis=0)], confidence_levels(probabilities.max(axis=0)))
    for buffer, array in zip((mask, confidence), expected, strict=True):
        np.testing.assert_array_equal(fetch(device, buffer.pointer, array.shape, np.uint8), array)
    got = fetch(device, copy.pointer, probabilities.shape, np.float16)
    np.testing.assert_array_equal(got, probabilities.astype(np.float16))


def enlarge_reference(probabilities: Float32, size: tuple[int, int]) -> Float64:
    """Interpolate [C, h, w] bilinearly to [C, *size] in float64: half-pixel centres, repeated edges."""
    maps = probabilities.astype(np.float64)
    for axis, pixels in ((1, size[0]), (2, size[1])):
        points = maps.shape[axis]
        place = np.clip((np.arange(pixels) + 0.5) * points / pixels - 0.5, 0, points - 1)
        before = np.floor(place).astype(int)
        share = (place - before).reshape((-1, 1) if axis == 1 else -1)
        after = np.minimum(before + 1, points - 1)
        maps = maps.take(before, axis) * (1 - share) + maps.take(after, axis) * share
    return maps


def check_enlarged(labels: UInt8, confidence: UInt8, probabilities: Float32, ids: npt.NDArray[Any]) -> None:
    """The labels are the reference's where its two highest differ, the confidences are rounded from its highest."""
    reference = enlarge_reference(probabilities, (labels.shape[0], labels.shape[1]))
    highest = reference.max(axis=0)
    chosen = np.where(ids[:, None, None] == labels, reference, -1).max(axis=0)
    assert (chosen >= highest - 3e-7).all()
    assert np.abs(confidence - 255 * highest).max() <= 0.5 + 1e-4


def check_enlarge(device: Device, classes: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    """Against float64; and the first of equals where every class is there twice."""
    probabilities = scores(classes, *source)
    pixels = target[0] * target[1]
    mask, confidence = (device.allocate(pixels) for _ in range(2))
    for count in {classes, 2 * classes}:
        ids = np.random.default_rng(1).permutation(256)[:count].astype(np.int32)
        given = np.concatenate([probabilities] * (count // classes))
        there, listed = put(device, given), put(device, ids)
        addresses = there.pointer, listed.pointer, count, source, target, mask.pointer, confidence.pointer
        queue_enlarge(device, *addresses)
        labels, levels = (fetch(device, buffer.pointer, target, np.uint8) for buffer in (mask, confidence))
        check_enlarged(labels, levels, probabilities, ids[:classes])


def check_errors(device: Device) -> None:
    """Words are moved once; a missing one counts as none."""
    walk, crf = (put(device, np.array([value], np.uint32)) for value in (5, 2))
    out = device.allocate(8)
    for expected in ([5, 2], [0, 0]):
        queue_take_errors(device, walk.pointer, crf.pointer, out.pointer)
        assert fetch(device, out.pointer, (2,), np.uint32).tolist() == expected
    queue_take_errors(device, 0, 0, out.pointer)
    assert fetch(device, out.pointer, (2,), np.uint32).tolist() == [0, 0]


def main() -> None:
    """Run every kernel on a small problem."""
    from cpu_device import CpuDevice

    device = CpuDevice(Path(sys.argv[1]))
    check_resize(device, 3, (5, 7), (19, 13))
    check_probabilities(device, 2, (5, 7), (18, 26), to_peak=True, gains=(1.5, 0.5))
    check_argmax(device, 3, 9, 31)
    check_enlarge(device, 3, (3, 4), (37, 35))
    check_errors(device)
    print("checked")


if __name__ == "__main__":
    main()
