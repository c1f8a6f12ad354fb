"""The steps of benchmarks/gpu.sh: commands that can be parsed, what is left out, its command line."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import click
import pytest

from multisa.benchmarks.gpu import look, main
from multisa.benchmarks.gpu.runner import Command, LeftOut, Step
from multisa.benchmarks.gpu.settings import ROOT, Machine, Settings, read_machine
from multisa.benchmarks.gpu.steps import make_steps
from multisa.runtime.cli.main import COMMANDS, root

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS_BEFORE_DRIVER = ("look", "environment", "kernels", "driver")


def settings(tmp_path: Path, **options: Any) -> Settings:
    return Settings(tmp_path / "out put", tmp_path / "venv", **options)


def write_driver(settings: Settings, **problems: str) -> None:
    settings.output.mkdir(parents=True)
    libraries = {name.replace("_", "-"): {"version": "1", "problem": why} for name, why in problems.items()}
    found = {"target": "sm89", "libraries": libraries}
    (settings.output / "driver.json").write_text(json.dumps(found))


def write_bundle(settings: Settings, *files: str) -> None:
    settings.made_bundle.mkdir(parents=True)
    (settings.made_bundle / "bundle.json").write_text(json.dumps({"files": dict.fromkeys(files)}))


def left_out(settings: Settings) -> dict[str, str]:
    commands = {each.name: each.commands() for each in make_steps(settings)}
    return {name: each.reason for name, each in commands.items() if isinstance(each, LeftOut)}


def test_every_command_can_be_parsed(tmp_path: Path) -> None:
    asked = settings(tmp_path, data=tmp_path, bundle=tmp_path, is_quick=True, wants_tensorrt=True)
    write_driver(asked, tensorrt_rtx="", tensorrt="")
    write_bundle(asked, "segmenter.onnx", "segmenter.fp16.onnx")
    parsed = []
    for each in make_steps(asked):
        commands = each.commands()
        assert not isinstance(commands, LeftOut), each.name
        for command in commands:
            program, *words = command.arguments
            if program == asked.multisa:
                if words[0] == "bench" and "bench" not in COMMANDS:  # where the suite is not in yet
                    continue
                made = root.get_command(click.Context(root), words[0])
                assert made is not None, words
                made.make_context(words[0], words[1:])
                parsed.append(words[0])
            elif words[:1] == ["-m"] and words[1].startswith("multisa.benchmarks."):
                importlib.import_module(words[1]).make_parser().parse_args(words[2:])
                parsed.append(words[1].rpartition(".")[2])
    assert {"doctor", "build", "parity", "driver", "checks", "kernels", "graphs"} <= set(parsed)


def test_only_what_is_before_the_driver_is_needed(tmp_path: Path) -> None:
    steps = make_steps(settings(tmp_path))
    assert tuple(each.name for each in steps if each.is_needed) == STEPS_BEFORE_DRIVER
    names = [each.name for each in steps]
    assert names[: names.index("driver") + 1] == ["look", "environment", "tensorrt", "kernels", "driver"]
    assert len({each.name for each in steps}) == len(steps)


def test_what_is_not_for_this_machine_is_left_out(tmp_path: Path) -> None:
    asked = settings(tmp_path, skips_tests=True)
    write_driver(asked, tensorrt_rtx="", tensorrt="is not installed")
    reasons = left_out(asked)
    assert all(
        "no bundle" in reasons[name] for name in ("plans-tensorrt-rtx-fp32", "parity-tensorrt-rtx-fp16")
    )
    write_bundle(asked, "segmenter.onnx")
    reasons = left_out(asked)
    assert reasons["tests"] == "--skip-tests"
    assert "--data" in reasons["bench"]
    assert reasons["plans-tensorrt-fp32"] == reasons["parity-tensorrt-fp32"] == "is not installed"
    assert "no fp16" in reasons["plans-tensorrt-rtx-fp16"]
    for name in ("plans-tensorrt-rtx-fp32", "parity-tensorrt-rtx-fp32", "doctor", "kernel-times"):
        assert name not in reasons
    assert read_machine(asked.output) == Machine("sm89", {"tensorrt-rtx": "", "tensorrt": "is not installed"})


def test_the_plan_is_printed_and_nothing_is_done(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--plan", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert " 5 driver: " in result.stdout and "parity-tensorrt-rtx-fp16" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_plan_may_stop_early(tmp_path: Path) -> None:
    asked = f"bash '{SCRIPT}' --plan --output '{tmp_path}/out' | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("module", ["main", "look"])
def test_it_starts_without_any_package(module: str) -> None:
    start = ROOT / "benchmarks" / "gpu" / "start.py"
    command = [sys.executable, "-S", "-P", str(start), module, "--help"]  # -S: no installed package is found
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--fres"], "unrecognized arguments: --fres"),
        (["--data", "/not/there"], "/not/there: got no folder, expected one with JPEGImages"),
        (["--data", str(ROOT)], "got a folder without JPEGImages, SegmentationClass"),
        (["--bundle", "/not/there"], "/not/there: got no folder, expected one with bundle.json"),
        (["--bundle", str(ROOT)], "got a folder without bundle.json"),
        (["--output", __file__], f"got the file {__file__}"),
        (["--output", f"{__file__}/results"], f"got the file {__file__}"),
        (["--output", "/"], "got the root of all files"),
    ],
)
def test_what_cannot_be_is_exit_code_1(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*words, "--plan"]) == 1
    out, error = capsys.readouterr()
    assert "error: " in error and told in error
    assert not out


def test_another_python_than_the_one_asked_for_is_not_taken() -> None:
    environment = os.environ | {"PYTHON": "/not/there/python"}
    command = ["bash", str(SCRIPT), "--plan"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert "looked for /not/there/python: " in result.stderr


def test_a_run_without_a_driver_ends_with_5_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(tmp_path)
    main.begin(asked)
    words = ("-m", "multisa.benchmarks.gpu.driver", "--output", str(asked.output / "driver.json"))
    commands = {"kernels": ("true",), "driver": (sys.executable, *words), "doctor": ("false",)}
    steps = [Step(n, "", lambda c=c: [Command(c)], is_needed=n != "doctor") for n, c in commands.items()]
    monkeypatch.setattr(main, "make_steps", lambda _: steps)
    monkeypatch.setattr(main, "variables", lambda _: os.environ | {"LD_LIBRARY_PATH": str(tmp_path)})
    (tmp_path / "libcuda.so.1").write_text("not a library")  # also where a driver is
    assert main.run(asked) == 5
    told = capsys.readouterr().err
    assert "error: driver: no NVIDIA driver here" in told and "same command again" in told
    assert "Exit code 5" in (asked.output / "summary.md").read_text()
    with tarfile.open(f"{asked.output}.tar.gz") as archive:
        assert {"out put/steps.json", "out put/logs/driver.log", "out put/summary.md"} <= set(
            archive.getnames()
        )


def test_a_run_that_cannot_go_on_names_the_log_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(tmp_path)
    main.begin(asked)
    command = Command(("sh", "-c", "echo 'ERROR: no wheel'; exit 1"))
    steps = [Step("environment", "", lambda: [command], is_needed=True)]
    monkeypatch.setattr(main, "make_steps", lambda _: steps)
    assert main.run(asked) == 1
    log = asked.output / "logs" / "environment.log"
    told = f"error: environment: no wheel: see {log}, mend it, and give the same command again\n"
    assert capsys.readouterr().err == told


def test_fresh_forgets_and_touches_nothing_else(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    asked.made_bundle.mkdir(parents=True)
    (asked.output / "notes.json").write_text("{}")
    main.forget(asked.output)  # no folder of results: nothing in it is ours
    assert (asked.output / "notes.json").exists() and asked.made_bundle.exists()
    (asked.output / "steps.json").write_text("{}")
    (asked.output / "photo.jpg").touch()
    (asked.output / "bench").mkdir()
    for old in ("bench/bench.json", "summary.md", "../out put.tar.gz"):
        (asked.output / old).write_text("of an earlier run")
    main.forget(asked.output)
    assert [path.name for path in asked.output.iterdir()] == ["photo.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["out put"]


def test_one_run_at_a_time_uses_the_environment(tmp_path: Path) -> None:
    with main.alone(tmp_path) as first, main.alone(tmp_path) as second:
        assert first and not second
    with main.alone(tmp_path) as again:
        assert again


def test_fresh_forgets_nothing_of_a_run_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(tmp_path)
    main.begin(asked)
    (asked.output / "steps.json").write_text("{}")
    monkeypatch.setattr(main, "settings_from_options", lambda _: asked)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    with main.alone(asked.environment):
        assert main.main(["--fresh"]) == 1
    assert "another run uses it" in capsys.readouterr().err
    assert (asked.output / "steps.json").exists()


def test_variables_lead_to_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = main.variables(tmp_path / "venv")
    assert "PYTHONPATH" not in found
    assert found["PATH"].split(":")[:2] == [str(tmp_path / "venv" / "bin"), str(tmp_path / "toolkit" / "bin")]


def test_a_compiler_of_wheels_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no other compiler: a second run gives the same commands, else the step would be done again."""
    monkeypatch.setattr(look, "TOOLKIT", tmp_path / "absent")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    asked = settings(tmp_path)
    before = make_steps(asked)[1].commands()
    assert "nvidia-cuda-nvcc" in str(before)
    made = asked.environment / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13" / "bin"
    made.mkdir(parents=True)
    (made / "nvcc").touch()
    assert make_steps(asked)[1].commands() == before
    assert main.variables(asked.environment)["PATH"].split(":")[1] == str(made)


