"""What the README says is true: results, commands, files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from multisa.runtime.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_the_results_files() -> None:
    script = ROOT / "benchmarks" / "readme_results.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown(command: str) -> None:
    assert f"multisa {command}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    program = f"from multisa.runtime.cli import main; main([{command!r}, '--help'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"multisa {command}" in result.stdout.split("Example:")[1]


def test_links_and_commands_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    # At the start of a line or in backticks it is a command, elsewhere a word.
    for verb in set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE), verb


def test_at_most_six_verbs() -> None:
    (line,) = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(line.split()) <= 6
