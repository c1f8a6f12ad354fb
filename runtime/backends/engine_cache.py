"""The cache of built TensorRT engines. An engine is found only by everything that determines it.

    stored = EngineCache(bundle.path / ENGINES_FOLDER).get_or_build(key, build)

    engines/<16 digits of the key's digest>/model.plan   the serialised engine, as the library wrote it
                                            plan.json    its key, size and SHA-256; written last
    engines/<digits>.lock                                held by the one process that builds
    engines/quarantine/<digits>/                         the last engine that could not be used, and why

The key contains the SHA-256 of the graph's bytes, weights included, so two models of equal structure never
share an engine. An engine's own digest cannot be the key: two builds of the same graph differ. An engine is
code for a GPU: whoever may write to the folder decides what runs, so protect it like the bundle.
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
Bytes: TypeAlias = bytes  # StoredEngine has a field named `bytes`

ENGINE_NAME = "model.plan"
RECORD_NAME = "plan.json"
QUARANTINE = "quarantine"
SCHEMA_VERSION = 1
FLAGS = ("TF32=0",)  # builder settings: full fp32; TF32 would keep only ten bits of mantissa
_RECORD_LIMIT = 1 << 16  # bytes; a record is about one kilobyte
_DIGITS = 16  # of a digest, in folder names
_SEARCHED = attrgetter("onnx_sha256", "library", "library_version", "target", "flags", "platform")
_FOLDER = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the allowed range of image shapes, and the shape to tune for."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        """Raise ValueError unless 1 <= min <= opt <= max on every axis."""
        names = ("batch", "height", "width")
        rows = zip(names, self.minimum, self.optimum, self.maximum, strict=True)
        for name, low, best, high in rows:
            if not 1 <= low <= best <= high:
                raise ValueError(f"profile {self}: {name} {low}, {best}, {high}: expected 1 <= min <= opt <= max")

    def __str__(self) -> str:
        """In the command line's notation: min:opt:max, each NxHxW."""
        return ":".join("x".join(map(str, shape)) for shape in (self.minimum, self.optimum, self.maximum))

    def covers(self, shape: Shape) -> bool:
        """Whether `shape` (batch, height, width) is within the range."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= size <= high for low, size, high in bounds)


@dataclass(frozen=True)
class EngineKey:
    """Everything that determines what an engine computes and where it runs."""

    graph: str  # name of the contract: "cam"
    precision: str
    onnx_sha256: str  # of the graph's bytes, which hold its weights
    library: str  # "tensorrt" or "tensorrt-rtx"
    library_version: str  # "1.7.1.116"
    target: str  # "sm89"
    gpu: str  # name of the GPU it was tuned on; "" if built without one
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]  # builder settings: "TF32=0"
    platform: str  # from `this_platform`

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, as canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return sha256_of_bytes(text.encode())


def this_platform() -> str:
    """Operating system and processor that an engine is built for: "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the cache."""

    path: Path
    key: EngineKey
    bytes: int
    sha256: str
    build_seconds: float

    def read(self) -> Bytes:
        """Return the engine's bytes, verified. Raises BundleError for damage, OSError if unreadable."""
        data = self.path.read_bytes()
        if len(data) != self.bytes or sha256_of_bytes(data) != self.sha256:
            raise BundleError(
                f"{self.path}: damaged: got {len(data)} bytes, sha256 {sha256_of_bytes(data)}, expected "
                f"{self.bytes} bytes, {self.sha256}; build it again with `multisa build`"
            )
        return data


@dataclass(frozen=True)
class _Record:
    """plan.json; every key is required and no other is allowed."""

    schema_version: int
    key: EngineKey
    bytes: int
    sha256: str
    build_seconds: float


class _DamagedError(Exception):
    """A stored engine is incomplete or altered; the message says how."""


