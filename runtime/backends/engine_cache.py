"""The cache of TensorRT plans: a plan is found by what it was made of, and by nothing less.

    stored = EngineCache(bundle.path / ENGINES_FOLDER).get_or_build(key, build)

    engines/<first 16 digits of the key's digest>/model.plan     what the library wrote, unchanged
                                                  plan.json      its key, size and SHA-256; written last
    engines/<digits>.lock                                        held by the one process that builds
    engines/quarantine/<digits>/                                 the last plan that could not be used, and why

The key holds the SHA-256 of the graph's bytes, weights included, so two models of equal structure never share
a plan. Plans themselves are no key: two builds of the same graph differ. A plan is code for a GPU: whoever
may write to the folder decides what runs, so it must be no less protected than the bundle.
"""

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

from multisa.runtime.errors import BundleError
from multisa.runtime.files import (
    flush_folder,
    lock_file,
    sha256_of_bytes,
    sha256_of_file,
    write_bytes_atomically,
    write_json_atomically,
)
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.runtime.progress import log
from multisa.runtime.records import record_from_dict, record_to_dict

Shape = tuple[int, int, int]  # batch, height, width of `image`
Bytes: TypeAlias = bytes  # StoredEngine has a field of that name

PLAN_NAME = "model.plan"
RECORD_NAME = "plan.json"
QUARANTINE = "quarantine"
SCHEMA_VERSION = 1
FLAGS = ("TF32=0",)  # the builder's settings: fp32 is fp32, where TF32 keeps ten bits of mantissa
_RECORD_LIMIT = 1 << 16  # bytes; a record is about one kilobyte
_DIGITS = 16
_FACTS = attrgetter("onnx_sha256", "library", "library_version", "target", "flags", "platform")
_FOLDER = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Profile:
    """One shape bucket: the sizes of `image` that are legal, and the one that is tuned for."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        """Refuse sizes that are out of order with ValueError."""
        names = ("batch", "height", "width")
        rows = zip(names, self.minimum, self.optimum, self.maximum, strict=True)
        for name, low, best, high in rows:
            if not 1 <= low <= best <= high:
                raise ValueError(
                    f"profile {self}: {name} {low}, {best}, {high}: expected 1 <= min <= opt <= max"
                )

    def __str__(self) -> str:
        """As the command line takes it: NxHxW of min:opt:max."""
        return ":".join("x".join(map(str, shape)) for shape in (self.minimum, self.optimum, self.maximum))

    def covers(self, shape: Shape) -> bool:
        """Whether `shape` (batch, height, width) is one of the bucket's."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= size <= high for low, size, high in bounds)


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what a plan computes and where it runs."""

    graph: str  # name of the contract: "cam"
    precision: str
    onnx_sha256: str  # of the graph's bytes, which hold its weights
    library: str  # "tensorrt" or "tensorrt-rtx"
    library_version: str  # "1.7.1.116"
    target: str  # "sm89"
    gpu: str  # name of the device it was tuned on; "" when built ahead of time
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]  # settings of the builder: "TF32=0"
    platform: str  # as `this_platform` gives it

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, as canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return sha256_of_bytes(text.encode())


def this_platform() -> str:
    """Operating system and processor, which plans are made for: "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


@dataclass(frozen=True)
class StoredEngine:
    """A plan in the cache."""

    path: Path
    key: EngineKey
    bytes: int
    sha256: str
    build_seconds: float

    def read(self) -> Bytes:
        """Bytes of the plan, verified; raises BundleError for damage, OSError where they cannot be read."""
        data = self.path.read_bytes()
        if len(data) != self.bytes or sha256_of_bytes(data) != self.sha256:
            raise BundleError(
                f"{self.path}: damaged: got {len(data)} bytes, sha256 {sha256_of_bytes(data)}, expected "
                f"{self.bytes} bytes, {self.sha256}; build it again with `multisa build`"
            )
        return data


@dataclass(frozen=True)
class _Record:
    """plan.json; every key must be there and no other may be."""

    schema_version: int
    key: EngineKey
    bytes: int
    sha256: str
    build_seconds: float


class _DamagedError(Exception):
    """A stored plan that is not whole; the message is the reason."""


