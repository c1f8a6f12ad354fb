"""Build TensorRT engines of a bundle's graphs for several GPUs, or find them in the engine cache.

result = build_engines("bundles/voc", BuildOptions(targets=("sm86", "sm89"), precision="fp16"))
result.raise_failures()
"""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.export.report import INT8_FOR, format_table, open_bundle
from multisa.export.tensorrt.builder import build_engine, check_targets
from multisa.export.tensorrt.profiles import parse_profiles
from multisa.runtime.backends.base import CONTRACTS, PRECISIONS, GraphContract, graph_file, how_to_convert
from multisa.runtime.backends.engine_cache import FLAGS, EngineCache, EngineKey, Profile, this_platform
from multisa.runtime.backends.gpus import Gpu, probe_gpus
from multisa.runtime.backends.tensorrt_runtime import TENSORRT_RTX, Library, import_library
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.progress import Progress, log, pluralize


@dataclass(frozen=True)
class BuildOptions:
    """Which engines to build."""

    targets: tuple[str, ...]  # compute capabilities of the GPUs: "sm89", or several as "sm80,sm89"
    precision: str = "fp32"  # of the graphs: fp32, fp16 or int8
    graphs: tuple[str, ...] = ()  # cam, affinity, segmenter; empty: all that have the precision
    profiles: tuple[str, ...] = ()  # texts like "1x64x64:1x384x512:8x512x512"; empty: the default ones
    library: str = TENSORRT_RTX  # builds without a GPU; "tensorrt" builds for the GPU of this machine
    engine_cache: Path | None = None  # folder of the engines; BUNDLE/engines by default


@dataclass(frozen=True)
class EngineRow:
    """One engine that was built or found in the cache."""

    graph: str
    target: str
    precision: str
    profiles: tuple[Profile, ...]
    bytes: int
    build_seconds: float  # of the build, which may have been an earlier one
    is_cached: bool
    path: Path


@dataclass(frozen=True)
class BuildResult:
    """The engines that were built or found, and why others could not be built."""

    bundle: str  # its name
    library: Library
    engine_cache: Path
    rows: tuple[EngineRow, ...]
    failures: tuple[str, ...]
    seconds: float

    def raise_failures(self) -> None:
        """Raise BackendError with the reasons of all engines that could not be built."""
        if self.failures:
            number = pluralize(len(self.failures), "engine")
            raise BackendError("\n".join((f"{number} could not be built", *self.failures)))

    def describe(self) -> str:
        """A table of the engines for people, then the folder they are in."""
        header = ("graph", "target", "precision", "profiles", "MB", "seconds", "")
        rows = []
        for row in self.rows:
            numbers = (str(len(row.profiles)), f"{row.bytes / 1e6:.1f}", f"{row.build_seconds:.1f}")
            origin = "from the cache" if row.is_cached else "built"
            rows.append((row.graph, row.target, row.precision, *numbers, origin))
        table = format_table(header, rows, right=header[3:6])
        end = f"time: {self.seconds:.1f} s\nengine cache: {self.engine_cache}"
        return f"{self.bundle}, {self.library}\n{table}\n\n{end}"

    def as_json(self) -> dict[str, Any]:
        """JSON values; sizes in bytes, times in seconds."""
        return {
            "bundle": self.bundle,
            "library": self.library.name,
            "library_version": self.library.version,
            "engine_cache": str(self.engine_cache),
            "engines": [
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
                for row in self.rows
            ],
            "failures": list(self.failures),
            "seconds": round(self.seconds, 2),
        }