class EngineCache:
    """The engines in one folder, built when first needed; processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist: a bundle's ENGINES_FOLDER, or one of the user's."""
        self.folder = folder

    def get(self, key: EngineKey) -> StoredEngine | None:
        """Return the engine of `key`, verified; quarantine a damaged one. Raises OSError if unreadable."""
        try:
            return self._load(key)
        except _DamagedError:
            # A read-only folder cannot be repaired; the engine counts as missing all the same.
            with suppress(OSError), self._lock(key):
                return self._load_or_repair(key)
            return None

    def get_or_build(self, key: EngineKey, build: Callable[[], bytes]) -> StoredEngine:
        """Return the engine of `key`, from `build` if it is missing. One process builds, the others wait.

        If `build` raises, nothing is stored and the exception propagates. Raises BackendUnavailable if the
        file system has no locks, OSError if the folder is not writable or the engine unreadable.
        """
        stored = self.get(key)
        if stored is not None:
            return stored
        with self._lock(key):
            stored = self._load_or_repair(key)
            return stored if stored is not None else self._store(key, build)

    def find(self, *, onnx_sha256: str, library: str, library_version: str, target: str) -> list[StoredEngine]:
        """Engines of one graph for one library and target, ordered by digest.

        Only engines of this platform and FLAGS: others belong to another machine, or another accuracy.
        Unreadable records are left out; `StoredEngine.read` verifies the bytes.
        """
        wanted = (onnx_sha256, library, library_version, target, FLAGS, this_platform())
        return [stored for stored in self.list_engines()[0] if _SEARCHED(stored.key) == wanted]

    def list_engines(self) -> tuple[list[StoredEngine], dict[Path, str]]:
        """All engines ordered by digest, and the folders of unusable ones with the reason.

        Verifies the records; `StoredEngine.read` verifies the bytes. Raises OSError if the cache's folder is
        unreadable.
        """
        engines: list[StoredEngine] = []
        damaged: dict[Path, str] = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if not _FOLDER.fullmatch(folder.name):
                continue
            try:
                stored = _read_record(folder)
            except (_DamagedError, OSError) as problem:
                damaged[folder] = str(problem)
                continue
            if stored is not None:
                engines.append(stored)
        return engines, damaged

    def quarantine(self, stored: StoredEngine, reason: str) -> None:
        """Move an engine that the library refuses to quarantine, so that the next build replaces it.

        Does nothing if another process has replaced it already.
        """
        with self._lock(stored.key):
            current = self._load_or_repair(stored.key)
            if current is not None and current.sha256 == stored.sha256:
                self._quarantine(stored.key, reason)

    def _folder_of(self, key: EngineKey) -> Path:
        return self.folder / key.digest[:_DIGITS]

    def _load(self, key: EngineKey) -> StoredEngine | None:
        stored = _read_record(self._folder_of(key))
        if stored is None:
            return None
        if stored.key != key:  # the whole key, not only its first digits
            raise _DamagedError(f"{RECORD_NAME} has another key")
        digest = sha256_of_file(stored.path)
        if digest != stored.sha256:
            raise _DamagedError(f"{ENGINE_NAME}: got sha256 {digest}, expected {stored.sha256}")
        return stored

    def _load_or_repair(self, key: EngineKey) -> StoredEngine | None:
        """Return the engine, or None after quarantining a damaged one. Call with the lock held."""
        try:
            return self._load(key)
        except _DamagedError as damage:
            self._quarantine(key, str(damage))
            return None

    def _store(self, key: EngineKey, build: Callable[[], bytes]) -> StoredEngine:
        start = time.perf_counter()
        data = build()
        seconds = round(time.perf_counter() - start, 3)
        folder = self._folder_of(key)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a killed builder: the lock is ours
            leftover.unlink()
        write_bytes_atomically(folder / ENGINE_NAME, data)
        flush_folder(folder)
        record = _Record(SCHEMA_VERSION, key, len(data), sha256_of_bytes(data), seconds)
        # Last: a builder that is killed before this line has stored nothing.
        write_json_atomically(folder / RECORD_NAME, record_to_dict(record))
        flush_folder(folder)
        flush_folder(self.folder)
        return StoredEngine(folder / ENGINE_NAME, key, record.bytes, record.sha256, seconds)

    def _quarantine(self, key: EngineKey, reason: str) -> None:
        folder = self._folder_of(key)
        quarantined = self.folder / QUARANTINE / folder.name
        quarantined.parent.mkdir(exist_ok=True)
        if quarantined.exists():  # one per key: engines are large
            shutil.rmtree(quarantined)
        folder.replace(quarantined)
        write_bytes_atomically(quarantined / "reason.txt", f"{reason}\n".encode())
        log.info(f"{folder}: moved an unusable engine to quarantine: {reason}")

    @contextmanager
    def _lock(self, key: EngineKey) -> Iterator[None]:
        """Hold the lock of a key. Its file lies beside the engine's folder, which may be moved away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that builds {key.graph} for {key.target}"
        with lock_file(self._folder_of(key).with_suffix(".lock"), lambda: log.info(waiting)):
            yield


def _read_record(folder: Path) -> StoredEngine | None:
    """Read and validate plan.json, which is untrusted; None if it does not exist. Raises OSError."""
    record_path = folder / RECORD_NAME
    try:
        size = record_path.stat().st_size
        text = record_path.read_text(encoding="utf-8") if size <= _RECORD_LIMIT else ""
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
        raise _DamagedError(f"{RECORD_NAME}: schema_version {record.schema_version}, expected {SCHEMA_VERSION}")
    if record.key.digest[:_DIGITS] != folder.name:
        raise _DamagedError(f"{RECORD_NAME}: its key belongs in another folder, {record.key.digest[:_DIGITS]}")
    path = folder / ENGINE_NAME
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.bytes:
        raise _DamagedError(f"{ENGINE_NAME}: expected a file of {record.bytes} bytes")
    return StoredEngine(path, record.key, record.bytes, record.sha256, record.build_seconds)


def uncovered_shape(profiles: Sequence[Profile], long_side: int) -> Shape | None:
    """The first shape of one image with sides in MINIMUM_SIDE..long_side that no profile covers, or None.

    The uncovered area is a union of rectangles. The smallest corner of each lies where a profile begins or
    has just ended, or at MINIMUM_SIDE, so it is enough to test those corners.
    """
    sides = []
    for axis in (1, 2):
        edges = {edge for p in profiles for edge in (p.minimum[axis], p.maximum[axis] + 1)}
        sides.append(sorted({MINIMUM_SIDE} | {e for e in edges if MINIMUM_SIDE <= e <= long_side}))
    shapes = ((1, height, width) for height, width in product(*sides))
    return next((shape for shape in shapes if not any(p.covers(shape) for p in profiles)), None)
