"""What this machine can run, found by trying: `multisa doctor`.

Every probe stands alone: a package that is broken or absent is a line of the report, not its end.
"""

import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multisa.runtime.errors import BackendUnavailable, BundleError, MultisaError
from multisa.runtime.system import installed_versions, usable_cpus

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
# Of a processor's features, those that the kernels and the engines have code for.
FEATURES = re.compile(
    r"avx2|fma|avx512f|avx512_?vnni|avx_vnni|avx512_?bf16|amx_(?:int8|bf16)|asimd|asimddp|sve"
)
_BUNDLE = "bundle"
_COMPILE_CUDA = "run python -m multisa.kernels.cuda.build (needs nvcc)"
_BROKEN = (ImportError, OSError, AttributeError, RuntimeError, ValueError)  # what broken packages raise


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str  # what is there; or what is not, and what to do


@dataclass(frozen=True)
class Diagnosis:
    """The whole report."""

    versions: dict[str, str]
    machine: list[Finding]  # processor, kernels, GPU, bundle
    backends: list[Finding]
    auto: list[str]  # what "auto" would choose, a line each

    @property
    def exit_code(self) -> int:
        """Of the command: that of BundleError, of BackendUnavailable where no engine is usable, else 0."""
        if any(item.name == _BUNDLE and not item.ok for item in self.machine):
            return BundleError.exit_code
        return 0 if any(backend.ok for backend in self.backends) else BackendUnavailable.exit_code

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def examine(bundle_path: Path | None = None, engine_cache: Path | None = None) -> Diagnosis:
    """Look at this machine and try every engine on the bundle (the packaged one by default).

    `plans` is a folder of TensorRT plans besides the bundle's own. Nothing is changed, and nothing is raised
    about what is broken or absent.
    """
    bundle_finding, bundle = _bundle(bundle_path, engine_cache)
    machine = [_processor(), _onnxruntime(), _kernels(), _cuda_kernels(), _gpu(), bundle_finding]
    backends = list(_backends(bundle, engine_cache)) if bundle else []
    return Diagnosis(
        {"python": platform.python_version(), **installed_versions(PACKAGES)},
        machine,
        backends,
        _auto(bundle, engine_cache) if bundle else ["nothing: there is no bundle to run"],
    )


def describe_diagnosis(diagnosis: Diagnosis, width: int = 100) -> str:
    """The report for people, lines of at most `width` columns where words allow it."""
    versions = ", ".join(f"{name} {number}" for name, number in diagnosis.versions.items())
    lines = [
        *_entry("versions", versions, width),
        *(line for item in diagnosis.machine for line in _entry(item.name, item.text, width)),
        "",
        "engines",
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
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    features = [flag for flag in (flags[1].split() if flags else ()) if FEATURES.fullmatch(flag)]
    name = model[1] if model else platform.processor() or "unknown processor"
    where = f"{name}, {platform.machine()}, {usable_cpus()} cores to use of {os.cpu_count()}, {sys.platform}"
    return Finding("processor", True, f"{where}; {' '.join(sorted(set(features))) or 'features unknown'}")


def _onnxruntime() -> Finding:
    # Two packages with one module: whichever was installed last has overwritten the other's files.
    packages = installed_versions(["onnxruntime"])
    if len(packages) > 1:
        both = " and ".join(f"{name} {number}" for name, number in packages.items())
        return Finding(
            "onnxruntime", False, f"{both} overwrite each other: uninstall both, then install one of them"
        )
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except _BROKEN as error:
        return Finding("onnxruntime", False, f"{_line(error)}: pip install onnxruntime")
    return Finding("onnxruntime", True, f"{onnxruntime.__version__}, providers {', '.join(providers)}")


def _kernels() -> Finding:
    try:
        from multisa.kernels.cpu import native
    except _BROKEN as error:
        return Finding("CPU kernels", False, _line(error))
    there = ", ".join(native.instruction_sets())
    return Finding("CPU kernels", True, f"run with {native.instruction_set()}, there are {there}")


def _cuda_kernels() -> Finding:
    try:
        from multisa.kernels.cuda.build import FATBIN, SOURCES, FatbinRecord, source_digest
        from multisa.runtime.records import record_from_dict

        if not FATBIN.is_file():
            return Finding("CUDA kernels", False, f"not compiled: {_COMPILE_CUDA}")
        value = json.loads(FATBIN.with_suffix(".json").read_text(encoding="utf-8"))
        record = record_from_dict(FatbinRecord, value, complete=True)
        if SOURCES.is_dir() and record.sources != source_digest():
            return Finding("CUDA kernels", False, f"made of other sources than these: {_COMPILE_CUDA}")
    except _BROKEN as error:
        return Finding("CUDA kernels", False, f"{_line(error)}: {_COMPILE_CUDA}")
    codes = ", ".join(f"sm{arch}" for arch in record.architectures)
    later = ", ".join(f"sm{arch}" for arch in record.ptx)
    return Finding(
        "CUDA kernels", True, f"for {codes}, and later ones from PTX of {later}; nvcc {record.nvcc}"
    )


def _gpu() -> Finding:
    try:
        from multisa.runtime.backends.gpus import probe_gpus
    except _BROKEN as error:
        return Finding("GPU", False, _line(error))
    probe = probe_gpus()
    if probe.problem:
        return Finding("GPU", False, probe.problem)
    names = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in probe.gpus)
    return Finding("GPU", True, f"{names}; the driver runs CUDA up to {probe.driver}")


