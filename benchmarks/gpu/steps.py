"""The steps of benchmarks/gpu.sh, from the first look to the suite.

Up to "driver" nothing asks the driver, and what all others need ends the run where it fails. After it, a step
that fails is recorded and the others go on.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from multisa.benchmarks.gpu.look import find_nvcc
from multisa.benchmarks.gpu.runner import Command, Commands, LeftOut, Step

ROOT = Path(__file__).resolve().parents[2]
DRIVER_FILE = "driver.json"
CUDA_PROVIDER, RTX, ENTERPRISE = "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"
LIBRARIES, PRECISIONS = (RTX, ENTERPRISE), ("fp32", "fp16")
# NVIDIA's wheels of a toolkit: what it takes to compile the kernels and pycuda.
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-profiler-api")
_NEEDED_FILE = {"fp32": "segmenter.onnx", "fp16": "segmenter.fp16.onnx"}  # without it, none in that precision
_NOT_ASKED_FOR = "not asked for (--tensorrt)"
_NO_BUNDLE = "no bundle was made: see the step graphs"
FEW, MANY = 16, 128  # photographs to compare on


@dataclass(frozen=True)
class Settings:
    """What was asked for; paths absolute."""

    output: Path
    environment: Path = ROOT / ".venv-gpu"
    data: Path | None = None
    bundle: Path | None = None
    is_quick: bool = False
    skips_tests: bool = False
    wants_tensorrt: bool = False

    @property
    def python(self) -> str:
        """Python of the environment."""
        return str(self.environment / "bin" / "python")

    @property
    def multisa(self) -> str:
        """The command of the environment."""
        return str(self.environment / "bin" / "multisa")

    @property
    def made_bundle(self) -> Path:
        """The copy of the bundle that plans are built into."""
        return self.output / "work" / "bundle"

    @property
    def photographs(self) -> Path:
        """What engines are compared on: the data set, else the photographs of the package."""
        return self.data or ROOT / "runtime" / "demo_photos"

    @property
    def count(self) -> str:
        """How many of them at most."""
        return str(FEW if self.is_quick else MANY)


@dataclass(frozen=True)
class Machine:
    """What the step "driver" has written; placeholders before."""

    target: str = "SM_OF_THE_GPU"
    problems: dict[str, str] = field(default_factory=dict)  # of each TensorRT, empty where it can be used


def read_machine(output: Path) -> Machine:
    """Read DIR/driver.json; the placeholders where it is not there."""
    path = output / DRIVER_FILE
    if not path.is_file():
        return Machine()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Machine(found["target"], {name: each["problem"] for name, each in found["libraries"].items()})


def make_steps(settings: Settings) -> list[Step]:
    """All steps in their order."""
    return [*_steps_before_driver(settings), _driver(settings), *_checks(settings), *_engines(settings)]


def _module(settings: Settings, name: str, *arguments: str | Path) -> Command:
    return Command((settings.python, "-m", f"multisa.{name}", *map(str, arguments)))


def _started(python: str, name: str, *arguments: str | Path) -> Command:
    """A module of this folder, run by a Python that need not have the package."""
    script = ROOT / "benchmarks" / "gpu" / "start.py"
    return Command((python, "-P", str(script), name, *map(str, arguments)))


def _steps_before_driver(settings: Settings) -> Iterator[Step]:
    where = "--environment", settings.environment, "--output", settings.output / "look.json"
    look = [_started(sys.executable, "look", *where)]
    yield Step("look", "system, compilers, disk, driver files", lambda: look, True, is_always_run=True)
    yield Step(
        "environment",
        "install into .venv-gpu",
        lambda: _install(settings),
        is_needed=True,
        leaves=(settings.environment / "ready",),
    )
    yield Step("tensorrt", "install TensorRT itself", lambda: _install_tensorrt(settings))
    yield Step(
        "kernels",
        "compile the CUDA kernels",
        lambda: [_module(settings, "kernels.cuda.build")],
        is_needed=True,
        leaves=(ROOT / "kernels" / "cuda" / "kernels.fatbin",),
    )


def _install(settings: Settings) -> list[Command]:
    """torch first, at the version that is tested: the other packages then take the build that is there."""
    is_x86 = platform.machine() == "x86_64"  # for others there are no wheels of onnxruntime-gpu and RTX
    held = ("--constraint", str(ROOT / "constraints.txt"))
    install = (settings.python, "-m", "pip", "install", "--quiet")
    extras = "bench,gpu,rtx" if is_x86 else "bench,gpu"
    commands = [(sys.executable, "-m", "venv", str(settings.environment)), (*install, *held, "torch")]
    nvcc = find_nvcc(settings.environment)
    if not nvcc or nvcc.is_relative_to(settings.environment):
        commands.append((*install, *COMPILER))
    commands += [
        # It has no wheel. Linked against a stand-in for the driver, it loads the real one when it is used.
        (str(ROOT / "tests" / "cuda_on_cpu" / "install_pycuda.sh"), settings.python),
        # The kernels of the GPU are a step of their own.
        ("env", "MULTISA_CUDA=0", *install, *held, "--editable", f"{ROOT}[{extras}]", "pytest"),
    ]
    if is_x86:
        # One module in two packages: with both gone, what is installed is whole.
        commands += [
            (settings.python, "-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime", "onnxruntime-gpu"),
            (*install, "onnxruntime-gpu[cuda,cudnn]"),
        ]
    commands += [
        (settings.python, "-m", "pip", "list"),
        ("touch", str(settings.environment / "ready")),
    ]
    return [Command(command) for command in commands]


def _install_tensorrt(settings: Settings) -> Commands:
    """A step that nothing else needs: its wheels may be out of reach where all others are not."""
    if not settings.wants_tensorrt:
        return LeftOut(_NOT_ASKED_FOR)
    return [Command((settings.python, "-m", "pip", "install", "--quiet", "tensorrt-cu13"))]


def _driver(settings: Settings) -> Step:
    command = _module(settings, "benchmarks.gpu.driver", "--output", settings.output / DRIVER_FILE)
    return Step(
        "driver",
        "the first call of the driver: which GPU, do the kernels load",
        lambda: [command],
        is_needed=True,
        is_always_run=True,
        leaves=(settings.output / DRIVER_FILE,),
    )


def _checks(settings: Settings) -> Iterator[Step]:
    output, depends_on = settings.output, settings.output / DRIVER_FILE
    # pytest takes its settings and its root from the checkout that is the working folder.
    tests = [_module(settings, "benchmarks.gpu.checks", "--output", output / "tests-gpu.json", "tests/gpu")]
    timing = _module(
        settings, "benchmarks.gpu.kernels", "--output", output / "kernels.json", *_quick(settings)
    )
    half = ("--output", settings.made_bundle, "--report", output / "fp16.json", "--count", settings.count)
    source = ("--bundle", settings.bundle) if settings.bundle else ()
    graphs = _module(settings, "benchmarks.gpu.graphs", *source, "--photographs", settings.photographs, *half)
    doctor = Command((settings.multisa, "doctor", "--json"), output=output / "doctor.json")
    skipped = LeftOut("--skip-tests")
    yield Step("doctor", "each engine, tried", lambda: [doctor], depends_on=depends_on)
    yield Step(
        "tests",
        "tests/gpu: kernels and engines against their references",
        lambda: skipped if settings.skips_tests else tests,
        depends_on=depends_on,
    )
    yield Step("kernel-times", "kernels at sizes of use", lambda: [timing], depends_on=depends_on)
    yield Step(
        "graphs",
        "a copy of the bundle with fp16 graphs",
        lambda: [graphs],
        leaves=(settings.made_bundle / "bundle.json",),
        depends_on=depends_on,
    )


def _engines(settings: Settings) -> Iterator[Step]:
    """Plans, then parity of each engine and precision, then the suite."""
    depends_on = settings.output / DRIVER_FILE
    for library in LIBRARIES:
        for precision in PRECISIONS:
            yield Step(
                f"plans-{library}-{precision}",
                f"build the plans of {library} in {precision}",
                partial(_build, settings, library, precision),
                depends_on=depends_on,
            )
    for engine in (CUDA_PROVIDER, *LIBRARIES):
        for precision in PRECISIONS:
            yield Step(
                f"parity-{engine}-{precision}",
                f"{engine} in {precision} against fp32 on the CPU",
                partial(_parity, settings, engine, precision),
                engine=engine,
                depends_on=depends_on,
            )
    yield Step("bench", "the suite", lambda: _bench(settings), depends_on=depends_on)


def _build(settings: Settings, library: str, precision: str) -> Commands:
    machine = read_machine(settings.output)
    reason = _why_not(settings, machine, library, precision)
    if reason:
        return LeftOut(reason)
    asked = ("--target", machine.target, "--precision", precision, "--library", library)
    report = settings.output / f"plans-{library}-{precision}.json"
    return [Command((settings.multisa, "build", str(settings.made_bundle), *asked, "--json", str(report)))]


def _parity(settings: Settings, engine: str, precision: str) -> Commands:
    reason = _why_not(settings, read_machine(settings.output), engine, precision)
    if reason:
        return LeftOut(reason)
    asked = ("--engine", engine, "--precision", precision, "--photographs", str(settings.photographs))
    report = settings.output / f"parity-{engine}-{precision}.json"
    told = ("--count", settings.count, "--report", str(report))
    return [Command((settings.multisa, "parity", str(settings.made_bundle), *asked, *told))]


def _bench(settings: Settings) -> Commands:
    if not settings.data:
        return LeftOut("no --data: the suite measures on a data set in VOC layout")
    if not _bundle_files(settings, read_machine(settings.output)):
        return LeftOut(_NO_BUNDLE)
    asked = ("--bundle", str(settings.made_bundle), "--data", str(settings.data))
    told = ("--output", str(settings.output / "bench"), *_quick(settings))
    return [Command((settings.multisa, "bench", *asked, *told))]


def _why_not(settings: Settings, machine: Machine, engine: str, precision: str) -> str:
    """Why an engine cannot be had here in a precision, or nothing."""
    if engine == CUDA_PROVIDER and platform.machine() != "x86_64":
        return f"onnxruntime-gpu has no wheel for {platform.machine()}"
    if engine == ENTERPRISE and not settings.wants_tensorrt and not machine.problems:
        return _NOT_ASKED_FOR
    if problem := machine.problems.get(engine):
        return problem
    files = _bundle_files(settings, machine)
    if not files:
        return _NO_BUNDLE
    return "" if _NEEDED_FILE[precision] in files else f"no {precision} graphs: see the step graphs"


def _bundle_files(settings: Settings, machine: Machine) -> Collection[str]:
    """Names in the bundle that was made; before the driver was asked, those that it will have."""
    manifest = settings.made_bundle / "bundle.json"
    if not machine.problems:
        return _NEEDED_FILE.values()
    if not manifest.is_file():
        return ()
    files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return files


def _quick(settings: Settings) -> tuple[str, ...]:
    return ("--quick",) if settings.is_quick else ()


def sources_stamp(root: Path) -> str:
    """The state of the checkout: its commit, and a digest of what differs from it; nothing without git."""
    try:
        told = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("diff", "HEAD"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    commit, changes = told[0].decode().strip(), told[1]
    return f"{commit} with changes {sha256(changes).hexdigest()[:12]}" if changes else commit
