"""The CUDA kernels around the walk, run on the CPU: results, order of threads, sanitisers, errors."""

from pathlib import Path
from typing import Any

import label_checks
import numpy as np
import pytest
from cpu_device import CpuDevice, changed_sources
from label_checks import check_argmax, check_enlarge, check_errors, check_no_peak, check_probabilities, check_resize
from sanitisers import run_sanitised

from multisa.kernels.cuda.label_maps import DeviceLabelMaps, bilinear_taps

pytestmark = pytest.mark.slow

SCRIPT = Path(label_checks.__file__)
MAIN = "enlarge.cuh"  # and label_maps.cuh, which it includes
Size = tuple[int, int]


@pytest.mark.parametrize(
    ("count", "source", "target"),
    [
        (1, (1, 1), (1, 1)),
        (2, (1, 1), (7, 5)),
        (3, (7, 11), (1, 1)),
        (4, (13, 17), (13, 17)),
        (5, (13, 17), (29, 31)),
        (2, (31, 64), (13, 15)),
        (2, (8, 40), (33, 10)),  # one axis longer, one shorter
        (2, (2, 301), (4, 100)),
        (21, (24, 32), (94, 125)),
    ],
)
def test_resize_equals_pillow(device: CpuDevice, count: int, source: Size, target: Size) -> None:
    check_resize(device, count, source, target)


@pytest.mark.parametrize(
    ("count", "source", "target", "options"),
    [
        (1, (1, 1), (1, 1), {}),
        (1, (13, 17), (50, 67), {"to_peak": True}),
        (3, (24, 32), (95, 127), {"gains": (1.0, 1.75, 0.5), "to_peak": True}),
        (20, (11, 7), (44, 28), {}),
    ],
)
def test_probabilities_equal_the_reference(
    device: CpuDevice, count: int, source: Size, target: Size, options: dict[str, Any]
) -> None:
    check_probabilities(device, count, source, target, **options)


@pytest.mark.parametrize(("labels", "height", "width"), [(1, 1, 1), (2, 31, 17), (21, 40, 37), (256, 3, 5)])
def test_argmax_equals_numpy(device: CpuDevice, labels: int, height: int, width: int) -> None:
    check_argmax(device, labels, height, width)


@pytest.mark.parametrize(
    ("classes", "source", "target"),
    [
        (1, (1, 1), (1, 1)),
        (3, (1, 5), (33, 70)),
        (7, (9, 12), (75, 100)),
        (128, (4, 3), (5, 40)),
        (4, (13, 17), (13, 17)),
        (4, (40, 31), (7, 9)),
        (2, (8, 40), (33, 10)),  # one axis longer, one shorter
        (2, (1, 3000), (1, 2999)),
    ],
)
def test_enlarging_equals_the_reference(device: CpuDevice, classes: int, source: Size, target: Size) -> None:
    check_enlarge(device, classes, source, target)


def test_errors_are_taken_once(device: CpuDevice) -> None:
    check_errors(device)


def test_maps_without_a_peak_stay(device: CpuDevice) -> None:
    check_no_peak(device)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_threads_and_blocks_will_do(library: Path, seed: int) -> None:
    device = CpuDevice(library, seed=seed)
    check_resize(device, 3, (9, 11), (35, 41))
    check_probabilities(device, 3, (9, 11), (35, 41), to_peak=True)
    check_argmax(device, 4, 35, 41)
    check_enlarge(device, 4, (3, 5), (35, 41))


@pytest.mark.parametrize("sanitiser", ["tsan", "asan"])
def test_sanitisers_find_nothing(sanitiser: str) -> None:
    result = run_sanitised(sanitiser, SCRIPT, main=MAIN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["checked"]


def test_thread_sanitiser_finds_a_missing_barrier(tmp_path: Path) -> None:
    broken = changed_sources(
        tmp_path,
        "label_maps.cuh",
        "    __syncthreads();\n    if (threadIdx.x > 0) return;",
        "    if (threadIdx.x > 0) return;",
    )
    result = run_sanitised("tsan", SCRIPT, main=MAIN, sources=broken)
    assert result.returncode == 66
    assert "data race" in result.stderr and "maps_peak" in result.stderr


def test_sizes_that_cannot_be(device: CpuDevice) -> None:
    with pytest.raises(ValueError, match="expected fewer pixels"):
        DeviceLabelMaps(device, (1, 1), (50_000, 50_000))
    with pytest.raises(ValueError, match="count: got 65536 maps"):
        DeviceLabelMaps(device, (1, 1), (1, 1)).resize(0, 65_536, 0)
    with pytest.raises(ValueError, match="outputs: got 0"):
        DeviceLabelMaps(device, (3, 4), (0, 1))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (30_000, 7_500), (7, 30_000), (5, 5), (9, 8)])
def test_taps_stay_inside_and_sum_to_one(inputs: int, outputs: int) -> None:
    taps = bilinear_taps(inputs, outputs)
    assert taps.first.min() == 0 and (taps.count >= 1).all()
    assert (taps.first + taps.count).max() == inputs
    np.testing.assert_allclose(taps.weights.sum(axis=1), 1, atol=1e-6)
