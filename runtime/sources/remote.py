"""Buckets and web servers, through the public interface of fsspec and its packages.

    store = RemoteStore("s3", {"endpoint_url": "http://127.0.0.1:9000"})

Paths are whole URLs. Credentials come from fsspec's configuration, the environment, or the options.
"""

import errno
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.imaging.decode import MAX_FILE_BYTES
from multisa.runtime.sources.storage import Blob, Entry, NameFilter, Store, check_size, check_version, unsafe_path

Result = TypeVar("Result")

_PIECE = 2**20  # bytes
_NO_RANGES = "the server sends whole files only, expected ranges: copy the file to this machine"
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
_PARTIAL = 206  # HTTP status of a response that respects the requested range
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WAITS = (0.2, 1.0)  # seconds before the second and the third attempt; packages also retry on their own
_WINDOW = 4 * 2**20  # bytes per request: the latency of a request equals some megabytes
# The packages that fsspec needs, by protocol.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
# Errors of these packages that are not OSErrors: module and class.
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_REMEMBERED = 30.0  # seconds for which a successful check is not repeated
_WITNESSES = 3  # hosts or buckets; of each, the file that was read last is remembered


def protocol_of(path: str) -> str:
    """Return the protocol of a URL in lower case, or "" for a path of this machine."""
    match = _URL.match(path)
    return match[1].lower() if match else ""


class Part(NamedTuple):
    """Bytes of a file, and its version (as in SourceItem) if the response states it."""

    data: bytes
    version: str = ""  # its ETag


PartRequest = Callable[[Any, str, int, int], Part]


def web_part(files: Any, url: str, start: int, end: int) -> Part:
    """Read bytes `start` to `end` of a file, fewer at its end, and no more, whatever the server sends.

    `cat_file` of fsspec neither returns the ETag nor stops at `end`. Raises ImageError when the response does
    not begin at `start`, and the errors of aiohttp.
    """

    async def request() -> Part:
        session = await files.set_session()
        options = dict(files.kwargs)
        # A compressed transfer would have other bytes and another ETag.
        headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
        headers["Range"] = f"bytes={start}-{end - 1}"
        async with session.get(files.encode_url(url), headers=headers, **options) as answer:
            answer.raise_for_status()
            if start and answer.status != _PARTIAL:
                raise ImageError(_NO_RANGES)
            return Part(await _at_most(answer.content, end - start), _tag_of(answer.headers))

    return _run(files, request)


def s3_part(files: Any, url: str, start: int, end: int) -> Part:
    """Read bytes `start` to `end` of an object, fewer at its end. Raises the errors of s3fs.

    `cat_file` of s3fs does not return the ETag, and `info` would cost a second request for every image.
    """
    bucket, key, version_id = files.split_path(url)
    options = {"VersionId": version_id} if version_id else {}
    answer = files.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **options)

    async def read_body() -> bytes:
        try:
            return await _at_most(answer["Body"], end - start)
        finally:
            answer["Body"].close()

    return Part(_run(files, read_body), _tag_of(answer))


def s3_folder(files: Any, url: str) -> dict[str, Entry]:
    """List the names directly below a prefix, holding one page of responses and an `Entry` per key.

    `ls` of s3fs would hold all responses, 2 kB per key. Raises FileNotFoundError if no key has the prefix,
    and the errors of s3fs.
    """
    bucket, key, _ = files.split_path(url)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    entries: dict[str, Entry] = {}
    is_empty = True
    page: dict[str, Any] = {"IsTruncated": True}
    options: dict[str, str] = {}
    while page.get("IsTruncated"):
        page = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **options)
        for folder in page.get("CommonPrefixes", ()):
            add_entry(entries, folder["Prefix"][len(prefix) :], {"type": "directory"}, 0)
        for info in page.get("Contents", ()):
            add_entry(entries, info["Key"][len(prefix) :], info, info["Size"])
        is_empty = is_empty and not (page.get("CommonPrefixes") or page.get("Contents"))
        options["ContinuationToken"] = page.get("NextContinuationToken", "")
    if prefix and is_empty:
        raise FileNotFoundError(errno.ENOENT, "no key has this prefix")
    return entries


def add_entry(entries: dict[str, Entry], name: str, info: Mapping[str, Any], size: int | None) -> None:
    """Add one name of a listing; a folder wins over a file of the same name."""
    if name == "/":  # what lies below has keys like a//b.jpg, which are no paths
        entries[name] = Entry(name, True, problem="empty name in its path (//)")
        return
    name = name.removesuffix("/")
    # Some stores keep an empty object for the folder itself.
    if not name or (name in entries and entries[name].is_folder):
        return
    problem = unsafe_path(name) or ("more than one name where one was expected" if "/" in name else "")
    is_folder = info.get("type") == "directory"
    entries[name] = Entry(name, is_folder, -1 if size is None else int(size), version_of(info), problem)


def version_of(info: Mapping[str, Any]) -> str:
    """Return the version in an entry of a listing, or ""."""
    for key in _VERSIONS:
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