def test_each_result_is_removed_before_its_step_and_belongs_to_it_alone(tmp_path: Path) -> None:
    asked = settings(tmp_path, data=tmp_path, bundle=tmp_path, is_quick=True, wants_tensorrt=True)
    write_driver(asked, tensorrt_rtx="", tensorrt="")
    write_bundle(asked, "segmenter.onnx", "segmenter.fp16.onnx")
    steps = make_steps(asked)
    owned = [path for each in steps for path in each.writes]
    assert len(owned) == len(set(owned))
    for each in steps:
        commands = each.commands()
        assert not isinstance(commands, LeftOut)
        # What a command is told to write below the folder of the results is what is removed before.
        told = {Path(word) for command in commands for word in command.arguments}
        told |= {command.output for command in commands if command.output}
        results = {path for path in told if path.is_relative_to(asked.output) and path != asked.made_bundle}
        assert results <= set(each.writes), each.name
        if each.name not in ("look", "environment", "tensorrt", "kernels"):
            assert results, each.name
    assert asked.made_bundle in next(each for each in steps if each.name == "graphs").writes


def test_what_was_of_another_bundle_is_done_again(tmp_path: Path) -> None:
    asked = settings(tmp_path, data=tmp_path, bundle=tmp_path / "given")
    made, given = asked.made_bundle / "bundle.json", tmp_path / "given" / "bundle.json"
    for each in make_steps(asked):
        if each.name.startswith(("plans", "parity", "bench")):
            assert made in each.depends_on, each.name
        if each.name == "graphs":
            assert given in each.depends_on
        if each.name.startswith("plans"):
            assert asked.made_bundle / "engines" in each.leaves


