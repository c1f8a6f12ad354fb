"""The bundle: one folder of graphs and bundle.json, read strictly, verified by SHA-256 and written whole.

`multisa inspect FOLDER` verifies a bundle and prints what is in it.
"""

import json
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from multisa.runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check_manifest,
    manifest_from_json,
    manifest_to_json,
)
from multisa.runtime.errors import BundleError
from multisa.runtime.files import flush_folder, sha256_of_bytes, sha256_of_file, write_bytes_atomically

ENGINES_FOLDER = "engines"  # serialised engines inside a bundle: a cache that can be made again

_MANIFEST_LIMIT = 1 << 20  # bytes; a manifest is some kilobytes


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on the disk."""

    path: Path
    manifest: Manifest

    def read_file(self, name: str) -> bytes:
        """Bytes of one file, verified as they were read, so that what is run is what was checked.

        Raises BundleError when they are not what the manifest says.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            listed = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.path}: no file {name!r} in the bundle, it lists {listed}")
        path = _contained(self.path, name, entry)
        data = path.read_bytes()
        _compare(path, sha256_of_bytes(data), entry)
        return data


def default_bundle_path() -> Path:
    """Folder of the bundle that comes with the package."""
    return Path(__file__).parents[1] / "bundles" / "voc-animals"


def load_bundle(path: str | Path | None = None) -> Bundle:
    """Read and verify a bundle folder: the manifest's schema, then name, size and SHA-256 of each file.

    path: the folder; the packaged bundle by default. Raises BundleError that names the file or key, what was got
    and what was expected.
    """
    path = default_bundle_path() if path is None else Path(path)
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise BundleError(
            f"{path}: no {MANIFEST_NAME} there, expected a bundle folder as `multisa export` writes"
        )
    size = manifest_path.stat().st_size
    if size > _MANIFEST_LIMIT:
        raise BundleError(f"{manifest_path}: {size} bytes, expected at most {_MANIFEST_LIMIT}")
    try:
        manifest = manifest_from_json(manifest_path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BundleError(f"{manifest_path}: is no JSON ({error}): get the bundle again") from error
    except ValueError as error:
        raise BundleError(f"{manifest_path}: {error}") from error
    for name, entry in manifest.files.items():
        file = _contained(path, name, entry)
        _compare(file, sha256_of_file(file), entry)
    return Bundle(path, manifest)


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write `files` and bundle.json to `folder`, replacing a bundle that is there, and verify the result.

    The manifest's `files` are computed here from the bytes given. Everything is written to a temporary folder
    beside the target first. The cache of engines of a bundle that is replaced stays: an engine of graphs that
    have changed is not found by its key. Raises BundleError when the manifest is not valid, and as
    `check_replaceable` does.
    """
    entries = {name: FileEntry(sha256_of_bytes(data), len(data)) for name, data in sorted(files.items())}
    complete = replace(manifest, files=entries)
    try:
        check_manifest(complete)
    except ValueError as error:
        raise BundleError(f"{folder / MANIFEST_NAME}: {error}") from error
    check_replaceable(folder)
    target = folder.resolve()  # of a link, what it leads to
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
        new = Path(work, "new")
        new.mkdir()
        for name, data in files.items():
            write_bytes_atomically(new / name, data)
        write_bytes_atomically(new / MANIFEST_NAME, manifest_to_json(complete).encode())
        flush_folder(new)
        if target.exists():
            _swap(new, target)
        else:
            new.replace(target)
        flush_folder(target.parent)
    return load_bundle(folder)


def _contained(folder: Path, name: str, entry: FileEntry) -> Path:
    path = folder / name
    if not path.exists():
        raise BundleError(f"{path}: the file is missing, {MANIFEST_NAME} lists it")
    if path.resolve().parent != folder.resolve() or not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{path}: leads to {path.resolve()}, expected a file inside the bundle's folder")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"{path}: got {size} bytes, expected {entry.bytes}: get the bundle again")
    return path


def _compare(path: Path, digest: str, entry: FileEntry) -> None:
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: got sha256 {digest}, expected {entry.sha256}: the file was altered, "
            "get the bundle again"
        )


def check_replaceable(folder: Path) -> None:
    """Raise BundleError if a bundle written to `folder` would remove anything but a bundle.

    A bundle is its manifest, the files that lists and, perhaps, its cache of engines.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    problem = _what_is_no_bundle(folder)
    if problem:
        raise BundleError(
            f"{folder}: exists and is not a bundle alone ({problem}), expected a new folder or a bundle to "
            "replace: choose another folder or move what is not of the bundle"
        )


def _what_is_no_bundle(folder: Path) -> str:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return f"no {MANIFEST_NAME} in it"
    if path.stat().st_size > _MANIFEST_LIMIT:
        return f"{MANIFEST_NAME} has more than {_MANIFEST_LIMIT} bytes"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return f"{MANIFEST_NAME} is not JSON, or nested too deeply"
    # Only what every version has: a bundle of an older or newer one may be replaced, too.
    if (
        not isinstance(value, dict)
        or "schema_version" not in value
        or not isinstance(value.get("files"), dict)
    ):
        return f"{MANIFEST_NAME} is no manifest: schema_version and files are expected in it"
    names = {MANIFEST_NAME, *value["files"]}
    for place in sorted(folder.iterdir()):
        is_cache = place.name == ENGINES_FOLDER and place.is_dir()
        if not is_cache and not (place.name in names and place.is_file()):
            return f"{place.name} is not of it"
    return ""


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, which its engines stay in.

    On any failure, an interrupt too, `folder` is as it was.
    """
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old")
    try:
        folder.replace(old)
        if (old / ENGINES_FOLDER).exists():
            (old / ENGINES_FOLDER).replace(new / ENGINES_FOLDER)
        new.replace(folder)
    finally:
        if not folder.exists():
            if (new / ENGINES_FOLDER).exists():
                (new / ENGINES_FOLDER).replace(old / ENGINES_FOLDER)
            old.replace(folder)
        elif old.exists():
            shutil.rmtree(old)
