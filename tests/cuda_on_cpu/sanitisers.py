"""Runs a script on a library of the kernels that was built with sanitisers."""

import os
import subprocess
import sys
from pathlib import Path

from cpu_device import SOURCES, build

# Threads for the race detector; fibers for the others, which need no second stack to find what they look for.
FLAGS = {
    "tsan": ("-DSHIM_THREADS", "-fsanitize=thread"),
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
RUNTIMES = {"tsan": "libtsan.so", "asan": "libasan.so"}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    # Fibers change stacks, which the check of returned stacks does not follow; Python keeps its memory.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0:malloc_context_size=2",
    "OPENBLAS_NUM_THREADS": "1",
}


def run_sanitised(
    sanitiser: str, script: Path, *arguments: str, main: str = "kernels.cu", sources: Path = SOURCES
) -> "subprocess.CompletedProcess[str]":
    """Run `script LIBRARY ARGUMENTS` in a Python that has loaded the run-time library of the sanitiser."""
    library = build(sources, ("-O0", "-g1", *FLAGS[sanitiser]), main)
    find = ["g++", f"-print-file-name={RUNTIMES[sanitiser]}"]
    runtime = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | OPTIONS | {"LD_PRELOAD": runtime}
    command = [sys.executable, os.fspath(script), os.fspath(library), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
