"""`CpuDevice`: carries out the launches of a host schedule on the CPU, by the header cuda_on_cpu.hpp.

device = CpuDevice(build())            # kernels.cu through g++, kept in build/cuda_on_cpu by digest
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.device import Argument, Dim3, Schedule

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "kernels" / "csrc" / "cuda"
CACHE = HERE.parents[1] / "build" / "cuda_on_cpu"
COMMON_FLAGS = (
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-DMULTISA_ON_CPU",
)
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")


INCLUDE = re.compile(r'#include "([^"]+)"')


def build(sources: Path = SOURCES, flags: Sequence[str] = ("-O2",), main: str = "kernels.cu") -> Path:
    """Compile `main` of the folder `sources` for the CPU and return the library; cached by what goes in.

    `main` may be one of the headers: then only its kernels, and those it includes, are in the library.
    """
    reached = "".join(_reached(sources, main, set())) + "".join(p.read_text() for p in sorted(HERE.glob("*.hpp")))
    register = "".join(
        f'static cuda_on_cpu::Registration<&{name}> register_{name}("{name}");\n'
        for name in sorted(set(KERNEL.findall(reached)))
    )
    key = "\0".join([reached, register, *COMMON_FLAGS, *flags])
    library = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        wrapper, made = Path(folder) / "kernels_on_cpu.cpp", Path(folder) / library.name
        wrapper.write_text(f'#include "{main}"\n{register}')
        command = ["g++", *COMMON_FLAGS, *flags, f"-I{sources}", f"-I{HERE}", str(wrapper), "-o", str(made)]
        result = subprocess.run([*command, "-pthread"], capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"g++ failed on {sources / main}:\n{result.stderr}")
        made.replace(library)
    return library


def _reached(sources: Path, name: str, seen: set[str]) -> list[str]:
    """The texts of a file and of everything in its folder that it includes."""
    if name in seen or not (sources / name).is_file():
        return []
    seen.add(name)
    text = (sources / name).read_text()
    return [text, *(part for other in INCLUDE.findall(text) for part in _reached(sources, other, seen))]


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """Copy the sources into `folder` with one text replaced, for tests that break a kernel on purpose."""
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    text = (folder / file).read_text()
    if text.count(old) == 0:
        raise ValueError(f"{file} does not contain {old!r}")
    (folder / file).write_text(text.replace(old, new))
    return folder


class CpuBuffer:
    """Memory from the library's own malloc, so that AddressSanitizer knows its end; filled with 0xff."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self.pointer: int = library.cuda_on_cpu_allocate(size)
        self.size = size
        weakref.finalize(self, library.cuda_on_cpu_free, ctypes.c_void_p(self.pointer))


@dataclass(frozen=True)
class Launch:
    """One recorded launch, for tests of a schedule."""

    name: str
    grid: Dim3
    block: Dim3
    shared_bytes: int


class CpuDevice:
    """A `Device` that works at once and in order; `stream` means nothing here.

    seed != 0 shuffles the order of blocks and of threads between barriers. `launches` lists what ran.
    """

    def __init__(self, library: Path, *, seed: int = 0) -> None:
        self._library = ctypes.CDLL(os.fspath(library))
        self._library.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self._library.cuda_on_cpu_allocate.argtypes = [ctypes.c_ulonglong]
        self._library.cuda_on_cpu_free.restype = None
        self._library.cuda_on_cpu_launch.restype = ctypes.c_char_p
        self._recording: list[Callable[[], None]] | None = None
        self.seed = seed
        self.launches: list[Launch] = []

    def allocate(self, size: int) -> CpuBuffer:
        if self._recording is not None:
            raise RuntimeError("allocation inside a recording")
        return CpuBuffer(self._library, size)

    def upload(self, target: int, array: npt.NDArray[Any]) -> None:
        if not array.flags.c_contiguous or self._recording is not None:
            raise RuntimeError("upload of a strided array, or inside a recording")
        ctypes.memmove(target, array.ctypes.data, array.nbytes)

    def download(self, source: int, array: npt.NDArray[Any], stream: int = 0) -> None:
        if not array.flags.c_contiguous or self._recording is not None:
            raise RuntimeError("download to a strided array, or inside a recording")
        ctypes.memmove(array.ctypes.data, source, array.nbytes)

    def fill(self, target: int, value: int, count: int, stream: int = 0) -> None:
        words = np.full(count, value, dtype=np.uint32)
        self._do(lambda: ctypes.memmove(target, words.ctypes.data, words.nbytes))

    def launch(
        self,
        name: str,
        grid: Dim3,
        block: Dim3,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        stream: int = 0,
    ) -> None:
        # Kept in this frame and copied, as a launch (and a CUDA graph) copies its arguments.
        values = [
            np.array(argument if isinstance(argument, np.generic) else np.uint64(argument)) for argument in arguments
        ]
        kinds = "".join(_kind(argument) for argument in arguments).encode()

        def run() -> None:
            self.launches.append(Launch(name, grid, block, shared_bytes))
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            dims = [(ctypes.c_uint * 3)(*dim) for dim in (grid, block)]
            size = ctypes.c_ulonglong(shared_bytes)
            launch = self._library.cuda_on_cpu_launch
            error = launch(name.encode(), *dims, size, kinds, pointers, ctypes.c_uint(self.seed))
            if error:
                raise RuntimeError(f"{name}{list(grid)}{list(block)}: {error.decode()}")

        self._do(run)

    def record(self, schedule: Schedule) -> Schedule:
        if self._recording is not None:
            raise RuntimeError("a recording inside a recording")
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        try:
            schedule(0)
        finally:
            self._recording = None

        def replay(stream: int) -> None:
            for action in recorded:
                self._do(action)

        return replay

    def _do(self, action: Callable[[], Any]) -> None:
        """Run now, or keep for the replay."""
        if self._recording is None:
            action()
        else:
            self._recording.append(action)


def _kind(argument: Argument) -> str:
    """Name the C type of an argument as launch.hpp does."""
    if not isinstance(argument, np.generic):
        return "P"
    letters = {"int32": "i", "uint32": "I", "int64": "q", "uint64": "Q", "float32": "f", "float64": "d"}
    return letters[argument.dtype.name]
