"""The processors that this process may use, and the versions of installed packages."""

import math
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the number of processors that this process may use, at least 1.

    In a container that is often fewer than the machine has: the minimum of the process's affinity and the
    quotas (rounded up) of its cgroup v2 and all parent groups (`cpu.max`,
    https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((affinity, *map(math.ceil, _quotas()))))


def _quotas() -> Iterator[float]:
    """Yield the quota, in processors, of each cgroup of this process that has one."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.startswith("0::"):  # version 2; the hierarchies of version 1 have other numbers
            own = _CGROUPS / line.removeprefix("0::").lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(_CGROUPS):
                    yield from _quota(folder / "cpu.max")


def _quota(path: Path) -> Iterator[float]:
    try:
        limit, period = path.read_text(encoding="ascii").split()
        if limit != "max":
            yield int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # the root group has none
        return


# Packages whose modules are also distributed under other names: the usual name, and all names.
_ALIASES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed package, by the name under which it is installed."""
    versions = {}
    for name in names:
        for alias in _ALIASES.get(name, (name,)):
            try:
                versions[alias] = version(alias)
            except PackageNotFoundError:
                continue
    return versions
