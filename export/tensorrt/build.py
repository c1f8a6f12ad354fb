"""Build TensorRT engines of a bundle's graphs for several GPUs, or find them in the engine cache."""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multisa.export.report import INT8_FOR, format_table, open_bundle
from multisa.export.tensorrt.builder import build_engine, check_targets
from multisa.runtime.backends.base import CONTRACTS, PRECISIONS, GraphContract, graph_file, how_to_convert
from multisa.runtime.backends.engine_cache import FLAGS, EngineCache, EngineKey, Profile, Shape, this_platform
from multisa.runtime.backends.gpus import Gpu, probe_gpus
from multisa.runtime.backends.tensorrt_runtime import TENSORRT_RTX, Library, import_library
from multisa.runtime.bundle import ENGINES_FOLDER, Bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.runtime.progress import Progress, log, pluralize

_GRID = 32  # sides of the default profiles are multiples of the largest stride of the backbones


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
        engines = []
        for row in self.rows:
            values = {name.removeprefix("is_"): value for name, value in asdict(row).items()}
            engines.append({**values, "profiles": [str(p) for p in row.profiles], "path": str(row.path)})
        return {
            "bundle": self.bundle,
            "library": self.library.name,
            "library_version": self.library.version,
            "engine_cache": str(self.engine_cache),
            "engines": engines,
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


def default_profiles(long_side: int) -> tuple[Profile, ...]:
    """Three profiles for images whose long side is at most `long_side` pixels.

    Images are resized to exactly `long_side`, most of them in 4:3 or 3:4: two profiles are tuned for these, and the
    first also covers everything wider than 3:4. The third is tuned for images below half of it. All have
    batch 1, as the runtime runs them: an engine reserves the memory of its largest batch.
    """
    short = _on_grid(long_side * 3 // 4, long_side)
    small = _on_grid(long_side * 5 // 8, long_side)
    smallest: Shape = (1, MINIMUM_SIDE, MINIMUM_SIDE)
    profiles = [
        Profile(smallest, (1, short, long_side), (1, long_side, long_side)),
        Profile(smallest, (1, long_side, short), (1, long_side, short)),
        Profile(smallest, (1, small, small), (1, small, small)),
    ]
    return tuple(dict.fromkeys(profiles))  # they coincide for the smallest long_side


def parse_profiles(texts: Sequence[str], long_side: int) -> tuple[Profile, ...]:
    """Profiles from texts like "1x64x64:1x384x512:8x512x512" (NxHxW as min:opt:max), or the default ones.

    Raises UsageError, naming the profile, for malformed texts and sizes outside 64..`long_side`.
    """
    if not texts:
        return default_profiles(long_side)
    profiles = tuple(_parse(text) for text in texts)
    for text, profile in zip(texts, profiles, strict=True):
        if profiles.count(profile) > 1:
            raise UsageError(f"profile {text}: given twice, expected each once")
        low, high = min(profile.minimum[1:]), max(profile.maximum[1:])
        where = f"input image: profile {profile}"
        if low < MINIMUM_SIDE:
            raise UsageError(
                f"{where}: got a side of {low}, expected at least {MINIMUM_SIDE}: the graphs take no smaller image"
            )
        if high > long_side:
            raise UsageError(
                f"{where}: got a side of {high}, expected at most {long_side}: the bundle resizes every "
                "image to at most that long side"
            )
    return profiles


def _parse(text: str) -> Profile:
    parts = text.lower().split(":")
    if len(parts) != 3 or not all(re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", part) for part in parts):
        raise UsageError(f"profile: got {text!r}, expected NxHxW:NxHxW:NxHxW, as in 1x64x64:1x384x512:8x512x512")
    shapes = [tuple(map(int, part.split("x"))) for part in parts]
    try:
        return Profile(*[(batch, height, width) for batch, height, width in shapes])
    except ValueError as error:
        raise UsageError(f"input image: {error}") from error


def _on_grid(side: int, long_side: int) -> int:
    rounded = -(-side // _GRID) * _GRID
    return min(max(rounded, MINIMUM_SIDE), long_side)


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


def _build(cache: EngineCache, key: EngineKey, data: bytes, contract: GraphContract, library: Library) -> EngineRow:
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
