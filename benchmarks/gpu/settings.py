"""What was asked for, what the driver has told, the state of the sources: what the steps are made from."""

import json
import subprocess
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DRIVER_FILE = "driver.json"
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
        return self.data or ROOT / "runtime" / "demo_images"

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
