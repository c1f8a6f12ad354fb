"""The libraries that build plans: TensorRT 10 and 11 ("tensorrt") and TensorRT-RTX ("tensorrt-rtx").

Both have one Python interface. RTX builds for GPUs that are not there and needs no driver; TensorRT builds
for the GPU it runs on. A runtime or a plan is never opened here: without a driver that ends the process.
"""

import ctypes
import functools
import importlib
import importlib.util
import platform
from dataclasses import dataclass
from typing import Any

from multisa.runtime.engines.plans import LIBRARIES
from multisa.runtime.errors import EngineUnavailable, UsageError

RTX = "tensorrt-rtx"
_MODULES = {
    # The bindings are all that a build needs; the packages around them only pass their names on.
    RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
}
_INSTALL = {
    RTX: "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
    "tensorrt": "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
}
_OLDEST_TENSORRT = 10
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Library:
    """A library that was imported."""

    name: str  # one of LIBRARIES
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it builds ahead of time, for GPUs by their compute capability."""
        return self.name == RTX

    @property
    def major(self) -> int:
        """Major version, which decides what the interface has; the names in a binding mislead."""
        return int(self.version.split(".")[0])

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Gpu:
    """The GPU that TensorRT tunes a plan on."""

    name: str
    target: str  # "sm89"


def import_library(name: str) -> Library:
    """Import the library `name`. Raises EngineUnavailable where it is absent, broken or too old."""
    if name not in LIBRARIES:
        raise UsageError(f"library: got {name!r}, expected {' or '.join(LIBRARIES)}")
    found = [module for module in _MODULES[name] if _is_there(module)]
    if not found:
        raise EngineUnavailable(f"{name} is not installed, it builds the plans: {_INSTALL[name]}")
    try:
        module = importlib.import_module(found[0])
    except (ImportError, OSError) as error:
        raise EngineUnavailable(
            f"{name} cannot be loaded ({error}); install it again: {_INSTALL[name]}"
        ) from error
    library = Library(name, module, str(module.__version__))
    if not library.is_rtx and library.major < _OLDEST_TENSORRT:
        raise EngineUnavailable(
            f"{library}: expected version {_OLDEST_TENSORRT} or newer, whose graphs carry their own types: "
            f"{_INSTALL[name]}"
        )
    return library


def first_gpu() -> Gpu:
    """The first GPU of this machine, as the driver tells. Raises EngineUnavailable where there is none."""
    remedy = (
        f"build with TensorRT on the machine that runs the plan, or with --library {RTX}, which needs no GPU"
    )
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineUnavailable(f"no NVIDIA driver here ({error}); {remedy}") from error

    def call(function: str, *arguments: Any) -> None:
        status = getattr(driver, function)(*arguments)
        if status != 0:
            raise EngineUnavailable(f"the NVIDIA driver offers no GPU ({function}: error {status}); {remedy}")

    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
    call("cuDeviceGetName", name, len(name), device)
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def this_platform() -> str:
    """Operating system and processor, which plans are made for: "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


class BuildLog:
    """What a library says during a build: it returns None or False, and its reasons come here."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def clear(self) -> None:
        """Forget what was said."""
        self.errors.clear()
        self.warnings.clear()


@functools.cache
def build_log(module: Any) -> tuple[Any, BuildLog]:
    """The library's logger and what it collects, one of each for a process.

    A library keeps the first logger it is given for as long as it is loaded, so it must never go away.
    """
    log = BuildLog()
    severities = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if "CUDA driver version is insufficient" in message:
                return  # RTX looks for a GPU in passing, and does not need one
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                log.errors.append(message.strip())
            elif severity == severities.WARNING:
                log.warnings.append(message.strip())

    return Logger(), log


def _is_there(module: str) -> bool:
    try:
        specification = importlib.util.find_spec(module)
    except ValueError:  # imported already, without a specification
        return True
    # Type stubs make a folder of this name with no module in it.
    return specification is not None and specification.origin is not None
