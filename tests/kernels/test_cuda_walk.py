"""The CUDA kernels of the random walk, run on the CPU: results, order of threads, sanitisers, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walk_checks
from cpu_device import CpuDevice, build, changed_sources
from sanitisers import run_sanitised
from walk_checks import check_walk, put, scene, walk

from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape

pytestmark = pytest.mark.slow

SCRIPT = Path(walk_checks.__file__)
MAIN = "walk_ends.cuh"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1), {}),
        ((1, 2, 1, 9), {}),
        ((2, 3, 13, 17), {}),
        ((1, 4, 17, 33), {"exact": True, "steps": 40}),
        ((1, 4, 17, 33), {"boundary": "psa"}),
        ((1, 5, 9, 8), {}),  # two groups of three, one channel of them unused
        ((2, 1, 20, 7), {"boundary": "psa"}),
        ((1, 2, 40, 20), {"radius": 16, "steps": 12}),
        ((1, 3, 12, 37), {"radius": 3}),
        ((1, 1, 4, 5), {"radius": 1}),
        ((1, 2, 12, 11), {"beta": 0.5, "steps": 1000}),
        *(((1, 1, 12, 11), {"steps": steps}) for steps in (0, 1, 2, 5, 20, 33)),
    ],
)
def test_equals_the_reference(device: CpuDevice, shape: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    check_walk(device, WalkShape(*shape), WalkSettings(**options))


def test_a_full_image_with_unrounded_weights(device: CpuDevice) -> None:
    walk_checks.check_rounding(device, 32, 48)


def test_constants_stay_and_averages_keep_their_range(device: CpuDevice) -> None:
    shape = WalkShape(1, 2, 18, 9)
    scores, affinity = scene(shape)
    scores[0, 0] = 0.7
    walked = walk(device, DeviceWalk(device, shape), scores, affinity)
    np.testing.assert_array_equal(walked[0, 0], scores[0, 0])
    assert scores[0, 1].min() <= walked[0, 1].min() < walked[0, 1].max() <= scores[0, 1].max()


@pytest.mark.parametrize("radius", [5, 3])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(library: Path, radius: int) -> None:
    shape, settings = WalkShape(1, 2, 35, 34), WalkSettings(radius=radius, steps=6)
    images = scene(shape, radius)
    devices = [CpuDevice(library, seed=seed) for seed in range(3)]
    ordered, *shuffled = (walk(each, DeviceWalk(each, shape, settings), *images) for each in devices)
    for other in shuffled:
        np.testing.assert_array_equal(other, ordered)


def test_one_walk_serves_many_images_and_may_work_in_place(device: CpuDevice) -> None:
    shape = WalkShape(1, 2, 9, 11)
    walker = DeviceWalk(device, shape)
    first, second = scene(shape, seed=1), scene(shape, seed=2)
    expected = walk(device, DeviceWalk(device, shape), *second)
    assert not np.array_equal(walk(device, walker, *first), expected)
    scores, affinity = (put(device, array) for array in second)
    walker.walk(scores.pointer, affinity.pointer, scores.pointer)
    walked = np.empty_like(expected)
    device.download(scores.pointer, walked)
    np.testing.assert_array_equal(walked, expected)


def test_a_step_is_one_launch_for_all_images_and_channels(device: CpuDevice) -> None:
    shape = WalkShape(2, 6, 9, 8)
    walker = DeviceWalk(device, shape)
    assert not device.launches  # recorded, not run
    walk(device, walker, *scene(shape))
    names = [launch.name for launch in device.launches]
    assert names == ["walk_weights", "walk_row_sums", "walk_start", *["walk_step_3"] * 72, "walk_finish"]
    assert device.launches[5].grid == (1, 1, 4)


def test_invalid_values_are_told_once(device: CpuDevice) -> None:
    shape = WalkShape(1, 2, 6, 7)
    walker = DeviceWalk(device, shape, WalkSettings(steps=2))
    scores, affinity = scene(shape)
    spoilt = affinity.copy()
    spoilt[0, 0, :, -1] = np.nan  # leads out of the grid: not a pair
    walk(device, walker, scores, spoilt)
    for value in (np.nan, -0.1, 1.1):
        spoilt[0, 5, 2, 3] = value
        with pytest.raises(ValueError, match="affinity: got values outside"):
            walk(device, walker, scores, spoilt)
    scores[0, 1, 5, 6] = np.inf
    with pytest.raises(ValueError, match=r"affinity: .*; scores: got NaN or infinity"):
        walk(device, walker, scores, spoilt)
    walk(device, walker, *scene(shape))


def test_a_missing_barrier_is_caught(tmp_path: Path) -> None:
    barrier = "    load_tile(tile, current + first, plane, channels, tile_rows, tile_pitch, pitch);\n"
    broken = changed_sources(tmp_path, "walk.cuh", barrier + "    __syncthreads();\n", barrier)
    device = CpuDevice(build(broken, ("-O1",), MAIN))
    with pytest.raises(AssertionError):
        check_walk(device, WalkShape(1, 1, 12, 11), WalkSettings(steps=5))
    result = run_sanitised("tsan", SCRIPT, "walk", main=MAIN, sources=broken)
    assert result.returncode == 66
    assert "data race" in result.stderr and "walk.cuh" in result.stderr


@pytest.mark.parametrize("sanitiser", ["tsan", "asan"])
def test_sanitisers_find_nothing(sanitiser: str) -> None:
    result = run_sanitised(sanitiser, SCRIPT, "walk", main=MAIN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["checked", "walk"]


def test_address_sanitiser_finds_a_read_past_the_end(tmp_path: Path) -> None:
    broken = changed_sources(tmp_path, "walk_ends.cuh", "i >= height * width", "i > height * width")
    result = run_sanitised("asan", SCRIPT, "walk", main=MAIN, sources=broken)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "walk_finish" in result.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": 0}, ValueError, "radius: got 0"),
        ({"radius": 17}, ValueError, "at most 16"),
        ({"beta": 0.0}, ValueError, "beta: got 0"),
        ({"steps": -1}, ValueError, "steps: got -1"),
        ({"steps": 2.0}, TypeError, "steps: got float"),
        ({"boundary": "wrap"}, ValueError, "full, psa"),
        ({"images": 0}, ValueError, "images: got 0"),
        ({"width": 1.5}, TypeError, "width: got float"),
        ({"images": 2000}, ValueError, "split the batch"),
        ({"height": 60_000, "width": 60_000}, ValueError, "smaller grid"),
    ],
)
def test_bad_arguments(device: CpuDevice, change: dict[str, Any], error: type[Exception], message: str) -> None:
    sizes: dict[str, Any] = {"images": 1, "channels": 1, "height": 2, "width": 2}
    options = {name: value for name, value in change.items() if name not in sizes}
    with pytest.raises(error, match=message):
        DeviceWalk(device, WalkShape(**(sizes | change if not options else sizes)), WalkSettings(**options))