def build_engines(bundle: Bundle | str | Path, options: BuildOptions) -> BuildResult:
    """Build an engine of every graph for every target, or find it in the cache.

    Writes KEY/model.plan and KEY/plan.json below `options.engine_cache` for each engine, where KEY depends on
    everything that decides what the engine computes and where it runs. An engine that cannot be built does
    not stop the others: its reason is in `failures`, see `BuildResult.raise_failures`.

    Raises UsageError for unknown targets, graphs, precisions, profiles or libraries, BackendUnavailable if
    the library, the driver or the GPU is missing, BundleError for a damaged bundle.
    """
    start = time.perf_counter()
    bundle = open_bundle(bundle)
    targets = parse_targets(options.targets)
    graphs = _graphs(bundle, options)
    if options.precision == "int8" and bundle.manifest.provenance.get(INT8_FOR) == "cpu":
        raise UsageError(
            f"{bundle.path}: its int8 graphs are for CPUs, with zero points, which TensorRT does not accept; "
            f"make a bundle for TensorRT: multisa convert {bundle.path} --precision int8 "
            "--int8-for tensorrt --images DIR -o NEW_BUNDLE"
        )
    profiles = parse_profiles(options.profiles, bundle.manifest.parameters.long_side)
    library = import_library(options.library)
    check_targets(library, targets)
    gpu = None if library.is_rtx else _gpu_of(targets, library)
    folder = options.engine_cache or bundle.path / ENGINES_FOLDER
    cache = EngineCache(folder)
    rows: list[EngineRow] = []
    failures: list[str] = []
    with Progress(len(graphs) * len(targets), "build", "engine") as bar:
        for contract in graphs:
            data = bundle.read_file(graph_file(contract, options.precision))
            for target in targets:
                key = EngineKey(
                    graph=contract.name,
                    precision=options.precision,
                    onnx_sha256=sha256_of_bytes(data),
                    library=library.name,
                    library_version=library.version,
                    target=target,
                    gpu=gpu.name if gpu else "",
                    profiles=profiles,
                    flags=FLAGS,
                    platform=this_platform(),
                )
                try:
                    rows.append(_build(cache, key, data, contract, library))
                except BackendError as error:
                    failures.append(str(error))
                bar.advance(note=f"{contract.name} {target}")
    seconds = time.perf_counter() - start
    return BuildResult(bundle.manifest.name, library, folder, tuple(rows), tuple(failures), seconds)


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Targets like "sm89", several in one text separated by commas; each once. Raises UsageError."""
    targets = [part.strip().lower() for text in texts for part in text.split(",")]
    for target in targets:
        if not re.fullmatch(r"sm\d{2,3}", target):
            raise UsageError(f"target: got {target!r}, expected a compute capability like sm89, or sm80,sm89")
    if not targets:
        raise UsageError("target: got none, expected a compute capability like sm89")
    return tuple(dict.fromkeys(targets))


def _graphs(bundle: Bundle, options: BuildOptions) -> tuple[GraphContract, ...]:
    """The graphs to build; graphs without the precision are left out unless they were named."""
    if options.precision not in PRECISIONS:
        raise UsageError(f"precision: got {options.precision!r}, expected one of {', '.join(PRECISIONS)}")
    names = [contract.name for contract in CONTRACTS]
    for name in options.graphs:
        if name not in names:
            raise UsageError(f"graph: got {name!r}, expected one of {', '.join(names)}")
    wanted = [contract for contract in CONTRACTS if not options.graphs or contract.name in options.graphs]
    available = [c for c in wanted if graph_file(c, options.precision) in bundle.manifest.files]
    lacking = [c for c in wanted if c not in available]
    missing = ", ".join(graph_file(c, options.precision) for c in lacking)
    if lacking and (options.graphs or not available):
        remedy = how_to_convert(bundle.path, lacking[0], options.precision)
        raise UsageError(f"{bundle.path}: no {missing} in the bundle: {remedy}")
    if lacking:
        log.info(f"{bundle.path}: left out, the bundle has no {missing}")
    return tuple(available)


def _gpu_of(targets: tuple[str, ...], library: Library) -> Gpu:
    """The GPU of this machine, which TensorRT tunes on and builds for."""
    probe = probe_gpus()
    if probe.problem:
        raise BackendUnavailable(
            f"{probe.problem}; build with {library.name} on the machine that runs the engine, or with "
            f"--library {TENSORRT_RTX}, which needs no GPU"
        )
    gpu = probe.gpus[0]  # the one that engines run on
    if targets != (gpu.target,):
        raise BackendUnavailable(
            f"{library} builds for the GPU of this machine, {gpu.name} ({gpu.target}); got the target "
            f"{', '.join(targets)}: build on a machine that has it, or with --library {TENSORRT_RTX}"
        )
    return gpu


def _build(
    cache: EngineCache, key: EngineKey, data: bytes, contract: GraphContract, library: Library
) -> EngineRow:
    built = False

    def build() -> bytes:
        nonlocal built
        built = True
        # In its own thread: the library swallows the KeyboardInterrupt of Ctrl-C during a build.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(build_engine, library, data, contract, key.profiles, (key.target,)).result()

    stored = cache.get_or_build(key, build)
    identity = (key.graph, key.target, key.precision, key.profiles)
    return EngineRow(*identity, stored.bytes, stored.build_seconds, is_cached=not built, path=stored.path)
