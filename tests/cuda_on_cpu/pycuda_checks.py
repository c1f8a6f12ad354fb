"""Runs PycudaDevice with the libcuda that LD_LIBRARY_PATH names; the tests start it as a process of its own.

python pycuda_checks.py missing FATBIN          # the driver has no device: prints the error
python pycuda_checks.py run FATBIN              # the driver's device is the CPU: walk and affinities
"""

import sys
from pathlib import Path

import crf_checks
import numpy as np
from walk_checks import check_affinities, check_walk, scene, walk

from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda.affinity import GridShape
from multisa.kernels.cuda.driver import DriverError
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice
from multisa.kernels.cuda.walk import DeviceWalk, WalkShape


def run(fatbin: Path) -> None:
    """Everything the schedules ask of the device: memory, launches, fills, recordings on streams, errors."""
    device = PycudaDevice(fatbin=fatbin)
    check_walk(device, WalkShape(1, 2, 17, 9), WalkSettings(steps=30))
    check_walk(device, WalkShape(1, 1, 5, 9), WalkSettings(steps=2, radius=3))
    check_affinities(device, GridShape(1, 9, 33), 17, 5)
    crf_checks.check_against_cpu(device, 3, 9, 11, crf_checks.PSA)
    shape = WalkShape(1, 1, 6, 7)
    walker = DeviceWalk(device, shape, WalkSettings(steps=4))
    scores, affinity = scene(shape)
    first = walk(device, walker, scores, affinity)
    import pycuda.driver

    with device.active():
        stream = pycuda.driver.Stream()
    assert np.array_equal(walk(device, walker, scores, affinity, stream.handle), first)
    affinity[0, 3, 1, 2] = np.nan
    for _ in range(2):
        try:
            walk(device, walker, scores, affinity)
        except ValueError as error:
            print(error)
    try:
        device.launch("walk_everything", (1, 1, 1), (1, 1, 1), ())
    except DriverError as error:
        print(error)
    try:
        PycudaDevice(3, fatbin)
    except DeviceUnavailableError as error:
        print(error)
    print("checked")


def main() -> None:
    """Do what the first argument says."""
    task, fatbin = sys.argv[1], Path(sys.argv[2])
    if task == "run":
        run(fatbin)
        return
    try:
        PycudaDevice(fatbin=fatbin)
    except DeviceUnavailableError as error:
        print(error)


if __name__ == "__main__":
    main()