class EngineCache:
    """Plans in one folder, made when first asked for; safe to share between processes."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not be there: a bundle's ENGINES_FOLDER, or one of the user's."""
        self.folder = folder

    def get(self, key: EngineKey) -> StoredEngine | None:
        """The plan of `key`, verified; a damaged one is put aside. Raises OSError where it cannot be read."""
        try:
            return self._load(key)
        except _DamagedError:
            # A folder that may only be read cannot be healed, and has no plan all the same.
            with suppress(OSError), self._lock(key):
                return self._load_or_repair(key)
            return None

    def get_or_build(self, key: EngineKey, build: Callable[[], bytes]) -> StoredEngine:
        """The plan of `key`, made by `build` where there is none; one builder at a time, others wait for it.

        What `build` raises is raised here, and nothing is stored. Raises BackendUnavailable where files cannot
        be locked, OSError where the folder cannot be written or the plan in it cannot be read.
        """
        stored = self.get(key)
        if stored is not None:
            return stored
        with self._lock(key):
            stored = self._load_or_repair(key)
            return stored if stored is not None else self._store(key, build)

    def find(
        self, *, onnx_sha256: str, library: str, library_version: str, target: str
    ) -> list[StoredEngine]:
        """Plans of one graph for one library and target, in the order of their digests.

        They are of this platform and of FLAGS: others are another machine's, or another accuracy's. Their
        bytes are verified by `StoredEngine.read`; records that cannot be read are left out.
        """
        wanted = (onnx_sha256, library, library_version, target, FLAGS, this_platform())
        return [plan for plan in self.list_engines()[0] if _FACTS(plan.key) == wanted]

    def list_engines(self) -> tuple[list[StoredEngine], dict[Path, str]]:
        """All plans in the order of their digests, and the folders of those that cannot be used, with why.

        Their bytes are verified by `StoredEngine.read`, their records here. Raises OSError where the cache's
        folder cannot be read.
        """
        engine_cache: list[StoredEngine] = []
        damaged: dict[Path, str] = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if not _FOLDER.fullmatch(folder.name):
                continue
            try:
                plan = _read_record(folder)
            except (_DamagedError, OSError) as problem:
                damaged[folder] = str(problem)
                continue
            if plan is not None:
                engine_cache.append(plan)
        return engine_cache, damaged

    def quarantine(self, plan: StoredEngine, reason: str) -> None:
        """Put a plan aside that the library refuses, so that the next build makes it anew.

        Nothing is done when another process has put a newer one in its place.
        """
        with self._lock(plan.key):
            current = self._load_or_repair(plan.key)
            if current is not None and current.sha256 == plan.sha256:
                self._quarantine(plan.key, reason)

    def _place(self, key: EngineKey) -> Path:
        return self.folder / key.digest[:_DIGITS]

    def _load(self, key: EngineKey) -> StoredEngine | None:
        plan = _read_record(self._place(key))
        if plan is None:
            return None
        if plan.key != key:  # the whole key, not its first digits
            raise _DamagedError(f"{RECORD_NAME} is of another key")
        digest = sha256_of_file(plan.path)
        if digest != plan.sha256:
            raise _DamagedError(f"{PLAN_NAME}: got sha256 {digest}, expected {plan.sha256}")
        return plan

    def _load_or_repair(self, key: EngineKey) -> StoredEngine | None:
        """With the lock held: the plan, or None once what is damaged is out of the way."""
        try:
            return self._load(key)
        except _DamagedError as damage:
            self._quarantine(key, str(damage))
            return None

    def _store(self, key: EngineKey, build: Callable[[], bytes]) -> StoredEngine:
        start = time.perf_counter()
        data = build()
        seconds = round(time.perf_counter() - start, 3)
        place = self._place(key)
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob(".*.tmp"):  # of a builder that was killed; this one holds the lock
            left.unlink()
        write_bytes_atomically(place / PLAN_NAME, data)
        flush_folder(place)
        record = _Record(SCHEMA_VERSION, key, len(data), sha256_of_bytes(data), seconds)
        # Last: what is killed before this line has stored nothing.
        write_json_atomically(place / RECORD_NAME, record_to_dict(record))
        flush_folder(place)
        flush_folder(self.folder)
        return StoredEngine(place / PLAN_NAME, key, record.bytes, record.sha256, seconds)

    def _quarantine(self, key: EngineKey, reason: str) -> None:
        place = self._place(key)
        aside = self.folder / QUARANTINE / place.name
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():  # one a key: plans are large
            shutil.rmtree(aside)
        place.replace(aside)
        write_bytes_atomically(aside / "reason.txt", f"{reason}\n".encode())
        log.info(f"{place}: a plan that cannot be used was put aside: {reason}")

    @contextmanager
    def _lock(self, key: EngineKey) -> Iterator[None]:
        """Hold the lock of a key; its file is beside the plan's folder, which may be moved away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that builds {key.graph} for {key.target}"
        with lock_file(self._place(key).with_suffix(".lock"), lambda: log.info(waiting)):
            yield


def _read_record(folder: Path) -> StoredEngine | None:
    """What plan.json says, checked without trust in it; None where there is none. Raises OSError."""
    path = folder / RECORD_NAME
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _RECORD_LIMIT else ""
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _DamagedError(f"{RECORD_NAME}: {error}") from error
    try:
        if not text:
            raise ValueError(f"got {size} bytes, expected 1..{_RECORD_LIMIT}")
        value: Any = json.loads(text)
        record = record_from_dict(_Record, value, complete=True)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{RECORD_NAME}: {error}") from error
    if record.schema_version != SCHEMA_VERSION:
        raise _DamagedError(
            f"{RECORD_NAME}: schema_version {record.schema_version}, expected {SCHEMA_VERSION}"
        )
    if record.key.digest[:_DIGITS] != folder.name:
        raise _DamagedError(
            f"{RECORD_NAME}: its key belongs to another folder, {record.key.digest[:_DIGITS]}"
        )
    plan = folder / PLAN_NAME
    if plan.is_symlink() or not plan.is_file() or plan.stat().st_size != record.bytes:
        raise _DamagedError(f"{PLAN_NAME}: expected a file of {record.bytes} bytes")
    return StoredEngine(plan, record.key, record.bytes, record.sha256, record.build_seconds)


def uncovered_shape(profiles: Sequence[Profile], long_side: int) -> Shape | None:
    """The first shape of one image with sides of MINIMUM_SIDE..long_side that no profile covers.

    None where there is none. What is not covered is made of rectangles, and the smallest corner of each lies
    where a profile begins or has just ended, or at the smallest side, so those corners are all to look at.
    """
    sides = []
    for axis in (1, 2):
        edges = {edge for p in profiles for edge in (p.minimum[axis], p.maximum[axis] + 1)}
        sides.append(sorted({MINIMUM_SIDE} | {e for e in edges if MINIMUM_SIDE <= e <= long_side}))
    shapes = ((1, height, width) for height, width in product(*sides))
    return next((shape for shape in shapes if not any(p.covers(shape) for p in profiles)), None)
