"""The dense CRF on a real GPU: what the CPU passes, and sizes that only a GPU does in reasonable time."""

from collections.abc import Callable

import crf_checks
import numpy as np
import pytest
from crf_checks import IRN, PSA, prepare, scene

from multisa.kernels import CrfParameters
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice


@pytest.fixture(scope="module")
def device() -> PycudaDevice:
    try:
        return PycudaDevice()
    except DeviceUnavailableError as error:
        pytest.skip(f"no GPU to run on: {error}")


@pytest.mark.parametrize("parameters", [PSA, IRN], ids=["psa", "irn"])
@pytest.mark.parametrize(
    ("labels", "height", "width"),
    [(1, 1, 1), (7, 1, 40), (2, 37, 1), (3, 97, 61), (21, 60, 83), (40, 50, 41), (3, 375, 500)],
)
def test_equals_the_cpu(device: Device, labels: int, height: int, width: int, parameters: CrfParameters) -> None:
    crf_checks.check_against_cpu(device, labels, height, width, parameters)


@pytest.mark.parametrize("check", [crf_checks.check_batch, crf_checks.check_channels, crf_checks.check_labels])
def test_batches_channels_and_labels(device: Device, check: Callable[[Device, int, int], None]) -> None:
    check(device, 94, 125)


@pytest.mark.parametrize("check", [crf_checks.check_constant_image, crf_checks.check_overflow])
def test_extremes(device: Device, check: Callable[[Device], None]) -> None:
    check(device)


def test_two_runs_give_the_same_bits(device: Device) -> None:
    image, probabilities = scene(6, 375, 500)
    crf = prepare(device, image[None], 6, IRN)
    first = crf_checks.infer(device, crf, probabilities[None, None])
    again = crf_checks.infer(device, prepare(device, image[None], 6, IRN), probabilities[None, None])
    np.testing.assert_array_equal(again, first)
