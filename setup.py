"""The compiled parts of the package: the kernels on the CPU, and those on CUDA where nvcc is.

MULTISA_CUDA=0 leaves CUDA out, MULTISA_CUDA=1 asks for it; unset, it is built where nvcc is found.
"""

import importlib.util
import os
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("kernels/csrc/cpu")
CUDA_BUILD = Path("kernels/cuda/build.py")
NO_COMPILER = """
multisa compiles its kernels when it is installed and found no working C++17 compiler (see above).
Install one and run the same command again:
  Debian, Ubuntu   sudo apt-get install g++
  Fedora           sudo dnf install gcc-c++
  macOS            xcode-select --install
"""


class BuildKernels(build_ext):
    """Builds the extension module and the CUDA kernels; without a C++ compiler it says what to install."""

    def run(self) -> None:
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(f"{error}\n{NO_COMPILER}") from error
        if os.environ.get("MULTISA_CUDA") != "0":
            self._build_cuda()

    def _build_cuda(self) -> None:
        # By path: the package cannot be imported before it is built.
        spec = importlib.util.spec_from_file_location("multisa_cuda_build", CUDA_BUILD)
        build = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = build
        spec.loader.exec_module(build)
        extension = Path(self.get_ext_fullpath("multisa.kernels._native"))
        try:
            build.build_fatbin(build.find_nvcc(), extension.parent / "cuda" / build.FATBIN.name)
        except build.BuildError as error:
            if os.environ.get("MULTISA_CUDA") == "1":
                raise SystemExit(f"MULTISA_CUDA=1: {error}") from error
            print(f"without the CUDA kernels: {error}", file=sys.stderr)


class BuildModules(build_py):
    """The package `multisa` is the folder of this file, which is no module of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("multisa", "setup")]


setup(
    ext_modules=[
        Pybind11Extension(
            "multisa.kernels._native",
            sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.*")),
            include_dirs=[str(SOURCES)],
            cxx_std=17,
            # -Wno-psabi: vectors are passed between inlined functions only. Without the last, GCC moves the
            # loads of the unrolled walk away from their use, and spills what does not fit the registers.
            extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi", "-fno-schedule-insns2"],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildModules},
)
