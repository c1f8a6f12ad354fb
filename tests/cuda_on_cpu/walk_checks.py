"""What the random walk and the affinities must do on any `Device`: shared by the CPU, sanitisers and a GPU.

LD_PRELOAD=libtsan.so python walk_checks.py LIBRARY walk      # one small problem on a library of the kernels
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import random_walk_reference, stencil_offsets
from multisa.kernels.common.stencil import pair_slices, path_offsets
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.affinity import DeviceAffinity, GridShape
from multisa.kernels.cuda.device import Buffer, Device
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Against float64 with the very weights that the device rounds to fp16, and with the unrounded ones.
TOLERANCE, ROUNDED_TOLERANCE = 5e-6, 2e-4


def put(device: Device, array: npt.NDArray[Any]) -> Buffer:
    """Copy an array to new device memory."""
    buffer = device.allocate(array.nbytes)
    device.upload(buffer.pointer, np.ascontiguousarray(array))
    return buffer


def scene(shape: WalkShape, radius: int = 5, seed: int = 0) -> tuple[Float32, Float32]:
    """Random scores and affinities with open areas and walls; entries outside the grid are not 0."""
    random = np.random.default_rng(seed)
    grid = (shape.height, shape.width)
    scores = random.random((shape.images, shape.channels, *grid), dtype=np.float32)
    affinity = random.random((shape.images, len(stencil_offsets(radius)), *grid), dtype=np.float32)
    return scores, affinity ** np.float32(0.1)


def rounded(affinity: Float32, beta: float) -> Float32:
    """The weights as the device keeps them: pass them with beta 1."""
    return (affinity ** np.float32(beta)).astype(np.float16).astype(np.float32)


def walk(device: Device, walker: DeviceWalk, scores: Float32, affinity: Float32, stream: int = 0) -> Float32:
    """Upload, walk, check and download."""
    source, pairs, target = (put(device, array) for array in (scores, affinity, np.full_like(scores, np.nan)))
    walker.walk(source.pointer, pairs.pointer, target.pointer, stream)
    walker.check(stream)
    result = np.empty_like(scores)
    device.download(target.pointer, result, stream)
    return result


def check_walk(device: Device, shape: WalkShape, settings: WalkSettings) -> None:
    """The walk equals the reference, on weights that fp16 holds exactly and that the input moves along."""
    scores, affinity = scene(shape, settings.radius)
    affinity = rounded(affinity, settings.beta)
    single = WalkSettings(settings.radius, 1.0, settings.steps, settings.exact, settings.boundary)
    names = ("radius", "beta", "steps", "boundary")
    options: dict[str, Any] = {name: getattr(single, name) for name in names}
    reference = random_walk_reference(scores, affinity, **options)
    walked = walk(device, DeviceWalk(device, shape, single), scores, affinity)
    tail = 0 if settings.exact or settings.steps <= 19 else 2e-6  # of the Chebyshev series, as measured
    assert np.abs(walked - reference).max() < TOLERANCE + tail


def check_rounding(device: Device, height: int, width: int) -> None:
    """On smooth maps the rounded weights change little, and no pixel's class."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    boundary = np.maximum(np.exp(-((x - width / 2) ** 2) / 4), np.exp(-((y - height / 3) ** 2) / 9))
    affinity = boundary_reference(boundary[None].astype(np.float32), 5).astype(np.float32)
    scores = np.stack([np.sin(x / 9) + 1, np.cos(y / 7) + 1, np.sin((x + y) / 11) + 1])[None] / 2
    shape = WalkShape(1, 3, height, width)
    reference = random_walk_reference(scores.astype(np.float32), affinity)
    walked = walk(device, DeviceWalk(device, shape), scores.astype(np.float32), affinity)
    assert np.abs(walked - reference).max() < ROUNDED_TOLERANCE
    first, second = np.sort(reference[0], axis=0)[-1:-3:-1]
    clear = first - second > 2 * ROUNDED_TOLERANCE
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(walked[0].argmax(axis=0)[clear], reference[0].argmax(axis=0)[clear])


def features_reference(features: Float32, radius: int) -> Float64:
    """exp(-mean |f_i - f_j|) in float64: [N, D, h, w] -> [N, P, h, w]."""
    images, _, *grid = features.shape
    offsets = stencil_offsets(radius)
    affinity = np.zeros((images, len(offsets), *grid))
    maps = features.astype(np.float64)
    for plane, offset in enumerate(offsets):
        source, target = pair_slices(offset, (grid[0], grid[1]))
        affinity[:, plane][:, *source] = np.exp(-np.abs(maps[..., *source] - maps[..., *target]).mean(axis=1))
    return affinity


def boundary_reference(boundary: Float32, radius: int) -> Float64:
    """1 - max over the path: [N, h, w] -> [N, P, h, w], pixel by pixel."""
    images, height, width = boundary.shape
    offsets = stencil_offsets(radius)
    affinity = np.zeros((images, len(offsets), height, width))
    for plane, (dy, dx) in enumerate(offsets):
        points = path_offsets(dy, dx)
        for y in range(height - dy):
            for x in range(max(0, -dx), min(width, width - dx)):
                path = [boundary[:, y + py, x + px] for py, px in points]
                affinity[:, plane, y, x] = 1 - np.max(path, axis=0)
    return affinity


def check_affinities(device: Device, shape: GridShape, depth: int, radius: int) -> None:
    """Both affinities equal their references; every element of the output is written."""
    random = np.random.default_rng(1)
    grid = (shape.height, shape.width)
    features = random.normal(size=(shape.images, depth, *grid)).astype(np.float32)
    boundary = random.random((shape.images, *grid), dtype=np.float32)
    affinity = DeviceAffinity(device, shape, radius)
    result = np.full((shape.images, len(stencil_offsets(radius)), *grid), np.nan, dtype=np.float32)
    out, maps, edges = put(device, result), put(device, features), put(device, boundary)
    affinity.from_features(maps.pointer, depth, out.pointer)
    affinity.check()
    device.download(out.pointer, result)
    np.testing.assert_allclose(result, features_reference(features, radius), atol=5e-7)
    affinity.from_boundary(edges.pointer, out.pointer)
    affinity.check()
    device.download(out.pointer, result)
    np.testing.assert_allclose(result, boundary_reference(boundary, radius), atol=1e-7)


def main() -> None:
    """Run one of the small problems: every kernel of its family once."""
    from cpu_device import CpuDevice

    device = CpuDevice(Path(sys.argv[1]))
    if sys.argv[2] == "affinity":
        check_affinities(device, GridShape(1, 9, 33), 17, 5)
        check_affinities(device, GridShape(1, 3, 4), 2, 2)
    else:
        check_walk(device, WalkShape(1, 2, 6, 7), WalkSettings(steps=3))
        check_walk(device, WalkShape(1, 1, 5, 9), WalkSettings(steps=2, radius=2, boundary="psa"))
    print("checked", sys.argv[2])


if __name__ == "__main__":
    main()