def _bundle(path: Path | None, folder: Path | None = None) -> tuple[Finding, "Bundle | None"]:
    try:
        from multisa.runtime.backends.base import CONTRACTS
        from multisa.runtime.backends.registry import bundle_precisions
        from multisa.runtime.bundle import ENGINES_FOLDER, default_bundle_path, load_bundle

        bundle = load_bundle(path or default_bundle_path())
        engine_cache = _plans(bundle.path / ENGINES_FOLDER)
        if folder is not None:
            engine_cache += f"; in {str(folder)!a}: {_plans(folder)}"
    except (BundleError, *_BROKEN) as error:
        return Finding(_BUNDLE, False, _line(error)), None
    graphs = ", ".join(f"{c.name} ({' '.join(bundle_precisions(bundle, c))})" for c in CONTRACTS)
    has = f"{bundle.manifest.name}, all files verified; {graphs}; plans: {engine_cache}; {bundle.path}"
    return Finding(_BUNDLE, True, has), bundle


def _plans(folder: Path) -> str:
    """The TensorRT plans that a cache tells of; whether their bytes are whole is known when one is opened."""
    from multisa.runtime.backends.engine_cache import EngineCache

    try:
        engine_cache, damaged = EngineCache(folder).list_engines()
    except OSError as error:
        return f"unreadable ({error.strerror})"
    built: dict[str, list[str]] = {}
    for key in (plan.key for plan in engine_cache):
        built.setdefault(f"{key.library} {key.target}", []).append(f"{key.graph} {key.precision}")
    listed = [f"{where} ({', '.join(sorted(whats))})" for where, whats in sorted(built.items())]
    if damaged:
        listed.append(f"unreadable ({', '.join(path.name for path in damaged)})")
    # What is in the files is not known to be ours: nothing of it steers the terminal.
    return ", ".join(ascii(text)[1:-1] for text in listed) or "none"


def _backends(bundle: "Bundle", engine_cache: Path | None) -> Iterator[Finding]:
    """Open each engine on all graphs, and run them on an image of the bundle's largest size."""
    import numpy as np

    from multisa.runtime.backends.base import CONTRACTS
    from multisa.runtime.backends.registry import BACKENDS, BackendRequest, select_backend

    side = bundle.manifest.parameters.long_side
    image = np.zeros((1, side, side, 3), np.uint8)
    for name in BACKENDS:
        ran = []
        try:
            for contract in CONTRACTS:
                choice = select_backend(
                    bundle, contract, BackendRequest(name, engine_cache=engine_cache, may_repair=False)
                )
                with choice.backend as backend:
                    backend.run(image)
                ran.append(f"{contract.name} {choice.precision}")
        except (MultisaError, *_BROKEN) as error:
            done = f"; but ran {', '.join(ran)}" if ran else ""
            yield Finding(name, False, f"{_line(error)}{done}")
        else:
            yield Finding(name, True, f"ran {', '.join(ran)}")


def _auto(bundle: "Bundle", engine_cache: Path | None) -> list[str]:
    from multisa.runtime.backends.base import CONTRACTS
    from multisa.runtime.backends.registry import BackendRequest, describe_selection, select_backend

    choices = []
    request = BackendRequest(engine_cache=engine_cache, may_repair=False)
    try:
        for contract in CONTRACTS:
            choice = select_backend(bundle, contract, request)
            choice.backend.close()
            choices.append(choice)
    except (MultisaError, *_BROKEN) as error:
        return [*describe_selection(choices), _line(error)]
    return describe_selection(choices)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
