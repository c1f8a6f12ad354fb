"""Open the source that a path, pattern or URL names.

with open_source("photos/**/*.jpg") as source:
    for listed in source.listing(): ...
"""

import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import ClassNames
from multisa.runtime.sources.base import Source
from multisa.runtime.sources.folders import FolderSource, OneFileSource, Pattern, walk
from multisa.runtime.sources.lists import KINDS, FilesSource, LabelReader, ListSource
from multisa.runtime.sources.remote import RemoteStore, protocol_of
from multisa.runtime.sources.storage import (
    Entry,
    LocalStore,
    Store,
    bad_name,
    is_image,
    is_tar,
    join,
    printable,
    reason_of,
)
from multisa.runtime.sources.tar import TarSource
from multisa.runtime.sources.zip import ZipSource

EXPECTED = (
    "expected a folder of images, one image, a pattern (photos/**/*.jpg), a list (.txt), a manifest (.csv, "
    ".jsonl, .parquet), tar files (shards/{000..123}.tar) or a .zip, on this machine or behind a URL"
)

SEVERAL = "\0"  # between several images in one text that names a source; no path contains it

_TABLES = (".json", ".tsv", ".xlsx", ".xls", ".ods", ".xml")

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_SHARDS = 1_000_000
_WILD = re.compile(r"[*?[]")


def open_source(
    spec: str,
    *,
    classes: Collection[str] = (),
    ignore_labels: bool = False,
    storage_options: str | Mapping[str, Any] | None = None,
) -> Source:
    """Open the source that `spec` names, without listing it or contacting a server.

    spec: a path, pattern or URL, or the paths of several images joined by SEVERAL. classes: names that tell a
    label with spaces from several labels. ignore_labels: do not read labels; `SourceItem.labels` is () where a
    list has some. storage_options: a JSON object or a mapping for fsspec; by default, fsspec's configuration and
    the environment apply.

    Raises UsageError if `spec` names no source, BackendUnavailable if fsspec or its package for a protocol is
    missing.
    """
    if SEVERAL in spec:
        return _several(spec.split(SEVERAL), _Stores("", _options(storage_options)))
    stores = _Stores(protocol_of(spec), _options(storage_options))
    labels = LabelReader(ClassNames(classes), ignore_labels)
    if stores.protocol in ("file", "local"):
        spec, stores.protocol = spec.partition("://")[2], ""
    if "::" in spec and "://" in spec:
        raise UsageError(f"{spec}: got a chain of URLs, expected one: {EXPECTED}")
    if not stores.protocol:
        return _local(spec, stores, labels)
    path = spec.partition("?")[0] if stores.protocol in ("http", "https") else spec
    name = path.rpartition("/")[2]
    if _has_range(name) or (_WILD.search(path) and stores.protocol not in ("http", "https")):
        return _pattern(spec, stores, labels)
    if not name or "." not in name:
        return FolderSource(spec.rstrip("/"), stores.of(stores.protocol))
    return _file(spec, name, stores, labels) or FolderSource(spec, stores.of(stores.protocol))


class _Stores:
    """One store per protocol, created on first use.

    The options apply to the protocol of the source, and to all URLs in a local list.
    """

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        self.protocol = protocol
        self._options = options
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()

    def of(self, protocol: str) -> Store:
        """Return the store for URLs of a protocol; "" is this machine, where links may lead anywhere."""
        with self._lock:
            if protocol not in self._stores:
                options = self._options if self.protocol in ("", protocol) else {}
                self._stores[protocol] = RemoteStore(protocol, options) if protocol else LocalStore()
            return self._stores[protocol]

    def below(self, root: str) -> Store:
        """Return the store of the source's protocol; on this machine, links must not leave `root`."""
        return self.of(self.protocol) if self.protocol else LocalStore(root or ".")


def _local(spec: str, stores: _Stores, labels: LabelReader) -> Source:
    if os.path.isdir(spec):  # noqa: PTH112 (text, as all paths of sources)
        root = spec.rstrip("/") or "/"
        return FolderSource(root, LocalStore(root))
    if not os.path.lexists(spec):
        if _has_range(spec) or _WILD.search(spec):
            return _pattern(spec, stores, labels)
        raise UsageError(f"{printable(spec)}: does not exist, {EXPECTED}")
    name = spec.rpartition("/")[2]
    # A file with another extension may be an image; decoding decides.
    return _file(spec, name, stores, labels) or _image(spec, name, stores)


def _several(paths: list[str], stores: _Stores) -> Source:
    for path in paths:
        if os.path.isdir(path) or not is_image(path.partition("?")[0] if "://" in path else path):  # noqa: PTH112
            raise UsageError(
                f"{printable(path)}: is one of {len(paths)} arguments and no image file, expected images only: name "
                "their folder, or put a pattern in quotes"
            )
    return FilesSource(paths, stores.of)


