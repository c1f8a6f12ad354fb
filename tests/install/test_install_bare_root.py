"""The script that runs README's commands in a bare Debian root: what it refuses and when it is skipped."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("bare_root.sh")


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = subprocess.run(["bash", SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == f"{tmp_path}: exists, expected a folder to make, which is removed at the end: choose another\n"
    )
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("user", "reason"),
    [("1000", "only root may use chroot"), ("0", "debootstrap is not installed: apt-get install debootstrap")],
)
def test_a_machine_without_what_it_needs_skips_it(tmp_path: Path, user: str, reason: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath"):
        (programs / name).symlink_to(shutil.which(name) or "/absent")
    (programs / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (programs / "id").chmod(0o755)
    command = ["bash", SCRIPT, tmp_path / "root"]
    result = subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"SKIPPED: {reason}\n", "")
    assert not (tmp_path / "root").exists()
