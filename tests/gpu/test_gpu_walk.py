"""The random walk and the affinities on a real GPU: the checks of the CPU, at sizes of use as well."""

from typing import Any

import numpy as np
import pytest
import walk_checks
from walk_checks import check_affinities, check_walk, scene, walk

from multisa.kernels.common.stencil import Boundary
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.affinity import GridShape
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape


@pytest.fixture(scope="module")
def device() -> PycudaDevice:
    try:
        return PycudaDevice()
    except DeviceUnavailableError as error:
        pytest.skip(f"no GPU to run on: {error}")


@pytest.mark.parametrize("boundary", ["full", "psa"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1), {}),
        ((3, 5, 47, 61), {}),
        ((2, 4, 64, 64), {"exact": True}),
        ((1, 21, 128, 128), {}),
        ((1, 2, 40, 20), {"radius": 16, "steps": 64}),
        ((1, 2, 33, 20), {"radius": 3}),
        ((1, 1, 9, 9), {"radius": 1}),
    ],
)
def test_equals_the_reference(
    device: Device, shape: tuple[int, int, int, int], options: dict[str, Any], boundary: Boundary
) -> None:
    check_walk(device, WalkShape(*shape), WalkSettings(**options, boundary=boundary))


def test_unrounded_weights(device: Device) -> None:
    walk_checks.check_rounding(device, 64, 64)


def test_two_runs_give_the_same_bits(device: Device) -> None:
    shape = WalkShape(16, 4, 64, 64)
    images = scene(shape)
    walker = DeviceWalk(device, shape)
    first = walk(device, walker, *images)
    np.testing.assert_array_equal(walk(device, walker, *images), first)
    single = DeviceWalk(device, WalkShape(1, 4, 64, 64))
    np.testing.assert_array_equal(walk(device, single, images[0][3:4], images[1][3:4])[0], first[3])


def test_invalid_values_are_told(device: Device) -> None:
    shape = WalkShape(1, 1, 8, 8)
    scores, affinity = scene(shape)
    scores[0, 0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="scores: got NaN"):
        walk(device, DeviceWalk(device, shape), scores, affinity)


@pytest.mark.parametrize(("shape", "radius"), [((1, 1, 1), 5), ((2, 47, 61), 5), ((1, 20, 33), 16)])
def test_affinities_equal_the_reference(device: Device, shape: tuple[int, int, int], radius: int) -> None:
    check_affinities(device, GridShape(*shape), 40, radius)
