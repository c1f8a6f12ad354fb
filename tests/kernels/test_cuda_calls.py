"""One call on arrays, on a device that is the CPU: NumPy in and out, device arrays that stay."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_device import CpuDevice
from crf_checks import scene as crf_scene

from multisa.kernels import (
    CrfParameters,
    affinity_from_boundary,
    affinity_from_features,
    dense_crf,
    enlarge_probabilities,
    random_walk,
)
from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError

pytestmark = pytest.mark.slow


@pytest.fixture
def device(library: Path, monkeypatch: pytest.MonkeyPatch) -> CpuDevice:
    """Stands for the first GPU in every public function."""
    device = CpuDevice(library)
    monkeypatch.setattr(calls, "default_device", lambda: device)
    return device


def on(device: CpuDevice, array: npt.NDArray[Any]) -> DeviceArray:
    there = DeviceArray(device, array.shape, array.dtype.type)
    device.upload(there.pointer, np.ascontiguousarray(array))
    return there


def walk_scene(*batch: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(8)
    boundary = rng.random((*batch, 13, 18), dtype=np.float32) ** 4
    return rng.random((*batch, 3, 13, 18), dtype=np.float32), affinity_from_boundary(boundary)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_walk_of_numpy_arrays(device: CpuDevice, batch: tuple[int, ...]) -> None:
    scores, affinity = walk_scene(*batch)
    walked = random_walk(scores, affinity, backend="cuda")
    assert isinstance(walked, np.ndarray) and walked.shape == scores.shape
    # Weights on a device are float16.
    np.testing.assert_allclose(walked, random_walk(scores, affinity), atol=2e-3)
    out = np.empty_like(scores)
    assert random_walk(scores, affinity, backend="cuda", out=out) is out
    np.testing.assert_array_equal(out, walked)


def test_walk_of_device_arrays_stays_there(device: CpuDevice) -> None:
    scores, affinity = walk_scene()
    walked: Any = random_walk(on(device, scores), on(device, affinity))  # type: ignore[arg-type]
    assert isinstance(walked, DeviceArray)
    np.testing.assert_array_equal(walked.numpy(), random_walk(scores, affinity, backend="cuda"))
    out: Any = DeviceArray(device, scores.shape)
    there = random_walk(on(device, scores), on(device, affinity), out=out)  # type: ignore[arg-type]
    assert there is out
    np.testing.assert_array_equal(out.numpy(), walked.numpy())


@pytest.mark.parametrize("radius", [1, 3, 5])
def test_affinities(device: CpuDevice, radius: int) -> None:
    rng = np.random.default_rng(9)
    features = rng.normal(size=(2, 4, 11, 9)).astype(np.float32)
    boundary = rng.random((11, 9), dtype=np.float32)
    for function, array in ((affinity_from_features, features), (affinity_from_boundary, boundary)):
        there = function(array, radius=radius, backend="cuda")  # type: ignore[operator]
        here = function(array, radius=radius)  # type: ignore[operator]
        assert there.shape[-3] == len(stencil_offsets(radius))
        np.testing.assert_allclose(there, here, atol=1e-6)


def test_crf(device: CpuDevice) -> None:
    image, probabilities = crf_scene(3, 14, 17)
    among = np.zeros((9, 14, 17), np.float32)
    among[[1, 4, 8]] = probabilities
    few = CrfParameters(iterations=3)
    expected = dense_crf(image, among, few)
    np.testing.assert_allclose(dense_crf(image, among, few, backend="cuda"), expected, atol=1e-4)
    images, maps = np.stack([image, image[::-1]]), np.stack([among, among])
    batch = dense_crf(images, maps, few, backend="cuda")
    np.testing.assert_allclose(batch, dense_crf(images, maps, few), atol=1e-4)
    there: Any = calls.dense_crf_on_device(on(device, image), on(device, probabilities), few, device)
    np.testing.assert_allclose(there.numpy(), expected[[1, 4, 8]], atol=1e-4)


def test_enlarging(device: CpuDevice) -> None:
    probabilities = np.random.default_rng(4).random((5, 9, 12), dtype=np.float32)
    ids = [9, 200, 0, 1, 2]
    for class_ids in (None, ids):
        expected = enlarge_probabilities(probabilities, (40, 50), class_ids)
        here = enlarge_probabilities(probabilities, (40, 50), class_ids, backend="cuda")
        there: Any = enlarge_probabilities(on(device, probabilities), (40, 50), class_ids)  # type: ignore[arg-type]
        assert all(isinstance(array, DeviceArray) for array in there)
        for got in (here, tuple(array.numpy() for array in there)):
            assert (got[0] == expected[0]).mean() > 0.999  # ties
            assert np.abs(got[1].astype(int) - expected[1]).max() <= 1
    with pytest.raises(ValueError, match="probabilities: got values from -1"):
        enlarge_probabilities(-np.ones((2, 3, 4), np.float32), (5, 6), backend="cuda")
    with pytest.raises(ValueError, match=r"probabilities: got shape \[3, 4\], expected \[C, h, w\]"):
        enlarge_probabilities(on(device, np.ones((3, 4), np.float32)), (5, 6))  # type: ignore[arg-type]


def test_values_are_checked_where_the_host_waits_anyway(device: CpuDevice) -> None:
    scores, affinity = walk_scene()
    with pytest.raises(ValueError, match="affinity: got values outside"):
        random_walk(scores, affinity + 1, backend="cuda")
    with pytest.raises(ValueError, match="scores: got NaN"):
        random_walk(scores * np.float32(np.nan), affinity, backend="cuda")


def test_an_error_nobody_asked_about_is_not_the_next_calls(device: CpuDevice) -> None:
    scores, affinity = walk_scene()
    random_walk(on(device, scores * np.float32(np.nan)), on(device, affinity))  # type: ignore[arg-type]
    assert np.isfinite(random_walk(scores, affinity, backend="cuda")).all()


def test_threads_share_a_device(device: CpuDevice) -> None:
    scenes = [walk_scene() for _ in range(2)]
    inputs = [(scores * np.float32(factor), affinity) for (scores, affinity), factor in zip(scenes, (1, 0.5))]  # noqa: B905
    alone = [random_walk(*arguments, steps=9, backend="cuda") for arguments in inputs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda pair: random_walk(*pair, steps=9, backend="cuda"), inputs * 4))
    for index, walked in enumerate(together):
        np.testing.assert_array_equal(walked, alone[index % 2])


def test_arguments_that_cannot_be(device: CpuDevice) -> None:
    scores, affinity = walk_scene()
    with pytest.raises(TypeError, match="scores: got float64, expected float32"):
        random_walk(scores.astype(np.float64), affinity, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"affinity: got shape \[12, 13, 18\], expected \[34, 13, 18\]"):
        random_walk(scores, affinity[:12], backend="cuda")
    with pytest.raises(ValueError, match="got 'cpu' for arrays on a device"):
        random_walk(on(device, scores), affinity, backend="cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out: got a NumPy array"):
        random_walk(on(device, scores), on(device, affinity), out=scores)  # type: ignore[arg-type]

    class Strided:
        __cuda_array_interface__ = {  # noqa: RUF012
            **on(device, scores).__cuda_array_interface__,
            "strides": (4, 12, 156),
        }

    with pytest.raises(ValueError, match="scores: got strides"):
        random_walk(Strided(), on(device, affinity))  # type: ignore[arg-type]


def test_no_device_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.default_device.cache_clear()
    scores, affinity = walk_scene()
    try:
        calls.default_device()
    except DeviceUnavailableError:
        with pytest.raises(DeviceUnavailableError, match=r"kernels\.fatbin|pycuda|nvidia-smi"):
            random_walk(scores, affinity, backend="cuda")
    else:
        pytest.skip("there is a device")
