"""The source that a person means by what they type.

with open_source("photos/**/*.jpg") as source:
    for listed in source.listing(): ...
"""

import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from multisa.runtime.errors import UsageError
from multisa.runtime.sources.base import Source
from multisa.runtime.sources.folders import FolderSource, OneFileSource, Pattern
from multisa.runtime.sources.lists import KINDS, CellReader, Columns, ListSource
from multisa.runtime.sources.names import bad_name, is_image, is_tar, printable
from multisa.runtime.sources.remote import RemoteStore, protocol_of
from multisa.runtime.sources.storage import Entry, LocalStore, Store
from multisa.runtime.sources.tar import TarSource, expand_range, found_shards, has_range
from multisa.runtime.sources.zip import ZipSource

EXPECTED = (
    "expected a folder of images, one image, a pattern (photos/**/*.jpg), a list (.txt), a manifest (.csv, "
    ".jsonl, .parquet), tar files (shards/{000..123}.tar) or a .zip, here or behind a URL"
)

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_WILD = re.compile(r"[*?[]")


def open_source(
    spec: str,
    *,
    image_column: str = "image",
    labels_column: str | None = None,
    classes: Collection[str] = (),
    storage_options: str | Mapping[str, Any] | None = None,
) -> Source:
    """Open what `spec` names; nothing is listed or asked of a server yet.

    `image_column` and `labels_column` are those of a manifest; the labels' ("labels") may be missing unless
    it is given. `classes` tells names that hold spaces from several names. `storage_options` are a JSON
    object or a mapping for fsspec; without them its own configuration and the environment hold.

    Raises UsageError for what is no source, BackendUnavailable where fsspec or a protocol's package is not
    there.
    """
    stores = _Stores(protocol_of(spec), _options(storage_options))
    cells = CellReader(labels_column or "labels", tuple(classes))
    columns = Columns(image_column, cells, labels_column is not None)
    if stores.protocol in ("file", "local"):
        spec, stores.protocol = spec.partition("://")[2], ""
    if "::" in spec and "://" in spec:
        raise UsageError(f"{spec}: got a chain of URLs, expected one: {EXPECTED}")
    if not stores.protocol:
        return _local(spec, stores, columns)
    path = spec.partition("?")[0] if stores.protocol in ("http", "https") else spec
    name = path.rpartition("/")[2]
    if has_range(name) or (_WILD.search(path) and stores.protocol not in ("http", "https")):
        return _pattern(spec, stores, columns)
    if not name or "." not in name:
        return FolderSource(spec.rstrip("/"), stores.of(stores.protocol))
    return _file(spec, name, stores, columns) or FolderSource(spec, stores.of(stores.protocol))


class _Stores:
    """One store for each protocol, made when it is first needed; the options are for the source's own one.

    A list here may name URLs, for which they are then.
    """

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        self.protocol = protocol
        self._options = options
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()

    def of(self, protocol: str) -> Store:
        """The store for URLs of a protocol; "" for this machine, where links lead anywhere."""
        with self._lock:
            if protocol not in self._stores:
                own = protocol == self.protocol or not self.protocol
                self._stores[protocol] = (
                    RemoteStore(protocol, self._options if own else {}) if protocol else LocalStore()
                )
            return self._stores[protocol]


def _local(spec: str, stores: _Stores, columns: Columns) -> Source:
    shown = printable(spec)
    if os.path.isdir(spec):  # noqa: PTH112 (text, as all paths of sources)
        root = spec.rstrip("/") or "/"
        return FolderSource(root, LocalStore(root))
    if not os.path.lexists(spec):
        if has_range(spec) or _WILD.search(spec):
            return _pattern(spec, stores, columns)
        raise UsageError(f"{shown}: does not exist, {EXPECTED}")
    name = spec.rpartition("/")[2]
    found = _file(spec, name, stores, columns)
    if found is not None:
        return found
    # Whatever its name ends in: an image is known by its bytes.
    return _image(spec, name, stores)


def _file(spec: str, name: str, stores: _Stores, columns: Columns) -> Source | None:
    """The source that one file is, by its name's ending; None where that says nothing."""
    store = stores.of(stores.protocol)
    if _COMPRESSED.search(name):
        raise UsageError(
            f"{printable(spec)}: a compressed tar file, of which no member can be read alone: decompress it "
            "first (gunzip, bunzip2, unxz, zstd -d); images gain nothing by it"
        )
    if is_tar(name):
        root = spec[: -len(name)].rstrip("/") if "/" in spec.rstrip("/") else ""
        root = root or ("/" if spec.startswith("/") else "")
        shards = partial(_named, [name])
        return TarSource(root, store, shards, f"tar file {printable(spec)}", columns.cells)
    if name.lower().endswith(".zip"):
        return ZipSource(spec, store)
    if name.lower().rpartition(".")[2] in KINDS and "." in name:
        return ListSource(spec, stores.of, columns)
    return _image(spec, name, stores) if is_image(name) else None


def _image(spec: str, name: str, stores: _Stores) -> Source:
    if reason := bad_name(name):
        raise UsageError(
            f"{printable(spec)}: {reason}, expected a folder of images or one image: rename or copy it"
        )
    return OneFileSource(spec, stores.of(stores.protocol))


def _pattern(spec: str, stores: _Stores, columns: Columns) -> Source:
    if has_range(spec):
        if not is_tar(spec) or _WILD.search(spec):
            raise UsageError(f"{printable(spec)}: a range counts tar files: expected PATH/{{000..123}}.tar")
        root, names = _split(spec, spec.index("{"))
        expand_range(names)  # so that what is wrong with it is said at once
        store = stores.of(stores.protocol) if stores.protocol else LocalStore(root or ".")
        shards = partial(_ranged, names)
        return TarSource(root, store, shards, f"tar files {printable(spec)}", columns.cells)
    wild = _WILD.search(spec)
    assert wild
    root, text = _split(spec, wild.start())
    if text.lower().endswith(".zip") or text.lower().rpartition(".")[2] in KINDS:
        raise UsageError(f"{printable(spec)}: several files, expected one zip file, list or manifest a run")
    store = stores.of(stores.protocol) if stores.protocol else LocalStore(root or ".")
    pattern = Pattern(text)
    if is_tar(text):
        found = partial(found_shards, store, root or ".", pattern)
        return TarSource(root or ".", store, found, f"tar files {printable(spec)}", columns.cells)
    return FolderSource(root or ".", store, pattern)


def _split(spec: str, at: int) -> tuple[str, str]:
    """The folder before what is no plain name at `at`, and the rest."""
    slash = spec.rfind("/", 0, at)
    root = spec[: slash + 1].rstrip("/")
    return ("/" if slash >= 0 and not root else root), spec[slash + 1 :]


def _named(names: Iterable[str]) -> Iterable[Entry]:
    return (Entry(name, False) for name in names)


def _ranged(names: str) -> Iterable[Entry]:
    return _named(expand_range(names))


def _options(given: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given or {}
    try:
        options = json.loads(given)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        # Not shown: there may be keys in it.
        raise UsageError('storage options: got no JSON object, expected {"endpoint_url": "..."} or the like')
    return options
