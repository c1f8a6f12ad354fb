"""The first call that needs the driver: which GPU is here, do our kernels load, which TensorRT fits it.

python -m multisa.benchmarks.gpu.driver --output driver.json
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError
from multisa.kernels.cuda.pycuda_device import PycudaDevice
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.backends.tensorrt_runtime import LIBRARIES, import_library
from multisa.runtime.errors import BackendUnavailable, MultisaError
from multisa.runtime.files import write_json_atomically

_AGAIN = "then give the same command again, which goes on from here"
_INSTALL = (
    f"install NVIDIA's driver for this GPU, in a container start it with the GPU (--gpus all); {_AGAIN}"
)
_NO_CAM = "sm75"  # for which TensorRT-RTX builds no cam: its attention needs float32 products


def examine() -> dict[str, Any]:
    """What the driver says of the first GPU. Raises BackendUnavailable with why there is none to use."""
    probe = probe_gpus()
    if probe.problem:
        raise BackendUnavailable(probe.problem, remedy=_INSTALL)
    try:
        device = PycudaDevice()
    except DeviceUnavailableError as error:
        raise BackendUnavailable(f"{probe.gpus[0].name}: {error}", remedy=_AGAIN) from error
    target = "sm{}{}".format(*device.compute_capability)
    return {
        "gpu": device.name,
        "target": target,
        "gpus": [f"{gpu.name} ({gpu.target})" for gpu in probe.gpus],
        "driver_runs_cuda": probe.driver,
        "libraries": {name: {"version": v, "problem": why} for name, v, why in _libraries(target)},
        "torch": _torch(),
    }


def _libraries(target: str) -> Iterator[tuple[str, str, str]]:
    """(name, version, why it builds nothing for the GPU) of each TensorRT."""
    from multisa.export.tensorrt.builder import check_targets

    for name in LIBRARIES:
        version = ""
        try:
            library = import_library(name)
            version = library.version
            check_targets(library, (target,))
        except MultisaError as error:
            yield name, version, " ".join(str(error).split())
            continue
        limited = library.is_rtx and target == _NO_CAM
        yield name, version, f"it builds no cam for {target}" if limited else ""


def _torch() -> dict[str, Any]:
    """PyTorch's version, and whether it reaches the GPU; without that its figures are of the CPU."""
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}


def make_parser() -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def main(arguments: list[str]) -> int:
    """Ask, print, write; 5 where there is no GPU to use."""
    options = make_parser().parse_args(arguments)
    try:
        found = examine()
    except BackendUnavailable as error:
        print(f"error: {error}")
        return error.exit_code
    write_json_atomically(options.output, found)
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
