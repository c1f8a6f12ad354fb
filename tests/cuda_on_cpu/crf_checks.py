"""What the dense CRF must do on any `Device`: shared by the tests on the CPU, under sanitisers and on a GPU.

LD_PRELOAD=libtsan.so python crf_checks.py LIBRARY      # one small problem on a library of kernels.cu
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from multisa.kernels import CrfParameters, DenseCRF
from multisa.kernels.cuda.crf import CrfShape, DeviceCRF
from multisa.kernels.cuda.device import Buffer, Device

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

PSA = CrfParameters()
IRN = replace(PSA, bilateral_sxy=50.0, bilateral_srgb=5.0)

TOLERANCE = 1e-4  # of a belief, against the CPU: sums run in another order, and the mean field can amplify that
TIE = 1e-3  # nearer than this, two labels may change places


def scene(labels: int, height: int, width: int, seed: int = 0) -> tuple[UInt8, Float32]:
    """Make an image of smooth regions, an edge and noise, and blobs of class probabilities unlike them."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.standard_normal((height, width, 3)), (6, 6, 0))
    smooth = 180 * (smooth - smooth.min()) / max(float(np.ptp(smooth)), 1e-9)
    step = 50.0 * (np.arange(width) > width // 2)
    noisy = smooth + step[:, None] + random.normal(0, 4, (height, width, 3))
    logits = 15 * gaussian_filter(random.standard_normal((labels, height, width)), (0, 3, 3))
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=0)
    return noisy.clip(0, 255).astype(np.uint8), probabilities.astype(np.float32)


def put(device: Device, array: npt.NDArray[Any]) -> Buffer:
    """Copy an array to the device."""
    buffer = device.allocate(array.nbytes)
    device.upload(buffer.pointer, np.ascontiguousarray(array))
    return buffer


def infer(
    device: Device, crf: DeviceCRF, probabilities: Float32, channels: npt.NDArray[np.int32] | None = None
) -> Float32:
    """Refine [problems, images, classes, h, w] on a DeviceCRF that has its images."""
    given = put(device, probabilities)
    listed = None if channels is None else put(device, channels)
    out = device.allocate(probabilities.nbytes)
    address = listed.pointer if listed else 0
    crf.infer(given.pointer, out.pointer, channels=address, classes=probabilities.shape[2])
    crf.check()
    result = np.empty_like(probabilities)
    device.download(out.pointer, result)
    return result


def infer_labels(device: Device, crf: DeviceCRF, given: UInt8, n_labels: int, confidence: float = 0.7) -> Float32:
    """Refine hard labels [problems, images, h, w] on a DeviceCRF that has its images."""
    labels = put(device, given)
    result = np.empty((*given.shape[:2], crf.shape.labels, *given.shape[2:]), dtype=np.float32)
    out = device.allocate(result.nbytes)
    crf.infer_labels(labels.pointer, n_labels, out.pointer, confidence=confidence)
    crf.check()
    device.download(out.pointer, result)
    return result


def prepare(
    device: Device, images: UInt8, labels: int, parameters: CrfParameters = PSA, problems: int = 1
) -> DeviceCRF:
    """Make a DeviceCRF of images [n, h, w, 3]."""
    count, height, width = images.shape[:3]
    crf = DeviceCRF(device, CrfShape(count, height, width, labels, problems), parameters)
    stored = put(device, images)
    crf.set_images(stored.pointer)
    crf.check()  # waits: the memory of the images goes with this frame
    return crf


def refine(device: Device, image: UInt8, probabilities: Float32, parameters: CrfParameters = PSA) -> Float32:
    """Refine [labels, h, w] of one image."""
    crf = prepare(device, image[None], len(probabilities), parameters)
    belief: Float32 = infer(device, crf, probabilities[None, None])[0, 0]
    return belief


def assert_close(belief: Float32, expected: Float32) -> None:
    """Compare beliefs [labels, h, w]: values, and the best label wherever it leads clearly."""
    assert np.isfinite(belief).all()
    assert np.abs(belief - expected).max() <= TOLERANCE
    if len(expected) > 1:
        best = np.sort(expected, axis=0)
        clear = best[-1] - best[-2] > TIE
        np.testing.assert_array_equal(belief.argmax(axis=0)[clear], expected.argmax(axis=0)[clear])


def check_against_cpu(device: Device, labels: int, height: int, width: int, parameters: CrfParameters) -> None:
    """Compare with the CPU; the inference must change its input, so that agreeing means something."""
    image, probabilities = scene(labels, height, width)
    expected = DenseCRF(image, parameters).infer(probabilities)
    trivial = labels == 1 or parameters.iterations == 0
    assert trivial or np.abs(expected - probabilities).max() > 0.1
    assert_close(refine(device, image, probabilities, parameters), expected)


