"""What decides the bytes of a run, frozen in OUT/.multisa/config.json: runs of other settings never mix."""

import json
import platform
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multisa.kernels.cpu import native
from multisa.runtime.backends.base import DetailedBackend
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.backends.registry import BACKENDS, SelectedBackend
from multisa.runtime.errors import UsageError
from multisa.runtime.files import flush_folder, write_json_atomically
from multisa.runtime.imaging.png import png_encoder
from multisa.runtime.jobs.output import CONFIG
from multisa.runtime.jobs.spec import Job
from multisa.runtime.system import installed_versions

Config = Mapping[str, Any]  # settings by their names, as JSON has them

_FORMAT = 1  # of everything below OUT/.multisa
_PACKAGES = ("multisa", "numpy", "onnxruntime", "pillow", "simplejpeg")
# Of engines that are more than ONNX Runtime.
_ENGINE_PACKAGES = {
    "tensorrt": ("tensorrt", "pycuda"),
    "tensorrt-rtx": ("tensorrt-rtx", "pycuda"),
    "openvino": ("openvino",),
}
_SINK_PACKAGES = {"parquet": ("pyarrow",)}


def run_config(
    job: Job, identity: Config, *, bundle_sha256: str, labels_sha256: str | None, shard_size: int
) -> Config:
    """The settings of a run. Paths are not among them: folders may be moved between two sittings."""
    return {
        "format": _FORMAT,
        "command": job.command,
        "bundle": bundle_sha256,
        "labels": labels_sha256,
        "writers": list(job.writers),
        "image prefix": job.image_prefix,
        "shard size": shard_size,
        "max pixels": job.max_pixels,
        # Which images an engine gets together may change the last bit of a sum.
        "batch": job.sizes.batch,
        "look-ahead": job.sizes.look_ahead if job.sizes.batch > 1 else None,
        **_versions(package for writer in job.writers for package in _SINK_PACKAGES.get(writer, ())),
        **identity,
    }


def identity(backends: Iterable[SelectedBackend]) -> Config:
    """Engines, instructions and versions of a process that does shards."""
    values: dict[str, Any] = {
        "machine": platform.machine(),
        # Sums are added up in another order by each.
        "instructions of the kernels": native.instruction_set(),
        "masks are encoded by": png_encoder(),
        "version of zlib": zlib.ZLIB_RUNTIME_VERSION,
    }
    names = []
    for choice in backends:
        backend = choice.backend
        names.append(backend.name)
        values[f"engine of {choice.graph}"] = f"{backend.name}, {choice.precision}"
        if isinstance(backend, DetailedBackend):
            values[f"plan of {choice.graph}"] = backend.detail.get("plan_sha256")
    if any(name in BACKENDS and BACKENDS[name].needs_gpu for name in names):
        values["architecture of the GPU"] = ", ".join(gpu.target for gpu in probe_gpus().gpus[:1])
    packages = [*_PACKAGES, *(package for name in names for package in _ENGINE_PACKAGES.get(name, ()))]
    return values | _versions(packages)


def _versions(packages: Iterable[str]) -> dict[str, Any]:
    found = installed_versions(dict.fromkeys(packages))
    return {f"version of {package}": version for package, version in found.items()}


# Settings that are digests, which nobody can compare by eye.
_FILES = {
    "labels": "another label file, or one that has changed",
    "bundle": "another bundle, or one that has changed",
}


def differences(ours: Config, theirs: Config) -> list[str]:
    """In words: "shard size: got 100, the run there has 256"."""
    return [
        _difference(key, ours.get(key), theirs.get(key))
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]


def _difference(key: str, ours: object, theirs: object) -> str:
    if key not in _FILES:
        return f"{key}: got {ours}, the run there has {theirs}"
    if ours is None or theirs is None:
        got, there = ("none", "some") if ours is None else ("some", "none")
        return f"{key}: got {got}, the run there has {there}"
    return f"{key}: got {_FILES[key]}"


def read_config(out: Path) -> Config | None:
    """The settings of the run that OUT holds; None when it holds none. Raises UsageError."""
    path = out / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}): begin anew with --overwrite") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: got no object, expected settings: begin anew with --overwrite")
    return values


def write_config(out: Path, config: Config) -> None:
    """Keep the settings; a run is there from now on."""
    path = out.absolute() / CONFIG
    write_json_atomically(path, config)
    for folder in path.parents[:3]:  # what a loss of power must not undo: a run without settings is lost
        flush_folder(folder)
