"""The compiled parts of the package: the kernels on the CPU, and those on CUDA if MULTISA_CUDA=1 asks for them."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("kernels/csrc/cpu")
CUDA_BUILD = Path("kernels/cuda/build.py")
REMEDY = """
multisa compiles its kernels when it is installed: {problem}.
Install what is missing and run the same command again:
  Debian, Ubuntu   sudo apt-get install {debian}
  Fedora           sudo dnf install {fedora}
  macOS            xcode-select --install
"""


class BuildKernels(build_ext):
    """Builds the extension module, and the CUDA kernels on request; says what to install if it cannot."""

    def run(self) -> None:
        cuda = os.environ.get("MULTISA_CUDA") or "0"
        if cuda not in ("0", "1"):
            raise SystemExit(f"MULTISA_CUDA: got {cuda!r}, expected 0, or 1 to compile the CUDA kernels: set one")
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(f"{error}\n{self._remedy()}") from error
        if cuda == "1":
            self._build_cuda()

    def _remedy(self) -> str:
        compiler = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        header = Path(sysconfig.get_path("include"), "Python.h")
        missing = []  # what is missing, and its packages
        if shutil.which(compiler) is None:
            missing.append((f"{compiler} was not found, a compiler of C++17", "g++", "gcc-c++"))
        if not header.is_file():
            missing.append((f"{header} was not found, a header of Python", "python3-dev", "python3-devel"))
        if not missing:
            problem = f"{compiler} failed (see above); it must compile C++17"
            missing.append((problem, "g++ python3-dev", "gcc-c++ python3-devel"))
        problems, debian, fedora = zip(*missing, strict=True)
        return REMEDY.format(problem="; ".join(problems), debian=" ".join(debian), fedora=" ".join(fedora))

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
            raise SystemExit(f"MULTISA_CUDA=1: {error}") from error


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
