"""The machine: usable CPUs, the processor, and the versions of installed packages."""

import math
import os
import platform
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """Number of CPUs that this process may use, at least 1; in a container often fewer than the machine has.

    The limits are the affinity of the process and the quotas of its cgroup and all parents, rounded up
    (`cpu.max` of cgroup v2, https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((affinity, *map(math.ceil, _quotas()))))


def _quotas() -> Iterator[float]:
    """The CPU quotas of this process's cgroup and its parents, of those that have one."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.startswith("0::"):  # cgroup v2; version 1 has numbers
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


def processor_name() -> str:
    """Model of the processor: "AMD EPYC 9575F 64-Core Processor"."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return match[1] if match else platform.processor() or "unknown processor"


def processor_features() -> frozenset[str]:
    """Instruction-set flags of the processor, as Linux names them ("avx2"); empty if unknown."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return frozenset(match[1].split() if match else ())


def _cpu_info() -> str:
    try:
        return _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


# Packages that are distributed under several names with the same modules: usual name -> all names.
_ALIASES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed packages among `names`, by the name they are installed under."""
    found = {}
    for name in names:
        for alias in _ALIASES.get(name, (name,)):
            try:
                found[alias] = version(alias)
            except PackageNotFoundError:
                continue
    return found
