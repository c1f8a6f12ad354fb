"""Build a libcuda.so.1 for machines without a driver, so that pycuda can be built, imported and run.

    python tests/cuda_on_cpu/fake_driver.py /usr/local/cuda/include build/fake_driver          # no device
    python tests/cuda_on_cpu/fake_driver.py /usr/local/cuda/include build/cpu_driver --device  # one: the CPU

The first answers every call with "no device", like a machine without a GPU; `pip install pycuda` links
against it. The second implements on the CPU what PycudaDevice needs (driver_on_cpu.cpp).
"""

import argparse
import re
import subprocess
from pathlib import Path

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
DECLARED = re.compile(r"CUresult\s+(?:CUDAAPI\s+)?(cu[A-Z]\w+)\s*\(")
ALIAS = re.compile(r"#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT[DS][SZ]\()?(cu[A-Z]\w+)")
DEVICE_ON_CPU = Path(__file__).resolve().with_name("driver_on_cpu.cpp")
DEFINED = re.compile(r"^int (cu[A-Z]\w+)\(", re.MULTILINE)
DESCRIBED = """
extern "C" int cuGetErrorString(int error, const char **text) {
    *text = error ? "no CUDA-capable device is detected" : "no error";
    return 0;
}
extern "C" int cuGetErrorName(int error, const char **text) {
    *text = error ? "CUDA_ERROR_NO_DEVICE" : "CUDA_SUCCESS";
    return 0;
}
"""


def make_fake_driver(headers: Path, folder: Path, *, device: bool = False) -> Path:
    """Write libcuda.so.1 (and the name libcuda.so for linking) into `folder`, from the names in cuda*.h."""
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in headers.glob("cuda*.h"))
    names = {*DECLARED.findall(text), *(name for alias in ALIAS.findall(text) for name in alias)}
    written = DEVICE_ON_CPU.read_text() if device else DESCRIBED
    names -= {*DEFINED.findall(written), "cuGetErrorString", "cuGetErrorName"}
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "fake_driver.cpp", folder / "libcuda.so.1"
    functions = (f'extern "C" int {name}() {{ return {NO_DEVICE}; }}\n' for name in sorted(names))
    source.write_text(f"{written}\n{''.join(functions)}")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


def cuda_headers() -> Path:
    """The folder with cuda.h. Skips the calling test if there is none, or no pycuda."""
    import importlib.util
    import os

    import pytest

    from multisa.kernels.cuda.build import BuildError, find_nvcc

    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    try:
        # nvcc may be a link or a wrapper; it reports the location of its toolkit.
        command = [str(find_nvcc()), "--dryrun", "-x", "cu", os.devnull]
        dry_run = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    except BuildError as error:
        pytest.skip(str(error))
    (top,) = (line.split("TOP=")[1] for line in dry_run.splitlines() if "TOP=" in line)
    folder = Path(top) / "include"
    if not (folder / "cuda.h").is_file():
        pytest.skip(f"{folder} has no cuda.h")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a libcuda.so.1 that needs no GPU.")
    parser.add_argument("headers", type=Path, help="the folder with cuda.h")
    parser.add_argument("folder", type=Path, help="where to write the library")
    parser.add_argument("--device", action="store_true", help="pretend that the CPU is a device")
    options = parser.parse_args()
    print(make_fake_driver(options.headers, options.folder, device=options.device))
