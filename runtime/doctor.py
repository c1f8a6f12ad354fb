"""`multisa doctor`: report what this machine can run, by trying it.

Every check is independent: a broken or missing package is one line of the report, not its end.
"""

import json
import os
import platform
import re
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multisa.runtime.errors import BackendUnavailable, BundleError, MultisaError
from multisa.runtime.system import installed_versions, processor_features, processor_name, usable_cpus

if TYPE_CHECKING:
    from multisa.runtime.bundle import Bundle

PACKAGES = (
    "multisa",
    "numpy",
    "pillow",
    "onnxruntime",
    "openvino",
    "pycuda",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "onnx",
)
# The processor features that kernels and backends have code paths for.
FEATURES = re.compile(r"avx2|fma|avx512f|avx512_?vnni|avx_vnni|avx512_?bf16|amx_(?:int8|bf16)|asimd|asimddp|sve")
_BUNDLE = "bundle"
_COMPILE_CUDA = (
    "run python -m multisa.kernels.cuda.build in a clone installed with pip install -e, "
    "or MULTISA_CUDA=1 pip install . in another (both need nvcc)"
)
_BROKEN = (ImportError, OSError, AttributeError, RuntimeError, ValueError)  # raised by broken packages


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    text: str  # what was found; or what is missing, and what to do


@dataclass(frozen=True)
class Diagnosis:
    """The whole report."""

    versions: dict[str, str]
    machine: list[Finding]  # processor, kernels, GPU, bundle
    backends: list[Finding]
    auto: list[str]  # what "auto" selects, one line per backend

    @property
    def exit_code(self) -> int:
        """Exit code of the command: BundleError's, BackendUnavailable's if no backend is usable, else 0."""
        if any(item.name == _BUNDLE and not item.ok for item in self.machine):
            return BundleError.exit_code
        return 0 if any(backend.ok for backend in self.backends) else BackendUnavailable.exit_code

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def examine(bundle_path: Path | None = None, engine_cache: Path | None = None) -> Diagnosis:
    """Check this machine and try every backend on the bundle (the packaged one by default).

    engine_cache: a folder of TensorRT engines besides the bundle's own. Changes nothing, and does not raise
    for what is broken or missing.
    """
    bundle_finding, bundle = _bundle(bundle_path, engine_cache)
    machine = [_processor(), _onnxruntime(), _kernels(), _cuda_kernels(), _gpu(), bundle_finding]
    backends = _backends(bundle, engine_cache) if bundle else []
    return Diagnosis(
        {"python": platform.python_version(), **installed_versions(PACKAGES)},
        machine,
        backends,
        _auto(bundle, engine_cache) if bundle else ["nothing: there is no bundle to run"],
    )


def describe_diagnosis(diagnosis: Diagnosis, width: int = 100) -> str:
    """The report as text, in lines of at most `width` columns unless a word is longer."""
    versions = ", ".join(f"{name} {number}" for name, number in diagnosis.versions.items())
    lines = [
        *_entry("versions", versions, width),
        *(line for item in diagnosis.machine for line in _entry(item.name, item.text, width)),
        "",
        "backends",
        *(line for item in diagnosis.backends for line in _entry(f"  {item.name}", _state(item), width)),
        *(line for choice in diagnosis.auto for line in _entry("  auto", choice, width)),
    ]
    return "\n".join(lines)


def _state(backend: Finding) -> str:
    return f"{'usable' if backend.ok else 'not usable'}: {backend.text}"


