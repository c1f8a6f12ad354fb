"""Versions of what is installed, without importing any of it."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

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
