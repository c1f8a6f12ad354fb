"""The command line of benchmarks/gpu.sh: options, the steps, the results folder."""

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from multisa.benchmarks.gpu.look import find_nvcc
from multisa.benchmarks.gpu.runner import (
    ABSENT,
    FAILURE,
    LOGS,
    STEPS_FILE,
    Command,
    LeftOut,
    Row,
    Runner,
    Step,
)
from multisa.benchmarks.gpu.settings import ROOT, Settings, sources_stamp
from multisa.benchmarks.gpu.steps import BENCH, ENTERPRISE, MANIFEST, make_steps
from multisa.benchmarks.gpu.summary import NOT_PACKED, SUMMARY, Results, archive_path, pack, write_summary
from multisa.runtime.errors import BackendUnavailable

_DESCRIPTION = "Install, build plans, test the CUDA kernels, compare each engine and measure, on a GPU."
_EPILOG = (
    "Exit codes: 0 ok, 3 a gate failed, 5 no GPU, driver or engine that can be used, 130 and 143 stopped, "
    "1 anything else. The same command goes on where it stopped."
)
_VOC = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt")
_ELSEWHERE = "name another --output"
_USAGE = 2  # what argparse ends with; here 1, as everything else


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,  # a slip is not another option
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="VOC_LAYOUT",
        help="for the suite, and to compare on: photographs, lists and masks, of the bundle's classes",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        help="what is measured: a folder with bundle.json (default: that of the package)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-results"),
        metavar="DIR",
        help="folder of the results (default: gpu-results here); DIR.tar.gz is written beside it",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, photographs and repeats")
    parser.add_argument("--skip-tests", action="store_true", help="leave out tests/gpu")
    parser.add_argument("--tensorrt", action="store_true", help="also TensorRT itself (tensorrt-cu13)")
    parser.add_argument("--fresh", action="store_true", help="forget what is in DIR and begin anew")
    parser.add_argument("--plan", action="store_true", help="print the steps and do nothing")
    return parser.parse_args(arguments)


def settings_from_options(options: argparse.Namespace) -> Settings:
    """The paths absolute; TensorRT also where the Python that starts this has it."""
    return Settings(
        output=options.output.resolve(),  # so that it has a name, "." too
        data=options.data.resolve() if options.data else None,
        bundle=options.bundle.resolve() if options.bundle else None,
        is_quick=options.quick,
        skips_tests=options.skip_tests,
        wants_tensorrt=options.tensorrt or _has_tensorrt(),
    )


def _has_tensorrt() -> bool:
    """Whether TensorRT can be imported here; asked of another process, as a broken one can end it."""
    command = [sys.executable, "-c", f"import {ENTERPRISE}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def variables(environment: Path) -> Mapping[str, str]:
    """The variables of the steps: the environment's programs first, and the CUDA compiler on PATH."""
    nvcc = find_nvcc(environment)
    folders = [str(environment / "bin"), *([str(nvcc.parent)] if nvcc else []), os.environ.get("PATH", "")]
    unwanted = (
        "PYTHONPATH",
        "PYTHONHOME",
        "VIRTUAL_ENV",
    )  # would lead to other packages than the environment's
    return {name: value for name, value in os.environ.items() if name not in unwanted} | {
        "PATH": os.pathsep.join(folders)
    }


def print_plan(steps: list[Step]) -> None:
    """Each step with its commands, as far as they are known before the driver was asked."""
    for place, step in enumerate(steps, 1):
        commands = step.commands()
        print(f"{place:2} {step.name}: {step.what}")
        if isinstance(commands, LeftOut):
            print(f"     left out: {commands.reason}")
            continue
        for command in commands:
            print(f"     {_shown(command)}")


def _shown(command: Command) -> str:
    words = " ".join(f"'{word}'" if " " in word else word for word in command.arguments)
    return f"{words} > {command.output}" if command.output else words


def problem_of(settings: Settings) -> str:
    """What is wrong with the paths that were given, before anything is installed; nothing if they will do."""
    for path, inside, remedy in (
        (settings.data, _VOC, "name a data set in VOC layout, or leave --data out"),
        (settings.bundle, (MANIFEST,), "name a bundle that multisa made, or leave --bundle out"),
    ):
        missing = [name for name in inside if path and not (path / name).exists()]
        if missing:
            got = f"got a folder without {', '.join(missing)}" if path and path.is_dir() else "got no folder"
            return f"{path}: {got}, expected one with {', '.join(inside)}: {remedy}"
    output = settings.output
    there = next(path for path in (output, *output.parents) if path.exists())
    if not output.name or not there.is_dir():
        got = f"the file {there}" if output.name else "the root of all files"
        return f"{output}: got {got}, expected a folder that is there or can be made: {_ELSEWHERE}"
    return ""


def begin(settings: Settings) -> None:
    """Make the folders."""
    settings.output.mkdir(parents=True, exist_ok=True)
    settings.environment.mkdir(parents=True, exist_ok=True)


def forget(output: Path) -> None:
    """Remove what an earlier run has left in the folder of the results, and its archive."""
    if (output / STEPS_FILE).is_file():
        for name in (LOGS, *NOT_PACKED, BENCH):
            shutil.rmtree(output / name, ignore_errors=True)
        for file in (*output.glob("*.json"), output / SUMMARY, archive_path(output)):
            file.unlink(missing_ok=True)


@contextmanager
def alone(environment: Path) -> Iterator[bool]:
    """Whether no other run uses the environment; until the end of the block none begins to."""
    with (environment / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _told(settings: Settings, row: Row) -> str:
    """Why a run ended, and what to do; where something is not here, the reason says it itself."""
    again = f": see {settings.output / row.log}, mend it, and give the same command again"
    return f"{row.name}: {row.reason}{'' if row.outcome == ABSENT else again}"


def _on_signal(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    """Run the steps and write the results; returns the exit code."""
    try:
        options = read_options(arguments)
    except SystemExit as stop:
        return FAILURE if stop.code == _USAGE else 0
    settings = settings_from_options(options)
    if problem := problem_of(settings):
        print(f"error: {problem}", file=sys.stderr)
        return FAILURE
    if options.plan:
        with suppress(BrokenPipeError):  # a reader, such as head, may have had enough
            print_plan(make_steps(settings))
            sys.stdout.flush()
            return 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    try:
        begin(settings)
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}, expected to write there: {_ELSEWHERE}",
            file=sys.stderr,
        )
        return FAILURE
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, _on_signal)
    with alone(settings.environment) as is_alone:
        if not is_alone:
            print(f"error: {settings.environment}: another run uses it: wait for its end", file=sys.stderr)
            return FAILURE
        if options.fresh:
            forget(settings.output)
        return run(settings)


def run(settings: Settings) -> int:
    """Run all steps; the summary and the archive are written however far they came."""
    runner = Runner(settings.output, lambda: variables(settings.environment), stamp=sources_stamp(ROOT))
    steps = make_steps(settings)
    code = 128 + signal.SIGINT
    try:
        code = runner.run(steps)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
    except SystemExit as stop:
        code = int(stop.code or 0)
        print("\nstopped: the same command goes on", file=sys.stderr)
    results = Results(settings.output, runner.outdated(steps))
    summary = write_summary(results, runner.rows, code)
    print(f"{summary}\n{pack(results)}")
    if runner.ended_by:
        print(f"error: {_told(settings, runner.ended_by)}", file=sys.stderr)
    elif code == BackendUnavailable.exit_code:
        print("error: no engine has run on this GPU: see the steps of parity above", file=sys.stderr)
    return code
