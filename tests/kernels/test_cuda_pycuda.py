"""PycudaDevice without a GPU: its errors, and its calls carried out by a driver whose device is the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pycuda_checks
import pytest
from cpu_device import build
from fake_driver import cuda_headers, make_fake_driver

from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice

pytestmark = pytest.mark.slow

SCRIPT = Path(pycuda_checks.__file__)
MAGIC = 0xBA55ED50.to_bytes(4, "little")  # how a fat binary begins: all that the driver on the CPU looks at


@pytest.fixture(scope="module")
def headers() -> Path:
    return cuda_headers()


def run(task: str, driver: Path, folder: Path, **environment: str) -> str:
    """Run pycuda_checks.py with a libcuda; return what it printed."""
    fatbin = folder / "kernels.fatbin"
    fatbin.write_bytes(MAGIC)
    variables = os.environ | {"LD_LIBRARY_PATH": str(driver.parent)} | environment
    command = [sys.executable, "-W", "error", str(SCRIPT), task, str(fatbin)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_no_device(headers: Path, tmp_path: Path) -> None:
    said = run("missing", make_fake_driver(headers, tmp_path), tmp_path)
    assert said == "cuInit failed: no CUDA-capable device is detected; check the driver by running nvidia-smi\n"


def test_memory_launches_and_recordings(headers: Path, tmp_path: Path) -> None:
    driver = make_fake_driver(headers, tmp_path, device=True)
    said = run("run", driver, tmp_path, CUDA_ON_CPU_KERNELS=str(build())).splitlines()
    assert said[:2] == ["affinity: got values outside [0, 1] or NaN, expected [0, 1]; check the network's output"] * 2
    assert said[2].startswith("cuModuleGetFunction: ")
    assert said[3:] == ["GPU 3: got 1 GPUs, expected more than 3", "checked"]


def test_no_kernels(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"run python -m multisa\.kernels\.cuda\.build"):
        PycudaDevice(fatbin=tmp_path / "kernels.fatbin")


def test_no_pycuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fatbin = tmp_path / "kernels.fatbin"
    fatbin.write_bytes(MAGIC)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(DeviceUnavailableError, match=r"pip install pycuda, and"):
        PycudaDevice(fatbin=fatbin)