def _entry(name: str, text: str, width: int) -> list[str]:
    indent = " " * 20
    return textwrap.wrap(
        text,
        width,
        initial_indent=name.ljust(len(indent)),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _processor() -> Finding:
    features = " ".join(sorted(filter(FEATURES.fullmatch, processor_features()))) or "features unknown"
    cores = f"{usable_cpus()} cores to use of {os.cpu_count()}"
    text = f"{processor_name()}, {platform.machine()}, {cores}, {sys.platform}; {features}"
    return Finding("processor", True, text)


def _onnxruntime() -> Finding:
    # Both packages install the same module: the one installed last has overwritten the other's files.
    packages = installed_versions(["onnxruntime"])
    if len(packages) > 1:
        both = " and ".join(f"{name} {number}" for name, number in packages.items())
        return Finding("onnxruntime", False, f"{both} overwrite each other: uninstall both, then install one of them")
    try:
        from multisa.runtime.backends.onnxruntime import import_onnxruntime

        onnxruntime = import_onnxruntime()
        providers = onnxruntime.get_available_providers()
    except (BackendUnavailable, *_BROKEN) as error:
        remedy = "" if isinstance(error, BackendUnavailable) else ": pip install onnxruntime"
        return Finding("onnxruntime", False, f"{_line(error)}{remedy}")
    return Finding("onnxruntime", True, f"{onnxruntime.__version__}, providers {', '.join(providers)}")


def _kernels() -> Finding:
    try:
        from multisa.kernels.cpu import native
    except _BROKEN as error:
        return Finding("CPU kernels", False, _line(error))
    compiled = ", ".join(native.instruction_sets())
    return Finding("CPU kernels", True, f"run with {native.instruction_set()}, compiled for {compiled}")


def _cuda_kernels() -> Finding:
    try:
        from multisa.kernels.cuda.build import FATBIN, SOURCES, FatbinRecord, source_digest
        from multisa.runtime.records import record_from_dict

        if not FATBIN.is_file():
            return Finding("CUDA kernels", False, f"not compiled: {_COMPILE_CUDA}")
        value = json.loads(FATBIN.with_suffix(".json").read_text(encoding="utf-8"))
        record = record_from_dict(FatbinRecord, value, complete=True)
        if SOURCES.is_dir() and record.sources != source_digest():
            return Finding("CUDA kernels", False, f"compiled from other sources than these: {_COMPILE_CUDA}")
    except _BROKEN as error:
        return Finding("CUDA kernels", False, f"{_line(error)}: {_COMPILE_CUDA}")
    codes = ", ".join(f"sm{arch}" for arch in record.architectures)
    later = ", ".join(f"sm{arch}" for arch in record.ptx)
    return Finding("CUDA kernels", True, f"for {codes}, and later GPUs from PTX of {later}; nvcc {record.nvcc}")


def _gpu() -> Finding:
    try:
        from multisa.runtime.backends.gpus import probe_gpus
    except _BROKEN as error:
        return Finding("GPU", False, _line(error))
    probe = probe_gpus()
    if probe.problem:
        return Finding("GPU", False, probe.problem)
    names = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in probe.gpus)
    return Finding("GPU", True, f"{names}; the driver supports CUDA up to {probe.driver}")


def _bundle(path: Path | None, folder: Path | None = None) -> tuple[Finding, "Bundle | None"]:
    try:
        from multisa.runtime.backends.base import CONTRACTS
        from multisa.runtime.backends.registry import bundle_precisions
        from multisa.runtime.bundle import ENGINES_FOLDER, default_bundle_path, load_bundle

        bundle = load_bundle(path or default_bundle_path())
        engines = _describe_engines(bundle.path / ENGINES_FOLDER)
        if folder is not None:
            engines += f"; in {str(folder)!a}: {_describe_engines(folder)}"
    except (BundleError, *_BROKEN) as error:
        return Finding(_BUNDLE, False, _line(error)), None
    graphs = ", ".join(f"{c.name} ({' '.join(bundle_precisions(bundle, c))})" for c in CONTRACTS)
    name = bundle.manifest.name
    text = f"{name}, all files verified; {graphs}; TensorRT engines: {engines}; {bundle.path}"
    return Finding(_BUNDLE, True, text), bundle


def _describe_engines(folder: Path) -> str:
    """The TensorRT engines that a cache lists; their bytes are only verified when one is opened."""
    from multisa.runtime.backends.engine_cache import EngineCache

    try:
        engines, damaged = EngineCache(folder).list_engines()
    except OSError as error:
        return f"unreadable ({error.strerror})"
    built: dict[str, list[str]] = {}
    for key in (stored.key for stored in engines):
        built.setdefault(f"{key.library} {key.target}", []).append(f"{key.graph} {key.precision}")
    listed = [f"{target} ({', '.join(sorted(graphs))})" for target, graphs in sorted(built.items())]
    if damaged:
        listed.append(f"unreadable ({', '.join(path.name for path in damaged)})")
    # The records are untrusted: escape what could control the terminal.
    return ", ".join(ascii(text)[1:-1] for text in listed) or "none"


def _backends(bundle: "Bundle", engine_cache: Path | None) -> list[Finding]:
    """Try each backend on all graphs."""
    from multisa.runtime.backends.registry import BACKENDS, try_backend

    findings = []
    for trial in (try_backend(bundle, name, engine_cache) for name in BACKENDS):
        ran = f"ran {', '.join(trial.ran)}"
        if trial.problem:
            text = f"{trial.problem}; but {ran}" if trial.ran else trial.problem
        else:
            text = ran
        findings.append(Finding(trial.backend, not trial.problem, text))
    return findings


def _auto(bundle: "Bundle", engine_cache: Path | None) -> list[str]:
    from multisa.runtime.backends.base import CONTRACTS
    from multisa.runtime.backends.registry import BackendRequest, describe_selection, select_backend

    selected = []
    request = BackendRequest(engine_cache=engine_cache, may_repair=False)
    try:
        for contract in CONTRACTS:
            choice = select_backend(bundle, contract, request)
            choice.backend.close()
            selected.append(choice)
    except (MultisaError, *_BROKEN) as error:
        return [*describe_selection(selected), _line(error)]
    return describe_selection(selected)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
