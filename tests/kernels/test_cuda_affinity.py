"""The CUDA kernels of the affinities, run on the CPU: results, order of threads, sanitisers, errors."""

from pathlib import Path

import numpy as np
import pytest
import walk_checks
from cpu_device import CpuDevice, changed_sources
from sanitisers import run_sanitised
from walk_checks import check_affinities, put

from multisa.kernels.cuda.affinity import DeviceAffinity, GridShape

pytestmark = pytest.mark.slow

SCRIPT = Path(walk_checks.__file__)
MAIN = "affinity.cuh"


@pytest.mark.parametrize(
    ("shape", "depth", "radius"),
    [
        ((1, 1, 1), 1, 5),
        ((2, 9, 33), 3, 5),
        ((1, 20, 37), 40, 5),
        ((1, 2, 70), 16, 5),
        ((1, 10, 11), 7, 3),
        ((2, 6, 5), 2, 1),
        ((1, 6, 33), 3, 16),
    ],
)
def test_equals_the_reference(device: CpuDevice, shape: tuple[int, int, int], depth: int, radius: int) -> None:
    check_affinities(device, GridShape(*shape), depth, radius)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_threads_and_blocks_will_do(library: Path, seed: int) -> None:
    check_affinities(CpuDevice(library, seed=seed), GridShape(2, 11, 40), 20, 5)


@pytest.mark.parametrize("radius", [5, 2])
def test_invalid_values_are_told_once(device: CpuDevice, radius: int) -> None:
    affinity = DeviceAffinity(device, GridShape(1, 3, 4), radius)
    boundary, features = np.zeros((3, 4), np.float32), np.zeros((2, 3, 4), np.float32)
    out = device.allocate(4 * 34 * 12)
    for value in (-0.5, 1.5, np.nan):
        boundary[1, 2] = value
        affinity.from_boundary(put(device, boundary).pointer, out.pointer)
        with pytest.raises(ValueError, match="boundary: got values outside"):
            affinity.check()
    features[1, 0, 1] = np.nan
    affinity.from_features(put(device, features).pointer, 2, out.pointer)
    with pytest.raises(ValueError, match="features: got NaN"):
        affinity.check()
    affinity.check()


@pytest.mark.parametrize("sanitiser", ["tsan", "asan"])
def test_sanitisers_find_nothing(sanitiser: str) -> None:
    result = run_sanitised(sanitiser, SCRIPT, "affinity", main=MAIN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["checked", "affinity"]


def test_thread_sanitiser_finds_a_missing_barrier(tmp_path: Path) -> None:
    second = "compare_features<4>(sums, here, count);\n"
    broken = changed_sources(tmp_path, "affinity.cuh", second + "        __syncthreads();\n", second)
    result = run_sanitised("tsan", SCRIPT, "affinity", main=MAIN, sources=broken)
    assert result.returncode == 66
    assert "data race" in result.stderr and "affinity_features" in result.stderr


@pytest.mark.parametrize(
    ("shape", "radius", "message"),
    [
        ((1, 2, 2), 17, "at most 16"),
        ((0, 2, 2), 5, "images: got 0"),
        ((2000, 2, 2), 5, "split it"),
        ((1, 60_000, 60_000), 5, "smaller grid"),
    ],
)
def test_bad_arguments(device: CpuDevice, shape: tuple[int, int, int], radius: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceAffinity(device, GridShape(*shape), radius)


def test_no_features(device: CpuDevice) -> None:
    with pytest.raises(ValueError, match="depth: got 0"):
        DeviceAffinity(device, GridShape(1, 2, 2)).from_features(0, 0, 0)
