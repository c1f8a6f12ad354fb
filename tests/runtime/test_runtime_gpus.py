"""Asking the driver for GPUs, with drivers that are compiled here: none, broken, without and with devices."""

import subprocess
from pathlib import Path

import pytest

from multisa.runtime.backends import gpus
from multisa.runtime.backends.gpus import Gpu, GpuProbe, probe_gpus

DRIVER = r"""
#include <cstdio>
extern "C" {
int cuInit(unsigned) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return ordinal < COUNT ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) {
    std::snprintf(name, size, "GPU of handle %d", device);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? device - 34 : -1;  // compute capability 8.6, 8.7, ...
    return 0;
}
int cuGetErrorString(int, const char **text) { *text = "no CUDA-capable device is detected"; return 0; }
}
"""


def install_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, **macros: int) -> None:
    library = folder / "libcuda.so.1"
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["g++", "-x", "c++", "-shared", "-fPIC", *defines, "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(gpus, "LIBRARY", str(library))


def test_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(tmp_path, monkeypatch, DRIVER, INIT=0, COUNT=2)
    found = (Gpu("GPU of handle 40", "sm86"), Gpu("GPU of handle 41", "sm87"))
    assert probe_gpus() == GpuProbe("13.2", found, "")


def test_a_driver_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(tmp_path, monkeypatch, DRIVER, INIT=0, COUNT=0)
    assert probe_gpus() == GpuProbe("13.2", problem="no NVIDIA GPU here: the driver knows of none", is_absent=True)


@pytest.mark.parametrize(("error", "is_absent"), [(100, True), (999, False)], ids=["no device", "unknown"])
def test_a_driver_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, is_absent: bool) -> None:
    install_driver(tmp_path, monkeypatch, DRIVER, INIT=error, COUNT=0)
    probe = probe_gpus()
    problem = probe.problem
    assert probe.is_absent is is_absent and "cuInit: no CUDA-capable device is detected (CUDA error " in problem
    assert "nvidia-smi" in problem


def test_a_library_that_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(tmp_path, monkeypatch, "int nothing;")
    assert "cuInit" in probe_gpus().problem
    (tmp_path / "text").write_text("no library")
    monkeypatch.setattr(gpus, "LIBRARY", str(tmp_path / "text"))
    assert probe_gpus().problem.startswith("no NVIDIA driver here: ")


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    assert probe_gpus() == GpuProbe(
        problem=f"no NVIDIA driver here: {tmp_path / 'libcuda.so.1'} cannot be loaded", is_absent=True
    )
