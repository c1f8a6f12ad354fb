"""`multisa build`: plans of a bundle's graphs for several targets, from the cache where they are in it."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.export.report import INT8_FOR
from multisa.export.tensorrt.builder import build_plan, check_targets
from multisa.export.tensorrt.profiles import parse_profiles
from multisa.runtime.backends.base import (
    CONTRACTS,
    PRECISIONS,
    GraphContract,
    graph_file,
    how_to_convert,
)
from multisa.runtime.backends.engine_cache import FLAGS, EngineCache, EngineKey, Profile, this_platform
from multisa.runtime.backends.gpus import Gpu, probe_gpus
from multisa.runtime.backends.tensorrt_runtime import TENSORRT_RTX, Library, import_library
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.progress import Progress, log, pluralize


@dataclass(frozen=True)
class BuildOptions:
    """What `multisa build` was asked for."""

    targets: tuple[str, ...]
    precision: str = "fp32"
    graphs: tuple[str, ...] = ()  # names of contracts; all that have the precision when empty
    profiles: tuple[str, ...] = ()  # as `parse_profiles` takes them; the default ones when empty
    library: str = TENSORRT_RTX
    cache: Path | None = None  # the bundle's own folder by default


@dataclass(frozen=True)
class PlanRow:
    """One plan that was built or found."""

    graph: str
    target: str
    precision: str
    profiles: tuple[Profile, ...]
    bytes: int
    build_seconds: float  # of the build, also where it was found in the cache
    is_cached: bool
    path: Path


@dataclass(frozen=True)
class BuildReport:
    """Everything one run of `multisa build` has done."""

    bundle: str
    library: Library
    rows: tuple[PlanRow, ...]
    failures: tuple[str, ...]

    def raise_failures(self) -> None:
        """Raise BackendError with the reasons of all plans that could not be built."""
        if self.failures:
            number = pluralize(len(self.failures), "plan")
            raise BackendError("\n".join((f"{number} could not be built", *self.failures)))


def build_plans(bundle: Bundle, options: BuildOptions) -> BuildReport:
    """Build every graph for every target, or find it in the cache; graphs are verified as they are read.

    A plan that cannot be built does not keep the others from it: its reason is in the report's failures.
    Raises UsageError for arguments that cannot be, BackendUnavailable without library, driver or GPU.
    """
    targets = parse_targets(options.targets)
    graphs = _graphs(bundle, options)
    if options.precision == "int8" and bundle.manifest.provenance.get(INT8_FOR) == "cpu":
        raise UsageError(
            f"{bundle.path}: its int8 graphs have the zero points that a CPU is fast with and TensorRT does "
            f"not take; make others: multisa convert {bundle.path} --precision int8 --int8-for tensorrt "
            "--photographs DIR -o NEW_BUNDLE"
        )
    profiles = parse_profiles(options.profiles, bundle.manifest.parameters.long_side)
    library = import_library(options.library)
    check_targets(library, targets)
    gpu = None if library.is_rtx else _gpu_of(targets, library)
    cache = EngineCache(options.cache or bundle.path / ENGINES_FOLDER)
    rows: list[PlanRow] = []
    failures: list[str] = []
    with Progress(len(graphs) * len(targets), "build", "plan") as bar:
        for contract in graphs:
            data = bundle.read_file(graph_file(contract, options.precision))
            for target in targets:
                key = _key(contract, options.precision, data, library, target, gpu, profiles)
                try:
                    rows.append(_build(cache, key, data, contract, library))
                except BackendError as error:
                    failures.append(str(error))
                bar.advance(note=f"{contract.name} {target}")
    return BuildReport(bundle.manifest.name, library, tuple(rows), tuple(failures))


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Targets as "sm89", several in one text between commas, each once. Raises UsageError."""
    targets = [part.strip().lower() for text in texts for part in text.split(",")]
    for target in targets:
        if not re.fullmatch(r"sm\d{2,3}", target):
            raise UsageError(f"target: got {target!r}, expected a compute capability like sm89, or sm80,sm89")
    if not targets:
        raise UsageError("target: got none, expected a compute capability like sm89")
    return tuple(dict.fromkeys(targets))


