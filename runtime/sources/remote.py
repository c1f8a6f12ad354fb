"""Buckets and web servers, through fsspec.

    store = RemoteStore("s3", {"endpoint_url": "http://127.0.0.1:9000"})

Paths are whole URLs. Keys and secrets come from fsspec's own configuration, the environment, or the options.
"""

import errno
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

from multisa.runtime.errors import EngineUnavailable, ImageError, UsageError
from multisa.runtime.sources.contract import MAX_FILE_BYTES
from multisa.runtime.sources.names import unsafe_path
from multisa.runtime.sources.storage import Blob, Entry, Wanted, check_size

Result = TypeVar("Result")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WAITS = (0.2, 1.0)  # seconds before the second and the third attempt; packages retry by themselves, too
_WINDOW = 4 * 2**20  # bytes of one request: a request takes as long as some megabytes do
# Packages that fsspec asks for, by protocol.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
# What such packages raise besides OSError, by the module it is in.
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


def protocol_of(path: str) -> str:
    """The protocol of a URL in lower case, or "" for a path of this machine."""
    match = _URL.match(path)
    return match[1].lower() if match else ""


class RemoteStore:
    """See Store. Transient errors are tried again, three times in all."""

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise EngineUnavailable(
                "fsspec is not installed", remedy=f"pip install fsspec {_PACKAGES.get(protocol, '')}".rstrip()
            ) from error
        try:
            kind = fsspec.get_filesystem_class(protocol)
            self._files = kind(**{"use_listings_cache": False, **options})
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            remedy = f"pip install {package}" if package else "install the package that fsspec names"
            cause = f"{protocol}:// needs another package ({error})"
            raise EngineUnavailable(cause, remedy=remedy) from error
        except TypeError as error:
            raise UsageError(f"storage options: {protocol}:// does not take them: {error}") from error
        except ValueError as error:
            raise UsageError(
                f"{protocol}://: cannot be opened ({error}): expected s3://, gs://, https:// or another of "
                "fsspec's protocols"
            ) from error

    def folder(self, path: str, wanted: Wanted) -> Iterator[Entry]:
        """See Store."""
        found = self._call(self._files.ls, path, detail=True)
        here = str(self._files._strip_protocol(path)).rstrip("/") + "/"
        entries = {}
        for info in found:
            name = str(info["name"])
            name = name.removeprefix(here) if name.startswith(here) else name.lstrip("/")
            name = name.removesuffix("/")
            # Some stores keep an empty object for the folder itself.
            if not name or f"{name}/" in (here, here.lstrip("/")):
                continue
            entries[name] = _entry(name, info)
        return (entries[name] for name in sorted(entries))

    @contextmanager
    def open(self, path: str) -> Iterator[Blob]:
        """See Store."""
        info = self._call(self._files.info, path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if info.get("size") is None:
            raise OSError(errno.EINVAL, "the server does not tell its size")
        yield _RemoteBlob(self, path, int(info["size"]), _version(info))

    @contextmanager
    def stream(self, path: str) -> Iterator[BinaryIO]:
        """See Store."""
        with _translated(), self._files.open(path, "rb", block_size=_WINDOW) as file:
            yield io.BufferedReader(file)  # whose lines can be limited

    def read(self, path: str, size: int, version: str) -> bytes:
        """See Store."""
        if size > MAX_FILE_BYTES:
            check_size(size, size)
        if size == 0:
            return b""  # no server has a range of that
        # One byte more than it should have, to see whether it has.
        end = (MAX_FILE_BYTES if size < 0 else size) + 1
        data = cast(bytes, self._call(self._files.cat_file, path, start=0, end=end))
        check_size(len(data), size)
        return data

    def read_range(self, path: str, start: int, length: int, version: str) -> bytes:
        """See Store."""
        if length <= 0:
            return b""
        data = cast(bytes, self._call(self._files.cat_file, path, start=start, end=start + length))
        if len(data) > length:
            raise ImageError("the server sends whole files only, expected parts: copy the file here")
        return data

    def _call(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        for wait in (*_WAITS, None):
            try:
                with _translated():
                    return function(*args, **options)
            except _FINAL:
                raise
            except OSError as error:
                if wait is None or error.errno == errno.EINVAL:
                    raise
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class _RemoteBlob:
    store: RemoteStore
    path: str
    size: int
    version: str
    window: int = _WINDOW

    def read_at(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        try:
            return self.store.read_range(self.path, offset, length, self.version)
        except ImageError as error:
            raise OSError(errno.EINVAL, str(error)) from error


@contextmanager
def _translated() -> Iterator[None]:
    """Everything that says no to a request becomes an OSError; EINVAL where asking again is of no use."""
    foreign = tuple(getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules)
    try:
        yield
    except _FINAL:
        raise
    except (*foreign, OSError, ValueError) as error:
        status = getattr(error, "status", None)
        status = status if isinstance(status, int) else None
        refused = status is not None and 400 <= status < 500 and status not in (408, 429)
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "not found") from error
        # No address: it may hold a signature.
        text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
        text = re.sub(r"\?\S*", "?...", str(text) or type(error).__name__)
        number = errno.EINVAL if refused or isinstance(error, ValueError) else errno.EIO
        raise OSError(number, f"{status} {text}" if status else text) from error


def _entry(name: str, info: Mapping[str, Any]) -> Entry:
    is_folder = info.get("type") == "directory"
    problem = unsafe_path(name) or ("more than one name where one was asked for" if "/" in name else "")
    size = info.get("size")
    return Entry(name, is_folder, -1 if size is None else int(size), _version(info), problem)


def _version(info: Mapping[str, Any]) -> str:
    for key in _VERSIONS:
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""
