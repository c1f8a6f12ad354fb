"""The settings that affect the bytes of a run, in OUT/.multisa/config.json: different runs never mix."""

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
from multisa.runtime.files import flush_folder, sha256_of_bytes, write_json_atomically
from multisa.runtime.imaging.png import png_encoder
from multisa.runtime.jobs.output import CONFIG
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import Job
from multisa.runtime.system import installed_versions

Fingerprint = Mapping[str, Any]  # settings by name, as JSON values

_FORMAT = 1  # of everything below OUT/.multisa
_KEY_DIGITS = 32  # hexadecimal
_PACKAGES = ("multisa", "numpy", "onnxruntime", "pillow", "simplejpeg")
# Of backends other than ONNX Runtime.
_BACKEND_PACKAGES = {
    "tensorrt": ("tensorrt", "pycuda"),
    "tensorrt-rtx": ("tensorrt-rtx", "pycuda"),
    "openvino": ("openvino",),
}
_WRITER_PACKAGES = {"parquet": ("pyarrow",)}


def run_fingerprint(
    job: Job, process: Fingerprint, *, bundle_sha256: str, labels_sha256: str | None, shard_size: int
) -> Fingerprint:
    """The settings of a run; process: those of its worker processes.

    Paths are not among them, so that folders may be moved before a run is resumed.
    """
    return {
        "format": _FORMAT,
        "command": job.command,
        "bundle": bundle_sha256,
        "labels": labels_sha256,
        "writers": list(job.writers),
        "image prefix": job.image_prefix,
        "shard size": shard_size,
        "max pixels": job.max_pixels,
        # Which images share a batch may change the last bit of a sum.
        "batch": job.pipeline.batch,
        "look-ahead": job.pipeline.look_ahead if job.pipeline.batch > 1 else None,
        **_versions(package for writer in job.writers for package in _WRITER_PACKAGES.get(writer, ())),
        **process,
    }


def process_fingerprint(backends: Iterable[SelectedBackend]) -> Fingerprint:
    """Backends, instruction set and versions of a worker process."""
    values: dict[str, Any] = {
        "machine": platform.machine(),
        # Each instruction set adds up sums in another order.
        "instructions of the kernels": native.instruction_set(),
        "masks are encoded by": png_encoder(),
        "version of zlib": zlib.ZLIB_RUNTIME_VERSION,
    }
    names = []
    for choice in backends:
        backend = choice.backend
        names.append(backend.name)
        values[f"backend of {choice.graph}"] = f"{backend.name}, {choice.precision}"
        if isinstance(backend, DetailedBackend):
            values[f"engine of {choice.graph}"] = backend.detail.get("plan_sha256")
    if any(name in BACKENDS and BACKENDS[name].needs_gpu for name in names):
        values["architecture of the GPU"] = ", ".join(gpu.target for gpu in probe_gpus().gpus[:1])
    packages = [*_PACKAGES, *(package for name in names for package in _BACKEND_PACKAGES.get(name, ()))]
    return values | _versions(packages)


def _versions(packages: Iterable[str]) -> dict[str, Any]:
    found = installed_versions(dict.fromkeys(packages))
    return {f"version of {package}": version for package, version in found.items()}


# Settings that are digests, which nobody can compare by eye.
_FILES = {"labels": "another label file, or one that has changed", "bundle": "another bundle, or one that has changed"}


def differences(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """In words: "shard size: got 100, the existing run has 256"."""
    found = []
    for key in sorted({*ours, *theirs}):
        got, existing = ours.get(key), theirs.get(key)
        if got != existing and key in _FILES and None not in (got, existing):
            found.append(f"{key}: got {_FILES[key]}")
        elif got != existing:
            if key in _FILES:
                got, existing = ("none" if value is None else "some" for value in (got, existing))
            found.append(f"{key}: got {got}, the existing run has {existing}")
    return found


def read_fingerprint(output: Path) -> Fingerprint | None:
    """The settings of the run in OUT; None if there is no run. Raises UsageError."""
    path = output / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}): start over with --overwrite") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: got no object, expected settings: start over with --overwrite")
    return values


def run_key(fingerprint: Fingerprint, snapshot: Snapshot) -> str:
    """A key of the run with these settings and images: the same in every session, and for retries."""
    settings = json.dumps(fingerprint, sort_keys=True)
    return sha256_of_bytes(f"{snapshot.digest} {settings}".encode())[:_KEY_DIGITS]


def write_fingerprint(output: Path, fingerprint: Fingerprint) -> None:
    """Store the settings; from now on OUT holds a run."""
    path = output.absolute() / CONFIG
    write_json_atomically(path, fingerprint)
    for folder in path.parents[:3]:  # a run whose settings a power failure has undone would be lost
        flush_folder(folder)
