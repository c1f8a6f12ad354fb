"""No command writes to the home folder or opens a network socket: each runs with an empty home, watched."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.demo import IMAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "runtime", "training", "export", "benchmarks")
SEGMENT = ["segment", str(IMAGES), "-o", "out"]
# Loaded before the C library: notes the family of each socket that is not local to the machine.
WATCH = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

int socket(int family, int type, int protocol) {
    if (family != AF_UNIX) {
        FILE *log = fopen(getenv("SOCKETS"), "a");
        fprintf(log, "socket of the family %d\n", family);
        fclose(log);
    }
    return ((int (*)(int, int, int))dlsym(RTLD_NEXT, "socket"))(family, type, protocol);
}
"""
# As `multisa bench --quick`, with efforts that take seconds.
BENCH = """
import sys
from dataclasses import replace
from multisa.benchmarks.suite import context
from multisa.runtime.cli.main import main
few = {"latency_images": 1, "latency_rounds": 1, "masks": 1, "end_to_end": 1, "end_to_end_rounds": 1}
context.BenchContext.pytorch_problem = "left out, as loading it takes longer than all others"
context.QUICK = replace(context.QUICK, batches=(1,), sides=(64,), repeats=1, **few)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("sockets are watched with LD_PRELOAD, which Linux has")
    library = tmp_path_factory.mktemp("watch") / "watch.so"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=WATCH, text=True, check=True)
    return library


KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS")


class Watched:
    """Runs Python with an empty home; `files` and `sockets` are what the runs have left there and opened."""

    def __init__(self, folder: Path, watch: Path) -> None:
        self._folder, self._home, self._log = folder, folder / "home", folder / "sockets.log"
        self._home.mkdir()
        self._environment = {
            # Not the others: under CI, ONNX Runtime sends nothing by itself.
            **{name: value for name, value in os.environ.items() if name in KEPT},
            "HOME": str(self._home),
            "XDG_CACHE_HOME": str(self._home / ".cache"),
            "MPLCONFIGDIR": str(folder / "matplotlib"),  # matplotlib keeps a list of the fonts of the machine
            "LD_PRELOAD": str(watch),
            "SOCKETS": str(self._log),
        }

    def run(self, *arguments: str, **environment: str) -> None:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr

    @property
    def files(self) -> list[str]:
        return sorted(path.relative_to(self._home).as_posix() for path in self._home.rglob("*"))

    @property
    def sockets(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@pytest.fixture
def watched(tmp_path: Path, watch: Path) -> Watched:
    return Watched(tmp_path, watch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["demo", "-o", "out"],
        SEGMENT,
        [*SEGMENT, "--num-processes", "2"],
        [*SEGMENT, "--backend", "openvino"],
        ["label", str(IMAGES), "-o", "out", "--labels", str(IMAGES / "labels.csv")],
    ],
    ids=["doctor", "demo", "segment", "processes", "openvino", "label"],
)
def test_a_command_leaves_the_home_empty_and_opens_no_socket(watched: Watched, arguments: list[str]) -> None:
    if "openvino" in arguments and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    watched.run("-m", "multisa.runtime.cli.main", *arguments)
    assert (watched.files, watched.sockets) == ([], "")


@pytest.mark.slow
def test_a_benchmark_leaves_the_home_empty_and_opens_no_socket(
    watched: Watched, voc_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    (data / "classes.txt").write_text("\n".join(load_bundle(default_bundle_path()).manifest.classes) + "\n")
    names = json.loads((data / "labels.json").read_text())
    (data / "labels.json").write_text(json.dumps({name: ["cat"] for name in names}))
    options = ["--quick", "--stages", "segment", "--backends", "onnxruntime-cpu"]
    watched.run("-c", BENCH, "bench", "--data", str(data), "-o", "out", *options)
    assert all(row["images_per_second"] > 0 for row in json.loads((tmp_path / "out/bench.json").read_text())["segment"])
    assert (watched.files, watched.sockets) == ([], "")


@pytest.mark.slow
def test_the_watch_sees_files_and_sockets(watched: Watched) -> None:
    """The library sends its telemetry if the user asks for it, which also shows that this variable stops it."""
    watched.run("-m", "multisa.runtime.cli.main", *SEGMENT, ORT_DISABLE_TELEMETRY="0")
    assert any(name.endswith(".onnxruntime/deviceid") for name in watched.files)
    watched.run("-c", "import socket; socket.socket(socket.AF_INET6).close()")
    assert watched.sockets == "socket of the family 10\n"


@pytest.mark.parametrize(("before", "seen"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_the_environment_is_what_it_was_after_the_import(tmp_path: Path, before: str | None, seen: str) -> None:
    """`seen` is the variable during the import."""
    (tmp_path / "onnxruntime.py").write_text(
        "import os\nseen = os.environ.get('ORT_DISABLE_TELEMETRY')\ndef disable_telemetry_events(): pass\n"
    )
    program = (
        "import os, sys; from multisa.runtime.backends.onnxruntime import import_onnxruntime as import_; "
        "print(import_().seen, os.environ.get('ORT_DISABLE_TELEMETRY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"PYTHONPATH": str(tmp_path)} | ({} if before is None else {"ORT_DISABLE_TELEMETRY": before})
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{seen} {before}\n"


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Elsewhere a function may import its submodules, after a call of `import_onnxruntime`."""
    found = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        imports = [i for i, line in enumerate(lines) if line.strip().startswith(("import onnxr", "from onnxr"))]
        functions = ast.walk(ast.parse("\n".join(lines))) if imports else ()
        spans = [range(f.lineno, f.end_lineno or 0) for f in functions if isinstance(f, ast.FunctionDef)]
        safe = [span for span in spans if any("import_onnxruntime()" in lines[i] for i in (span.start - 1, *span))]
        found += [f"{path.relative_to(ROOT)}:{i + 1}" for i in imports if not any(i in span for span in safe)]
    assert not found
