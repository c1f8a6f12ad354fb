"""The steps of benchmarks/gpu.sh, from the first look to the suite.

Up to "driver" nothing asks the driver, and what all others need ends the run where it fails. After it, a step
that fails is recorded and the others go on.
"""

import json
import platform
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from multisa.benchmarks.gpu.look import find_nvcc
from multisa.benchmarks.gpu.runner import Command, Commands, LeftOut, Step
from multisa.benchmarks.gpu.settings import DRIVER_FILE, ROOT, Machine, Settings, read_machine

BENCH = "bench"  # folder of the suite's report
MANIFEST, PLANS = "bundle.json", "engines"  # in a bundle
CUDA_PROVIDER, RTX, ENTERPRISE = "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"
LIBRARIES, PRECISIONS = (RTX, ENTERPRISE), ("fp32", "fp16")
# NVIDIA's wheels of a toolkit: what it takes to compile the kernels and pycuda.
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-profiler-api")
_NEEDED_FILE = {"fp32": "segmenter.onnx", "fp16": "segmenter.fp16.onnx"}  # without it, none in that precision
_NOT_ASKED_FOR = "not asked for (--tensorrt)"
_NO_BUNDLE = "no bundle was made: see the step graphs"


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
    yield Step(
        "look",
        "system, compilers, disk, driver files",
        lambda: look,
        is_needed=True,
        is_always_run=True,
        writes=(settings.output / "look.json",),
    )
    yield Step(
        "environment",
        "install into .venv-gpu",
        lambda: _install(settings),
        is_needed=True,
        leaves=(settings.environment / "ready",),
        writes=(settings.environment / "ready",),
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
        writes=(settings.output / DRIVER_FILE,),
    )


def _recorded(settings: Settings, name: str, what: str, file: str, commands: Callable[[], Commands]) -> Step:
    """A step after the driver's whose result is DIR/FILE."""
    result = (settings.output / file,)
    depends_on = (settings.output / DRIVER_FILE,)
    return Step(name, what, commands, leaves=result, writes=result, depends_on=depends_on)


def _checks(settings: Settings) -> Iterator[Step]:
    output = settings.output
    # pytest takes its settings and its root from the checkout that is the working folder.
    tests = [_module(settings, "benchmarks.gpu.checks", "--output", output / "tests-gpu.json", "tests/gpu")]
    timing = _module(
        settings, "benchmarks.gpu.kernels", "--output", output / "kernels.json", *_quick(settings)
    )
    doctor = Command((settings.multisa, "doctor", "--json"), output=output / "doctor.json")
    skipped = LeftOut("--skip-tests")
    yield _recorded(settings, "doctor", "each engine, tried", "doctor.json", lambda: [doctor])
    yield _recorded(
        settings,
        "tests",
        "tests/gpu: kernels and engines against their references",
        "tests-gpu.json",
        lambda: skipped if settings.skips_tests else tests,
    )
    yield _recorded(settings, "kernel-times", "kernels at sizes of use", "kernels.json", lambda: [timing])
    yield _graphs(settings)


def _graphs(settings: Settings) -> Step:
    """The plans go with the bundle that they are in: nothing after it is of a bundle that was before."""
    report = settings.output / "fp16.json"
    half = ("--output", settings.made_bundle, "--report", report, "--count", settings.count)
    source = ("--bundle", settings.bundle) if settings.bundle else ()
    command = _module(
        settings, "benchmarks.gpu.graphs", *source, "--photographs", settings.photographs, *half
    )
    given = (settings.bundle / MANIFEST,) if settings.bundle else ()
    return Step(
        "graphs",
        "a copy of the bundle with fp16 graphs",
        lambda: [command],
        leaves=(settings.made_bundle / MANIFEST,),
        writes=(settings.made_bundle, report),
        depends_on=(settings.output / DRIVER_FILE, *given),
    )


def _engines(settings: Settings) -> Iterator[Step]:
    """Plans, then parity of each engine and precision, then the suite: of the bundle that was made."""
    depends_on = (settings.output / DRIVER_FILE, settings.made_bundle / MANIFEST)
    for library in LIBRARIES:
        for precision in PRECISIONS:
            report = settings.output / f"plans-{library}-{precision}.json"
            yield Step(
                f"plans-{library}-{precision}",
                f"build the plans of {library} in {precision}",
                partial(_build, settings, library, precision, report),
                leaves=(report, settings.made_bundle / PLANS),
                writes=(report,),
                depends_on=depends_on,
            )
    for engine in (CUDA_PROVIDER, *LIBRARIES):
        for precision in PRECISIONS:
            report = settings.output / f"parity-{engine}-{precision}.json"
            yield Step(
                f"parity-{engine}-{precision}",
                f"{engine} in {precision} against fp32 on the CPU",
                partial(_parity, settings, engine, precision, report),
                leaves=(report,),
                writes=(report,),
                engine=engine,
                depends_on=depends_on,
            )
    folder = settings.output / BENCH
    yield Step(
        "bench",
        "the suite",
        lambda: _bench(settings),
        leaves=(folder / "bench.json",),
        writes=(folder,),
        depends_on=depends_on,
    )


def _build(settings: Settings, library: str, precision: str, report: Path) -> Commands:
    machine = read_machine(settings.output)
    reason = _why_not(settings, machine, library, precision)
    if reason:
        return LeftOut(reason)
    asked = ("--target", machine.target, "--precision", precision, "--library", library)
    return [Command((settings.multisa, "build", str(settings.made_bundle), *asked, "--report", str(report)))]


def _parity(settings: Settings, engine: str, precision: str, report: Path) -> Commands:
    reason = _why_not(settings, read_machine(settings.output), engine, precision)
    if reason:
        return LeftOut(reason)
    asked = ("--backend", engine, "--precision", precision, "--images", str(settings.photographs))
    told = ("--num-images", settings.count, "--report", str(report))
    return [Command((settings.multisa, "parity", str(settings.made_bundle), *asked, *told))]


def _bench(settings: Settings) -> Commands:
    if not settings.data:
        return LeftOut("no --data: the suite measures on a data set in VOC layout")
    if not _bundle_files(settings, read_machine(settings.output)):
        return LeftOut(_NO_BUNDLE)
    asked = ("--bundle", str(settings.made_bundle), "--data", str(settings.data))
    told = ("--output", str(settings.output / BENCH), *_quick(settings))
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
    manifest = settings.made_bundle / MANIFEST
    if not machine.problems:
        return _NEEDED_FILE.values()
    if not manifest.is_file():
        return ()
    files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return files


def _quick(settings: Settings) -> tuple[str, ...]:
    return ("--quick",) if settings.is_quick else ()
