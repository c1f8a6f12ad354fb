"""What this process may use: processors, and the versions of installed packages."""

import math
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Processors that this process may use, at least 1: in a container often fewer than the machine has.

    Counts what the affinity of the process and the quotas of its cgroups allow.

    A quota of a part of a processor counts as a whole one. Quotas are those of cgroup v2 (`cpu.max`,
    https://docs.kernel.org/admin-guide/cgroup-v2.html), which every group above has, too.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((affinity, *map(math.ceil, _quotas()))))


def _quotas() -> Iterator[float]:
    """Processors that each of the groups of this process may use, where it has a limit."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.startswith("0::"):  # version 2; the others have numbers
            own = _CGROUPS / line.removeprefix("0::").lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(_CGROUPS):
                    yield from _quota(folder / "cpu.max")


def _quota(path: Path) -> Iterator[float]:
    try:
        limit, period = path.read_text(encoding="ascii").split()
        if limit != "max":
            yield int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # the topmost group has none
        return


# Packages that come under several names, which hold the same modules: the name for people, all others.
_ALIASES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Version of each package that is installed, by the name it is installed under."""
    found = {}
    for name in names:
        for alias in _ALIASES.get(name, (name,)):
            try:
                found[alias] = version(alias)
            except PackageNotFoundError:
                continue
    return found
