"""What the README says is true: results, commands, files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.cli import COMMANDS
from multisa.training.checks import check_networks
from multisa.training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_the_results_files() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_is_said_of_the_packaged_bundle() -> None:
    (sample,) = re.findall(r"chosen with the masks of (\d+) train\nphotographs", README)
    assert re.search(rf"on a sample of {sample}\s+of those", README)
    manifest = load_bundle(default_bundle_path()).manifest
    assert f"in the order of their ids from 1: {', '.join(manifest.foreground)}." in README
    assert f"the bundle's ids ({manifest.foreground[0]} = 1, ...)" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown(command: str) -> None:
    assert f"multisa {command}" in README


def test_settings_that_are_shown_can_be_used() -> None:
    """Each passage that shows --set is tried as one command line, up to the point where weights are read."""
    passages = re.findall(r"`(--set[^`]+)`|(--set .+)$", README, re.MULTILINE)
    assert len(passages) >= 2
    for passage in passages:
        settings = re.findall(r"--set\s+(\S+=\S+)", "".join(passage))
        assert settings
        check_networks(load_config("lite0", settings), 7)


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
