"""What fsspec has no call for: some bytes of a web server or of S3 with their ETag; a folder of S3 by pages.

    part = sync(files.loop, web_part, files, "https://host/a.jpg", 0, 4097)     # fsspec.asyn.sync

`files` is fsspec's file system of the protocol.
"""

import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from multisa.runtime.errors import ImageError
from multisa.runtime.sources.names import unsafe_path
from multisa.runtime.sources.storage import Entry

_PIECE = 2**20  # bytes
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
_PARTIAL = 206  # HTTP status of an answer that keeps to the range it was asked for


class Part(NamedTuple):
    """Bytes of a file, and its version (as in SourceItem) where the answer to the request told it."""

    data: bytes
    version: str = ""  # its ETag


PartRequest = Callable[[Any, str, int, int], Awaitable[Part]]


async def web_part(files: Any, url: str, start: int, end: int) -> Part:
    """Bytes `start` to `end` of a file, fewer where it ends; no more is taken, whatever the server sends.

    Raises ImageError where it does not begin at `start`, and what aiohttp raises.
    """
    session = await files.set_session()
    options = dict(files.kwargs)
    # Compressed on the way, it would have other bytes and another ETag.
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    headers["Range"] = f"bytes={start}-{end - 1}"
    async with session.get(files.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if start and answer.status != _PARTIAL:
            raise ImageError("the server sends whole files only, expected parts: copy the file here")
        return Part(await _at_most(answer.content, end - start), _tag_of(answer.headers))


async def s3_part(files: Any, url: str, start: int, end: int) -> Part:
    """Bytes `start` to `end` of an object, fewer where it ends. Raises what s3fs raises."""
    bucket, key, version_id = files.split_path(url)
    options = {"VersionId": version_id} if version_id else {}
    answer = await files._call_s3(
        "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **options
    )
    body = answer["Body"]
    try:
        return Part(await _at_most(body, end - start), _tag_of(answer))
    finally:
        body.close()


async def s3_folder(files: Any, url: str) -> dict[str, Entry]:
    """The names below a prefix. One page of answers is held at a time, of a key its name and version are.

    Raises FileNotFoundError where there is nothing, and what s3fs raises.
    """
    bucket, key, _ = files.split_path(url)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    here = len(f"{bucket}/{prefix}")
    entries: dict[str, Entry] = {}
    found = False
    async for info in files._iterdir(bucket, delimiter="/", prefix=prefix):
        found = True
        add_entry(entries, str(info["name"])[here:], info)
    if prefix and not found:
        raise FileNotFoundError(errno.ENOENT, "no key begins so")
    return entries


def add_entry(entries: dict[str, Entry], name: str, info: Mapping[str, Any]) -> None:
    """Put what a listing says of a name to the others; the folder stays where a file has its name, too."""
    name = name.removesuffix("/")
    # Some stores keep an empty object for the folder itself.
    if not name or (name in entries and entries[name].is_folder):
        return
    problem = unsafe_path(name) or ("more than one name where one was asked for" if "/" in name else "")
    size = info.get("size")
    is_folder = info.get("type") == "directory"
    entries[name] = Entry(name, is_folder, -1 if size is None else int(size), version_of(info), problem)


def version_of(info: Mapping[str, Any]) -> str:
    """The version that an entry of a listing tells; "" where it tells none."""
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


PARTS: dict[str, PartRequest] = {"http": web_part, "https": web_part, "s3": s3_part, "s3a": s3_part}
