"""TensorRTBackend without a GPU: on a driver whose device is the CPU, and compared with the real bindings."""

import enum
import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import pytest
from cpu_device import build
from fake_driver import cuda_headers, make_fake_driver

from multisa.runtime.backends import tensorrt_runtime
from multisa.runtime.backends.base import CAM
from multisa.runtime.backends.tensorrt import open_tensorrt
from multisa.runtime.backends.tensorrt_runtime import TENSORRT, TENSORRT_RTX, Library, LibraryLog, import_library
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.errors import BackendUnavailable

ON_CPU = Path(fake_tensorrt.__file__).parent
OPEN = """
import sys
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.backends.base import CAM
from multisa.runtime.backends.tensorrt import open_tensorrt
from multisa.runtime.errors import BackendUnavailable
try:
    open_tensorrt(load_bundle(default_bundle_path()), CAM)
except BackendUnavailable as error:
    print(error.exit_code, error)
print([name for name in sys.modules if name.startswith("tensorrt")])
"""


def run(driver: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with a libcuda."""
    path = os.pathsep.join([str(ON_CPU), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver.parent), "PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_on_the_cpu(tmp_path: Path) -> None:
    """Runs tensorrt_on_cpu.py, every test of it."""
    driver = make_fake_driver(cuda_headers(), tmp_path, device=True)
    tests = str(ON_CPU / "tensorrt_on_cpu.py")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    result = run(driver, *command, CUDA_ON_CPU_KERNELS=str(build()))
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"^\d+ passed in ", result.stdout, re.MULTILINE), result.stdout[-2000:]
    assert result.stderr == ""  # pycuda reports there what could not be released


def test_no_gpu(tmp_path: Path) -> None:
    """The driver is asked first; TensorRT is not even imported."""
    result = run(make_fake_driver(cuda_headers(), tmp_path), "-c", OPEN)
    assert result.returncode == 0, result.stderr
    message = "5 TensorRT cannot run: cuInit failed: no CUDA-capable device is detected: "
    assert result.stdout == f"{message}check the driver by running nvidia-smi\n[]\n"


def test_no_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    tensorrt_runtime.default_gpu.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"pycuda: cannot be imported .*pip install pycuda, and"):
        open_tensorrt(load_bundle(default_bundle_path()), CAM)


@pytest.mark.parametrize(
    ("library", "remedy"),
    [
        (TENSORRT, "pip install tensorrt-cu13"),
        (TENSORRT_RTX, "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs"),
    ],
)
def test_no_library(library: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = library.replace("-", "_")
    for name in (module, f"{module}_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # Type stubs: a folder of the name without a module in it.
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.pyi").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendUnavailable, match=re.escape(f"{library} is not installed: ")) as caught:
        import_library(library)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11"),
        ("__version__ = '8.6.1'", "got version 8.6.1, expected 10 or newer"),
        ("", "got version unknown"),
    ],
    ids=["without its library", "too old", "something else"],
)
def test_unusable_library(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(BackendUnavailable, match=message):
        import_library(TENSORRT)
    sys.modules.pop("tensorrt", None)


def test_what_was_imported_already_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")  # without a specification
    module.__version__ = "11.4.0.106"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    library = import_library(TENSORRT)
    assert library == Library("tensorrt", module, "11.4.0.106")
    assert (str(library), library.major, library.is_rtx) == ("tensorrt 11.4.0.106", 11, False)


def test_the_log_is_bounded_and_tells_the_last_errors() -> None:
    log = LibraryLog()
    for i in range(100):
        log.add_error(f"error {i}\n  of many\n")
    assert log.errors == tuple(f"error {i}\n  of many" for i in range(36, 100))
    assert log.take() == "; ".join(f"error {i} of many" for i in range(92, 100))
    log.add_warning("a warning, which is no reason")
    assert log.take() == "no reason given" and log.errors == log.warnings == ()


def bindings(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def public_members(kind: type) -> dict[str, Any]:
    if issubclass(kind, enum.Enum):
        return dict(kind.__members__)
    return {name: member for name, member in vars(kind).items() if not name.startswith("_")}


def parameters(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


def true_parameters(text: str, name: str) -> list[list[str]]:
    """Parameter names of every overload that pybind11's documentation, or a stub, has of a method."""
    signatures = re.findall(rf"\b{name}\(self(?:: [\w.]+)?(?:, )?([^)]*)\)", text)
    return [re.findall(r"(?:^|, )(\w+): ", arguments) for arguments in signatures]


@pytest.mark.parametrize(
    ("true", "fake"), [("tensorrt_rtx_bindings", "tensorrt_rtx"), ("tensorrt_lean_bindings", "tensorrt")]
)
def test_every_call_is_in_the_bindings(true: str, fake: str) -> None:
    """Everything that the fake library offers exists in the real one, under the same names and parameters."""
    module = bindings(true)
    compared = 0
    for name, kind in fake_tensorrt.interface(fake).items():
        for member, value in public_members(kind).items():
            there = getattr(getattr(module, name), member, None)
            assert there is not None, f"{true}.{name} has no {member}"
            overloads = true_parameters(there.__doc__ or "", member) if inspect.isfunction(value) else []
            if overloads:
                assert parameters(value) in overloads, f"{name}.{member}: {overloads}"
                compared += 1
    assert compared >= 12


def test_every_call_is_in_the_stubs() -> None:
    """The same for TensorRT 10, by its type stubs."""
    try:
        files = metadata.files("tensorrt-stubs") or []
    except metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    (path,) = (file.locate() for file in files if file.name == "tensorrt.pyi")
    # They are not quite Python, so this reads them as text.
    classes = dict(re.findall(r"^class (\w+).*?:\n(.*?)(?=^\S)", Path(path).read_text(), re.M | re.S))
    for name, kind in fake_tensorrt.interface("tensorrt").items():
        for member, value in public_members(kind).items():
            assert re.search(rf"^    (?:def |class )?{member}\b", classes[name], re.M), f"{name}.{member}"
            if inspect.isfunction(value):
                assert parameters(value) in true_parameters(classes[name], member), f"{name}.{member}"