def check_constant_image(device: Device) -> None:
    """All pixels share a few vertices: their long lists are summed by whole blocks."""
    _, probabilities = scene(3, 33, 41)
    image = np.full((33, 41, 3), 128, dtype=np.uint8)
    parameters = replace(PSA, iterations=2)
    expected = DenseCRF(image, parameters).infer(probabilities)
    assert_close(refine(device, image, probabilities, parameters), expected)


def check_batch(device: Device, height: int, width: int) -> None:
    """Two images with two problems each: to the bit what every one gives alone."""
    scenes = [scene(3, height, width, seed) for seed in range(4)]
    images = np.stack([scenes[0][0], scenes[1][0]])
    probabilities = np.stack([probability for _, probability in scenes]).reshape(2, 2, 3, height, width)
    parameters = replace(PSA, iterations=3)
    crf = prepare(device, images, 3, parameters, problems=2)
    beliefs = infer(device, crf, probabilities)
    for image in range(2):
        alone = prepare(device, images[image : image + 1], 3, parameters)
        for problem in range(2):
            expected = infer(device, alone, probabilities[problem, image][None, None])
            np.testing.assert_array_equal(beliefs[problem, image], expected[0, 0])
    assert np.abs(beliefs[0, 0] - beliefs[1, 0]).max() > 0.1


def check_channels(device: Device, height: int, width: int) -> None:
    """Of five classes three are present in one image, two in the other: the absent ones are exactly 0."""
    scenes = [scene(5, height, width, seed) for seed in range(2)]
    parameters = replace(PSA, iterations=3)
    crf = prepare(device, np.stack([image for image, _ in scenes]), 3, parameters)
    channels = np.array([[[4, 0, 2], [3, -1, 1]]], dtype=np.int32)
    probabilities = np.stack([probability for _, probability in scenes])[None]
    beliefs = infer(device, crf, probabilities, channels)[0]
    for (image, probability), belief, listed in zip(scenes, beliefs, channels[0], strict=True):
        present = listed[listed >= 0]
        assert_close(belief[present], DenseCRF(image, parameters).infer(probability[present]))
        np.testing.assert_array_equal(np.delete(belief, present, axis=0), 0)


def check_labels(device: Device, height: int, width: int) -> None:
    """Hard labels against the CPU, more labels in memory than asked for, and the trivial single label."""
    image, probabilities = scene(4, height, width)
    parameters = replace(IRN, iterations=3)
    crf = prepare(device, image[None], 5, parameters)
    for n_labels, confidence in ((4, 0.7), (2, 0.9), (1, 0.7)):
        given = probabilities[:n_labels].argmax(axis=0).astype(np.uint8)
        belief = infer_labels(device, crf, given[None, None], n_labels, confidence)[0, 0]
        assert_close(belief[:n_labels], DenseCRF(image, parameters).infer_labels(given, n_labels, confidence))
        np.testing.assert_array_equal(belief[n_labels:], 0)


SMALL = replace(PSA, iterations=1, bilateral_sxy=4.0, spatial_sxy=1.0)


def check_small_problem(device: Device) -> None:
    """Meet every kernel but the wide updates with the fewest threads: under a sanitiser each costs much."""
    image, probabilities = scene(3, 3, 5)
    expected = DenseCRF(image, SMALL).infer(probabilities)
    assert_close(refine(device, image, probabilities, SMALL), expected)


def check_overflow(device: Device) -> None:
    """Run out of vertices: that is reported once, and no memory but the results suffers."""
    image, probabilities = scene(2, 5, 8)
    parameters = replace(IRN, iterations=1)
    crf = DeviceCRF(device, CrfShape(1, 5, 8, 2), parameters, max_vertices=20)
    stored = put(device, image)
    crf.set_images(stored.pointer)
    try:
        infer(device, crf, probabilities[None, None])
    except ValueError as error:
        assert "max_vertices: the images need more" in str(error)
    else:
        raise AssertionError("nothing was reported")
    infer(device, crf, probabilities[None, None])
    assert crf.size < DeviceCRF(device, CrfShape(1, 5, 8, 2), parameters).size


if __name__ == "__main__":
    from cpu_device import CpuDevice

    for check in sys.argv[2:]:
        {"small": check_small_problem, "overflow": check_overflow}[check](CpuDevice(Path(sys.argv[1])))
    print("checked", *sys.argv[2:])
