"""What a run was measured on: machine, versions, bundle, photographs."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import peaks, processor
from multisa.benchmarks.suite.setting import Setting
from multisa.kernels.native import native
from multisa.runtime.cpus import usable_cpus
from multisa.runtime.engines.gpus import probe_gpus
from multisa.runtime.files import sha256_of_file
from multisa.runtime.manifest import MANIFEST_NAME
from multisa.runtime.versions import installed_versions

PACKAGES = (
    *("multisa", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"),
    *("torch", "timm", "scipy", "pydensecrf2", "pillow", "simplejpeg"),
)


def describe_run(setting: Setting, quick: bool, load_at_start: float) -> dict[str, Any]:
    """Everything that figures depend on, as JSON values."""
    dataset = setting.dataset
    return {
        "processor": processor(),
        "cores": usable_cpus(),
        "memory_gib": _memory_gib(),
        "instruction_set": native.instruction_set(),
        "gpus": [gpu.name for gpu in probe_gpus().gpus],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": installed_versions(PACKAGES),
        "load_at_start": round(load_at_start, 2),
        "quick": quick,
        "bundle": {
            "name": setting.bundle.manifest.name,
            "sha256": sha256_of_file(setting.bundle.path / MANIFEST_NAME),
        },
        "data": {
            "name": dataset.root.name,
            "photographs": {"train": len(dataset.train), "val": len(dataset.val)},
            "digest": dataset.masks_digest(dataset.train + dataset.val),
        },
        "peaks": peaks(),
    }


def _commit() -> str | None:
    """Of the checkout that is run, with a plus where files differ; None for a package that was installed."""
    folder = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    try:
        asked = [git, "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1)