def _file(spec: str, name: str, stores: _Stores, labels: LabelReader) -> Source | None:
    """Return the source for a single file, chosen by its extension; None for an unknown extension."""
    store = stores.of(stores.protocol)
    if _COMPRESSED.search(name):
        raise UsageError(
            f"{printable(spec)}: a compressed tar file, whose members cannot be read one by one: decompress "
            "it first (gunzip, bunzip2, unxz, zstd -d); compression gains nothing for images"
        )
    if is_tar(name):
        root = spec[: -len(name)].rstrip("/") if "/" in spec.rstrip("/") else ""
        root = root or ("/" if spec.startswith("/") else "")
        return TarSource(root, store, lambda: [Entry(name, False)], f"tar file {printable(spec)}", labels)
    if name.lower().endswith(".zip"):
        return ZipSource(spec, store)
    if name.lower().rpartition(".")[2] in KINDS and "." in name:
        return ListSource(spec, stores.of, labels)
    if name.lower().endswith(_TABLES):
        raise UsageError(
            f"{printable(spec)}: got a table or labels, expected images or a manifest: save it "
            "as .csv or .jsonl with the columns image and labels, or give it with --labels (.csv, .json)"
        )
    return _image(spec, name, stores) if is_image(name) else None


def _image(spec: str, name: str, stores: _Stores) -> Source:
    if reason := bad_name(name):
        raise UsageError(f"{printable(spec)}: {reason}, expected a folder of images or one image: rename or copy it")
    return OneFileSource(spec, stores.of(stores.protocol))


def _pattern(spec: str, stores: _Stores, labels: LabelReader) -> Source:
    if _has_range(spec):
        if not is_tar(spec) or _WILD.search(spec):
            raise UsageError(f"{printable(spec)}: a range counts tar files: expected PATH/{{000..123}}.tar")
        root, names = _split(spec, spec.index("{"))
        _expand_range(names)  # raises UsageError early

        def ranged() -> Iterable[Entry]:
            return (Entry(name, False) for name in _expand_range(names))

        return TarSource(root, stores.below(root), ranged, f"tar files {printable(spec)}", labels)
    wild = _WILD.search(spec)
    assert wild
    root, text = _split(spec, wild.start())
    if text.lower().endswith(".zip") or text.lower().rpartition(".")[2] in KINDS:
        raise UsageError(f"{printable(spec)}: several files, expected one zip file, list or manifest per run")
    root = root or "."
    store, pattern = stores.below(root), Pattern(text)
    if is_tar(text):
        shards = partial(_matching_shards, store, root, pattern)
        return TarSource(root, store, shards, f"tar files {printable(spec)}", labels)
    return FolderSource(root, store, pattern)


def _split(spec: str, at: int) -> tuple[str, str]:
    """Split `spec` into the folder before the name at position `at`, and the rest."""
    slash = spec.rfind("/", 0, at)
    root = spec[: slash + 1].rstrip("/")
    return ("/" if slash >= 0 and not root else root), spec[slash + 1 :]


def _options(text: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(text, str):
        return text or {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        # The message omits the text, which may contain credentials.
        raise UsageError('storage options: got no JSON object, expected {"endpoint_url": "..."} or the like')
    return options


def _has_range(spec: str) -> bool:
    """Return whether `spec` has a range like {000000..000123}."""
    return bool(_RANGE.search(spec))


def _expand_range(spec: str) -> Iterator[str]:
    """Expand a range like {000000..000123} in `spec` to its paths.

    Raises UsageError for several ranges or one that is too large.
    """
    first, *more = _RANGE.finditer(spec)
    if more:
        raise UsageError(f"{spec}: got several ranges, expected one like {{000000..000123}}")
    low, high = int(first[1]), int(first[2])
    if not low <= high < low + _MOST_SHARDS:
        raise UsageError(
            f"{spec}: got a range of {high - low + 1} files, expected 1 to {_MOST_SHARDS}, the smaller number first"
        )
    width = len(first[1])
    return (f"{spec[: first.start()]}{i:0{width}}{spec[first.end() :]}" for i in range(low, high + 1))


def _matching_shards(store: Store, root: str, pattern: Pattern) -> Iterator[Entry]:
    """Yield the tar files below `root` that match a pattern. Raises UsageError if there is none."""
    count = 0
    try:
        for entry in walk(store, root, is_tar, pattern):
            if isinstance(entry, Entry):
                count += not entry.problem
                yield entry
    except OSError as error:
        raise UsageError(f"{printable(root)}: cannot be listed ({reason_of(error)})") from error
    if not count:
        raise UsageError(f"{printable(join(root, pattern.text))}: no file of this name, expected tar files")