def test_figures_of_an_earlier_run_are_neither_shown_nor_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails has written nothing, and one that is left out or not reached has nothing to show."""
    asked = settings(tmp_path)
    main.begin(asked)
    written = {name: asked.output / f"parity-{name}.json" for name in ("fails", "left-out", "unreached")}
    texts = {
        name: f"""echo '{{"{name}": {{"passed": true}}}}' > '{path}'""" for name, path in written.items()
    }

    def step(name: str, command: str, **options: Any) -> Step:
        commands = [Command(("sh", "-c", command))]
        return Step(name, "", lambda: commands if command else LeftOut("not now"), **options)

    def run(*steps: Step) -> str:
        monkeypatch.setattr(main, "make_steps", lambda _: list(steps))
        main.run(asked)
        return (asked.output / "summary.md").read_text()

    all_well = run(*(step(name, text, writes=(written[name],)) for name, text in texts.items()))
    assert all(f"| {name} | passed |" in all_well for name in written)
    told = run(
        step("fails", "exit 1", writes=(written["fails"],)),
        step("left-out", "", writes=(written["left-out"],)),
        step("ends", "exit 1", is_needed=True),
        step("unreached", texts["unreached"], writes=(written["unreached"],)),
    )
    assert "passed" not in told
    assert not written["fails"].exists() and written["left-out"].exists()
    with tarfile.open(f"{asked.output}.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"steps.json", "summary.md", "fails.log", "ends.log"} <= names
    assert names.isdisjoint({path.name for path in written.values()} | {"left-out.log", "unreached.log"})