def _tag_of(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


async def _at_most(stream: Any, length: int) -> bytes:
    data = bytearray()
    while len(data) < length and (piece := await stream.read(min(_PIECE, length - len(data)))):
        data += piece
    return bytes(data)


def _run(files: Any, request: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a request in the event loop of an fsspec filesystem."""
    from fsspec.asyn import sync

    return cast(Result, sync(files.loop, request))


PARTS: dict[str, PartRequest] = {"http": web_part, "https": web_part, "s3": s3_part, "s3a": s3_part}


class RemoteStore(Store):
    """Files behind URLs of one protocol. Requests with a transient failure are sent up to three times.

    A read compares versions if the response names one, as S3 and web servers with ETags do. Otherwise a
    change that keeps the size goes unnoticed.
    """

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise BackendUnavailable(
                "fsspec is not installed", remedy=f"pip install fsspec {_PACKAGES.get(protocol, '')}".rstrip()
            ) from error
        self._protocol = protocol
        self._lock = threading.Lock()
        self._answered: dict[str, float] = {}  # paths, and when they last existed
        self._served: dict[str, str] = {}  # the file read last from each of the last few hosts
        try:
            kind = fsspec.get_filesystem_class(protocol)
            self._files = kind(**{"use_listings_cache": False, **options})
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            remedy = f"pip install {package}" if package else "install the package that fsspec names"
            cause = f"{protocol}:// needs another package ({error})"
            raise BackendUnavailable(cause, remedy=remedy) from error
        except TypeError as error:
            raise UsageError(f"storage options: {protocol}:// does not take them: {error}") from error
        except ValueError as error:
            raise UsageError(
                f"{protocol}://: cannot be opened ({error}): expected s3://, gs://, https:// or another of "
                "fsspec's protocols"
            ) from error

    def folder(self, path: str, keep: NameFilter) -> Iterator[Entry]:
        if self._protocol in ("s3", "s3a") and _host(path):
            return _by_name(self._call(s3_folder, self._files, path))
        from fsspec.core import strip_protocol

        entries: dict[str, Entry] = {}
        here = str(strip_protocol(path)).rstrip("/") + "/"
        for info in self._call(self._files.ls, path, detail=True):
            name = str(info["name"])
            name = name.removeprefix(here) if name.startswith(here) else name.lstrip("/")
            if f"{name.removesuffix('/')}/" not in (here, here.lstrip("/")):
                add_entry(entries, name, info, info.get("size"))
        return _by_name(entries)

    @contextmanager
    def open(self, path: str) -> Iterator[Blob]:
        info = self._call(self._files.info, path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if info.get("size") is None:
            raise OSError(errno.EINVAL, "the server does not report its size")
        yield _RemoteBlob(int(info["size"]), version_of(info), _WINDOW, self, path)

    @contextmanager
    def stream(self, path: str) -> Iterator[BinaryIO]:
        with _translated(), self._files.open(path, "rb", block_size=_WINDOW) as file:
            yield io.BufferedReader(file)  # supports readline with a limit

    def read(self, path: str, size: int, version: str) -> bytes:
        if size > MAX_FILE_BYTES:
            check_size(size, size)
        if size == 0:
            return b""  # HTTP has no range of 0 bytes
        # One byte more than expected, to detect a longer file.
        end = (MAX_FILE_BYTES if size < 0 else size) + 1
        part = self._call(self._part, path, 0, end)
        check_size(len(part.data), size)
        check_version(part.version, version)
        self._note(path)
        return part.data

    def read_range(self, path: str, start: int, length: int, version: str) -> bytes:
        if length <= 0:
            return b""
        part = self._call(self._part, path, start, start + length)
        if len(part.data) > length:
            raise ImageError(_NO_RANGES)
        check_version(part.version, version)
        return part.data

    def exists(self, path: str) -> bool:
        """See Store. Sends one request, which is not repeated for a while if it succeeds."""
        now = time.monotonic()
        with self._lock:
            if now - self._answered.get(path, -_REMEMBERED) < _REMEMBERED:
                return True
        try:
            self._call(self._files.info, path)
        except OSError:
            return False
        with self._lock:
            self._answered = {old: at for old, at in self._answered.items() if now - at < _REMEMBERED}
            self._answered[path] = now
        return True

    def is_reachable(self, path: str) -> bool:
        """See Store. Checks the files that were read last, one for each of the last few hosts."""
        with self._lock:
            served = list(self._served.values())
        if served:
            return any(self.exists(one) for one in served)
        if self._protocol in ("http", "https"):
            return True  # among many hosts, some are always down
        try:
            self._call(self._files.info, f"{self._protocol}://{_host(path)}")
        except FileNotFoundError:
            return True  # the server responds: no such bucket
        except OSError:
            return False
        return True

    def _note(self, path: str) -> None:
        host = _host(path)
        with self._lock:
            self._served.pop(host, None)
            self._served[host] = path
            if len(self._served) > _WITNESSES:
                del self._served[next(iter(self._served))]

    def _part(self, path: str, start: int, end: int) -> Part:
        request = PARTS.get(self._protocol)
        if request is None:
            return Part(cast(bytes, self._files.cat_file(path, start=start, end=end)))
        return request(self._files, path, start, end)

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
class _RemoteBlob(Blob):
    store: RemoteStore
    path: str

    def read_at(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        try:
            return self.store.read_range(self.path, offset, length, self.version)
        except ImageError as error:
            raise OSError(errno.EINVAL, str(error)) from error


@contextmanager
def _translated() -> Iterator[None]:
    """Turn every error of a request into an OSError, with EINVAL if a retry is pointless."""
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
        # No query string: it may hold a signature.
        text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
        text = re.sub(r"\?\S*", "?...", str(text) or type(error).__name__)
        number = errno.EINVAL if refused or isinstance(error, ValueError) else errno.EIO
        raise OSError(number, f"{status} {text}" if status else text) from error


def _by_name(entries: dict[str, Entry]) -> Iterator[Entry]:
    """Yield the entries sorted by name; each is freed when it is yielded."""
    names = sorted(entries, reverse=True)
    while names:
        yield entries.pop(names.pop())


def _host(path: str) -> str:
    """Return the host, or the bucket, of a URL."""
    return path.partition("://")[2].partition("/")[0]
