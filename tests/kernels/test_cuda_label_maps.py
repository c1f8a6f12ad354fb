"""The CUDA kernels around the walk, run on the CPU: results, order of threads, sanitisers, calls."""

from pathlib import Path
from typing import Any

import label_checks
import numpy as np
import pytest
from cpu_device import CpuDevice, changed_sources
from label_checks import check_argmax, check_errors, check_probabilities, check_resize, scores
from sanitisers import run_sanitised

from multisa.kernels import argmax_labels, resize_maps, scores_to_probabilities
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.label_maps import DeviceLabelMaps

SCRIPT = Path(label_checks.__file__)
MAIN = "label_maps.cuh"
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
        (21, (24, 32), (94, 125)),
    ],
)
def test_resize_equals_the_reference(device: CpuDevice, count: int, source: Size, target: Size) -> None:
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


def test_errors_are_taken_once(device: CpuDevice) -> None:
    check_errors(device)


def test_maps_without_a_peak_stay(device: CpuDevice) -> None:
    """All zero: background everywhere, no division by zero."""
    maps = np.zeros((2, 5, 4), np.float32)
    got = scores_to_probabilities(on(device, maps), (9, 8), background=0.3, to_peak=True).numpy()  # type: ignore
    np.testing.assert_array_equal(got[0], 1)
    np.testing.assert_array_equal(got[1:], 0)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_threads_and_blocks_will_do(library: Path, seed: int) -> None:
    device = CpuDevice(library, seed=seed)
    check_resize(device, 3, (9, 11), (35, 41))
    check_probabilities(device, 3, (9, 11), (35, 41), to_peak=True)
    check_argmax(device, 4, 35, 41)


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


@pytest.fixture
def device(library: Path, monkeypatch: pytest.MonkeyPatch) -> CpuDevice:
    """Stands for the first GPU in every public function."""
    device = CpuDevice(library)
    monkeypatch.setattr(calls, "default_device", lambda: device)
    return device


def on(device: CpuDevice, array: np.ndarray) -> DeviceArray:
    there = DeviceArray(device, array.shape, array.dtype.type)
    device.upload(there.pointer, np.ascontiguousarray(array))
    return there


def test_calls_on_arrays(device: CpuDevice) -> None:
    """Where the input is there the output stays, and has the same values."""
    maps = scores(3, 9, 11)
    ids, numbers = (0, 7, 2, 255), {"background": 0.3, "gains": (1.0, 2.0, 0.5), "to_peak": True}
    here = scores_to_probabilities(maps, (33, 40), **numbers)  # type: ignore[arg-type]
    there: Any = scores_to_probabilities(on(device, maps), (33, 40), **numbers)  # type: ignore[arg-type]
    back = scores_to_probabilities(maps, (33, 40), backend="cuda", **numbers)  # type: ignore[arg-type]
    assert isinstance(there, DeviceArray) and isinstance(back, np.ndarray)
    np.testing.assert_array_equal(there.numpy(), back)
    np.testing.assert_allclose(back, here, atol=label_checks.TOLERANCE)
    resized: Any = resize_maps(on(device, maps), (5, 40))  # type: ignore[arg-type]
    np.testing.assert_array_equal(resized.numpy(), resize_maps(maps, (5, 40), backend="cuda"))
    np.testing.assert_allclose(resized.numpy(), resize_maps(maps, (5, 40)), atol=label_checks.TOLERANCE)
    for got, got_back, expected in zip(
        argmax_labels(there, ids),
        argmax_labels(back, ids, backend="cuda"),
        argmax_labels(back, ids),
        strict=True,
    ):
        assert isinstance(got, DeviceArray) and isinstance(got_back, np.ndarray)
        np.testing.assert_array_equal(got.numpy(), expected)
        np.testing.assert_array_equal(got_back, expected)


def test_sizes_that_cannot_be(device: CpuDevice) -> None:
    with pytest.raises(ValueError, match="expected fewer pixels"):
        DeviceLabelMaps(device, (1, 1), (50_000, 50_000))
    with pytest.raises(ValueError, match="count: got 65536 maps"):
        DeviceLabelMaps(device, (1, 1), (1, 1)).resize(0, 65_536, 0)
    with pytest.raises(ValueError, match=r"maps: got shape \[3, 4\], expected \[C, h, w\]"):
        resize_maps(on(device, np.zeros((3, 4), np.float32)), (2, 2))  # type: ignore[arg-type]