def describe_report(report: BuildReport) -> str:
    """A table for people: a line for each plan."""
    header = ("graph", "target", "precision", "profiles", "MB", "seconds", "")
    lines = [
        (
            row.graph,
            row.target,
            row.precision,
            str(len(row.profiles)),
            f"{row.bytes / 1e6:.1f}",
            f"{row.build_seconds:.1f}",
            "from the cache" if row.is_cached else "built",
        )
        for row in report.rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *lines)]
    return "\n".join((f"{report.bundle}, {report.library}", *table))


def report_as_json(report: BuildReport) -> dict[str, Any]:
    """The report as JSON holds it; sizes in bytes, times in seconds."""
    return {
        "bundle": report.bundle,
        "library": report.library.name,
        "library_version": report.library.version,
        "plans": [
            {
                "graph": row.graph,
                "target": row.target,
                "precision": row.precision,
                "profiles": [str(profile) for profile in row.profiles],
                "bytes": row.bytes,
                "build_seconds": row.build_seconds,
                "cached": row.is_cached,
                "path": str(row.path),
            }
            for row in report.rows
        ],
        "failures": list(report.failures),
    }


def _graphs(bundle: Bundle, options: BuildOptions) -> tuple[GraphContract, ...]:
    """The graphs to build; those not asked for by name are left out where they lack the precision."""
    if options.precision not in PRECISIONS:
        raise UsageError(f"precision: got {options.precision!r}, expected one of {', '.join(PRECISIONS)}")
    names = [contract.name for contract in CONTRACTS]
    for name in options.graphs:
        if name not in names:
            raise UsageError(f"graph: got {name!r}, expected one of {', '.join(names)}")
    asked = [contract for contract in CONTRACTS if not options.graphs or contract.name in options.graphs]
    there = [c for c in asked if graph_file(c, options.precision) in bundle.manifest.files]
    lacking = [c for c in asked if c not in there]
    missing = ", ".join(graph_file(c, options.precision) for c in lacking)
    if lacking and (options.graphs or not there):
        remedy = how_to_convert(bundle.path, lacking[0], options.precision)
        raise UsageError(f"{bundle.path}: no {missing} in it: {remedy}")
    if lacking:
        log.info(f"{bundle.path}: left out, the bundle has no {missing}")
    return tuple(there)


def _gpu_of(targets: tuple[str, ...], library: Library) -> Gpu:
    """The GPU of this machine, which TensorRT tunes on and builds for."""
    probe = probe_gpus()
    if probe.problem:
        raise BackendUnavailable(
            f"{probe.problem}; build with {library.name} on the machine that runs the plan, or with "
            f"--library {TENSORRT_RTX}, which needs no GPU"
        )
    gpu = probe.gpus[0]  # the one that plans run on, too
    if targets != (gpu.target,):
        raise BackendUnavailable(
            f"{library} builds for the GPU that is here, {gpu.name} ({gpu.target}); got the target "
            f"{', '.join(targets)}: build on a machine that has it, or with --library {TENSORRT_RTX}"
        )
    return gpu


def _key(
    contract: GraphContract,
    precision: str,
    data: bytes,
    library: Library,
    target: str,
    gpu: Gpu | None,
    profiles: tuple[Profile, ...],
) -> EngineKey:
    return EngineKey(
        graph=contract.name,
        precision=precision,
        onnx_sha256=sha256_of_bytes(data),
        library=library.name,
        library_version=library.version,
        target=target,
        gpu=gpu.name if gpu else "",
        profiles=profiles,
        flags=FLAGS,
        platform=this_platform(),
    )


def _build(
    cache: EngineCache, key: EngineKey, data: bytes, contract: GraphContract, library: Library
) -> PlanRow:
    built = False

    def build() -> bytes:
        nonlocal built
        built = True
        # In a thread of its own: the library swallows what Ctrl-C raises in the midst of a build.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(build_plan, library, data, contract, key.profiles, (key.target,)).result()

    stored = cache.get_or_build(key, build)
    return PlanRow(
        graph=key.graph,
        target=key.target,
        precision=key.precision,
        profiles=key.profiles,
        bytes=stored.bytes,
        build_seconds=stored.build_seconds,
        is_cached=not built,
        path=stored.path,
    )
