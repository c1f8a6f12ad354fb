"""Sources behind URLs: a real S3 server (moto, on this machine), a web server, and fsspec's memory."""

import http.server
import importlib.util
import io
import json
import random
import tarfile
import threading
import tracemalloc
import uuid
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import boto3
import fsspec
import pyarrow
import pytest
from fsspec.asyn import sync_wrapper
from moto.server import ThreadedMotoServer
from pyarrow import parquet

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.sources.base import OtherFiles, Skipped, SourceItem
from multisa.runtime.sources.registry import open_source
from multisa.runtime.sources.remote import s3_folder

FILES = {"a.jpg": b"a" * 100, "a/b.jpg": b"b" * 200, "a/c.jpg": b"c", "é z.png": b"z", "notes.md": b""}
IMAGES = {name: data for name, data in FILES.items() if name != "notes.md"}
ORDER = ["a/b.jpg", "a/c.jpg", "a.jpg", "é z.png"]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Bucket:
    def __init__(self, client: Any, options: dict[str, Any]) -> None:
        self.name = f"b{uuid.uuid4().hex}"
        self.client = client
        self.options = json.dumps(options)
        client.create_bucket(Bucket=self.name)

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"s3://{self.name}/{key}"

    def items(self, path: str, **options: Any) -> list[SourceItem]:
        with open_source(f"s3://{self.name}/{path}", storage_options=self.options, **options) as source:
            return [entry for entry in source.listing() if isinstance(entry, SourceItem)]

    def contents(self, path: str, **options: Any) -> dict[str, bytes]:
        with (
            open_source(f"s3://{self.name}/{path}", storage_options=self.options, **options) as source,
            ThreadPoolExecutor(4) as pool,
        ):
            found = self.items(path, **options)
            return dict(zip([item.id for item in found], pool.map(source.read, found), strict=True))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str) -> Bucket:
    client = boto3.client(
        "s3", endpoint_url=server, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    return Bucket(client, {"endpoint_url": server, "key": "testing", "secret": "testing"})


@pytest.fixture
def photos(bucket: Bucket) -> Bucket:
    for name, data in FILES.items():
        bucket.put(f"photos/{name}", data)
    return bucket


def test_a_folder_of_a_bucket(photos: Bucket) -> None:
    found = photos.items("photos")
    assert [item.id for item in found] == ORDER
    assert [item.size for item in found] == [len(FILES[name]) for name in ORDER]
    etags = {item.id: item.version for item in found}
    assert etags["a.jpg"] == photos.client.head_object(Bucket=photos.name, Key="photos/a.jpg")["ETag"].strip('"')
    assert photos.contents("photos/") == IMAGES
    assert photos.contents("photos/a/*.jpg") == {"b.jpg": FILES["a/b.jpg"], "c.jpg": FILES["a/c.jpg"]}
    assert photos.contents("photos/**/*.jpg").keys() == {"a/b.jpg", "a/c.jpg", "a.jpg"}
    assert photos.contents("photos/a.jpg") == {"a.jpg": FILES["a.jpg"]}
    assert photos.contents("").keys() == {f"photos/{name}" for name in IMAGES}


def test_names_that_only_a_bucket_can_hold(photos: Bucket) -> None:
    for key in ("photos/a//d.jpg", "photos/a/..\\x.jpg", "photos/.h/e.jpg", "photos/a/"):
        photos.put(key, b"x")
    with open_source(f"s3://{photos.name}/photos", storage_options=photos.options) as source:
        entries = list(source.listing())
    assert [entry.id for entry in entries if isinstance(entry, SourceItem)] == ORDER
    reasons = {entry.id: entry.reason for entry in entries if isinstance(entry, Skipped)}
    assert reasons[".h"] == "hidden"
    assert reasons["a/..\\x.jpg"] == "backslash in its name"
    assert reasons["a//"] == "empty name in its path (//)"


@pytest.mark.parametrize("seed", range(4))
def test_every_key_is_used_skipped_or_counted(bucket: Bucket, seed: int) -> None:
    used = {"a.jpg", "B.JPG", "deep/c.png", "K\u00e4tzchen.png", "Ka\u0308mel.png", "two words.png", "x,y+z%20.png"}
    skipped = {".h.jpg", ".git/d.jpg", "a//b.jpg", "deep/b\\c.jpg", "e.heic", "a.mask.png", "l" * 300 + ".jpg"}
    others = {"notes.txt", "blank.jpg ", "noextension"}
    keys = random.Random(seed).sample(sorted(used | skipped | others), 12)
    for key in keys:
        bucket.put(f"photos/{key}", b"x")
    with open_source(f"s3://{bucket.name}/photos", storage_options=bucket.options) as source:
        entries = list(source.listing())
    assert {entry.id for entry in entries if isinstance(entry, SourceItem)} == used & set(keys)
    listed = {entry.id for entry in entries if isinstance(entry, Skipped)}
    found = {key for key in keys if any(key == id_ or key.startswith(f"{id_.rstrip('/')}/") for id_ in listed)}
    assert found == skipped & set(keys)
    assert sum(entry.count for entry in entries if isinstance(entry, OtherFiles)) == len(others & set(keys))


def test_what_has_changed_in_a_bucket(photos: Bucket) -> None:
    before = {item.id: item for item in photos.items("photos")}
    source = open_source(f"s3://{photos.name}/photos", storage_options=photos.options)
    for longer in (b"a" * 99, b"a" * 101):
        photos.put("photos/a.jpg", longer)
        with pytest.raises(ImageError, match="expected the 100 it had"):
            source.read(before["a.jpg"])
    photos.put("photos/a/c.jpg", b"C")  # of the same size
    after = {item.id: item for item in photos.items("photos")}
    assert {name for name in before if before[name] != after[name]} == {"a.jpg", "a/c.jpg"}
    with pytest.raises(ImageError, match=r"^changed since it was listed"):
        source.read(before["a/c.jpg"])
    assert source.read(after["a/c.jpg"]) == b"C"
    photos.put("photos/empty.jpg", b"")
    assert photos.contents("photos/empty.jpg") == {"empty.jpg": b""}
    photos.client.delete_object(Bucket=photos.name, Key="photos/a/b.jpg")
    with pytest.raises(ImageError, match="No such file"):
        source.read(before["a/b.jpg"])


def test_an_archive_that_has_changed_in_a_bucket(bucket: Bucket) -> None:
    bucket.put("t.tar", tar_of({"1.jpg": b"one"}))
    (item,) = bucket.items("t.tar")
    source = open_source(f"s3://{bucket.name}/t.tar", storage_options=bucket.options)
    assert source.read(item) == b"one"
    bucket.put("t.tar", tar_of({"1.jpg": b"uno"}))
    with pytest.raises(ImageError, match=r"^changed since it was listed"):
        source.read(item)
    assert source.exists(item)


def test_a_folder_of_several_pages(photos: Bucket) -> None:
    options = json.loads(photos.options) | {"s3_additional_kwargs": {"MaxKeys": 2}}
    for i in range(7):
        photos.put(f"photos/a-{i}/x.jpg", b"x")
    with open_source(f"s3://{photos.name}/photos", storage_options=options) as source:
        found = [entry.id for entry in source.listing() if isinstance(entry, SourceItem)]
    assert found == [*ORDER[:2], *(f"a-{i}/x.jpg" for i in range(7)), *ORDER[2:]]


@pytest.mark.slow
def test_a_flat_folder_of_many_takes_the_memory_of_its_names() -> None:
    class Files:
        """Answers as s3fs does, in pages of 1,000 keys."""

        def split_path(self, url: str) -> tuple[str, str, None]:
            return "bucket", "photos", None

        def call_s3(self, _: str, *, ContinuationToken: str = "0", **__: object) -> dict[str, Any]:
            first = int(ContinuationToken)
            contents = [
                {"Key": f"photos/{i:08d}.jpg", "Size": i, "ETag": f'"{i:032x}"'}
                | {f"field {j} of {i}": f"value {j} of {i}" for j in range(8)}
                for i in range(first, first + 1000)
            ]
            following = str(first + 1000)
            return {"Contents": contents, "IsTruncated": first < 19_000, "NextContinuationToken": following}

    tracemalloc.start()
    try:
        entries = s3_folder(Files(), "s3://bucket/photos")
        assert len(entries) == 20_000
        assert tracemalloc.get_traced_memory()[1] / len(entries) < 700  # the dictionaries take 2,000
    finally:
        tracemalloc.stop()
    assert entries["00000007.jpg"].version == f"{7:032x}"


def test_keys_that_are_valid_no_more(photos: Bucket, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{photos.name}/photos"
    photos.put("photos.tar", tar_of({"1.jpg": b"one"}))
    (tmp_path / "here.txt").write_text(f"{url}/a.jpg\n{url}/never.jpg\n")
    specs = (url, f"{url}/a.jpg", f"{url}.tar", str(tmp_path / "here.txt"))
    sources = [open_source(spec, storage_options=photos.options) for spec in specs]
    items = [next(entry for entry in s.listing() if isinstance(entry, SourceItem)) for s in sources]
    for source, item in zip(sources, items, strict=True):
        assert source.read(item) and source.exists(item)
    never = replace(items[-1], uri=f"{url}/never.jpg")
    with pytest.raises(ImageError, match="No such file"):
        sources[-1].read(never)
    assert sources[-1].exists(never)
    monkeypatch.setattr("multisa.runtime.sources.remote._REMEMBERED", 0.0)

    async def expired(*_: object, **__: object) -> None:
        raise PermissionError("The provided token has expired.")

    # Every request of s3fs goes through the first; the second was bound to the original of the first.
    monkeypatch.setattr("s3fs.S3FileSystem._call_s3", expired)
    monkeypatch.setattr("s3fs.S3FileSystem.call_s3", sync_wrapper(expired))
    fresh = open_source(str(tmp_path / "here.txt"), storage_options=photos.options)
    for source, item in zip([*sources, fresh], [*items, items[-1]], strict=True):
        with pytest.raises(ImageError, match="Permission denied"):
            source.read(item)
        assert not source.exists(item)


def test_archives_of_a_bucket(bucket: Bucket) -> None:
    bucket.put("shards/0.tar", tar_of({"1.jpg": b"one", "1.cls": b"cat"}))
    bucket.put("shards/1.tar", tar_of({"1.jpg": b"uno" * 5000, "2.jpg": b"due"}))
    expected = {"0/1.jpg": b"one", "1/1.jpg": b"uno" * 5000, "1/2.jpg": b"due"}
    assert bucket.contents("shards/{0..1}.tar") == expected
    assert bucket.contents("shards/*.tar") == expected
    assert bucket.contents("shards/1.tar").keys() == {"1/1.jpg", "1/2.jpg"}
    found = bucket.items("shards/0.tar")
    assert found[0].labels == ("cat",) and found[0].version
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    bucket.put("photos.zip", buffer.getvalue())
    assert bucket.contents("photos.zip") == IMAGES
    with pytest.raises(UsageError, match=r"2\.tar: cannot be read \(No such file"):
        bucket.items("shards/{0..2}.tar")


def test_lists_of_a_bucket(photos: Bucket, tmp_path: Any) -> None:
    table = pyarrow.table({"image": ["a/b.jpg", "a.jpg"], "labels": [["dog"], None]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    photos.put("photos/list.parquet", buffer.getvalue())
    assert photos.contents("photos/list.parquet") == {n: FILES[n] for n in ("a/b.jpg", "a.jpg")}
    assert [item.labels for item in photos.items("photos/list.parquet")] == [("dog",), None]
    photos.put("photos/list.csv", b"image,labels\na.jpg,cat dog\n")
    assert [item.labels for item in photos.items("photos/list.csv")] == [("cat", "dog")]
    url = f"s3://{photos.name}/photos/a.jpg"
    photos.put("photos/list.txt", f"a/c.jpg\n{url}\n".encode())
    assert photos.contents("photos/list.txt") == {"a/c.jpg": b"c", f"{photos.name}/photos/a.jpg": FILES["a.jpg"]}
    for text in ("/etc/passwd.jpg", "../other/a.jpg"):
        photos.put("photos/bad.txt", text.encode())
        with pytest.raises(UsageError, match=r"line 1: .* leaves the list's folder"):
            photos.items("photos/bad.txt")
    (tmp_path / "here.txt").write_text(f"{url}\n")
    with open_source(str(tmp_path / "here.txt"), storage_options=photos.options) as source:
        (item,) = source.listing()
        assert isinstance(item, SourceItem) and source.read(item) == FILES["a.jpg"]


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    with pytest.raises(UsageError, match=r"nowhere: cannot be listed \(No such file"):
        bucket.items("nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        bucket.items("nowhere.csv")


def test_memory() -> None:
    files = fsspec.filesystem("memory")
    files.pipe({f"/multisa-test/{name}": data for name, data in FILES.items()})
    with open_source("memory://multisa-test") as source:
        found = [entry for entry in source.listing() if isinstance(entry, SourceItem)]
        assert {item.id: source.read(item) for item in found} == IMAGES
        assert [item.id for item in found] == ORDER
    files.rm("/multisa-test", recursive=True)


def test_a_protocol_whose_package_is_missing() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is here")
    with pytest.raises(BackendUnavailable, match="pip install gcsfs"):
        open_source("gs://bucket/photos")
    with pytest.raises(UsageError, match="expected s3://"):
        open_source("nonsense://bucket/photos")
    for chain in ("simplecache::s3://bucket/photos", "s3://bucket/x::file:///etc"):
        with pytest.raises(UsageError, match="chain of URLs"):
            open_source(chain)


class Web(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges; refuses the next `refusals` requests, as a busy server does."""

    data = tar_of({"1.jpg": b"one"})
    refusals = 0
    status = 503
    asked = 0
    tag = ""
    whole = False  # ignores ranges, and never ends
    sent = 0

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        first, last = 0, len(self.data) - 1
        if self.whole:
            self._send_without_end()
            return
        if given := self.headers.get("Range"):
            low, _, high = given.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self._answer(self.data[first : last + 1])

    def _answer(self, body: bytes) -> None:
        type(self).asked += 1
        refused = type(self).refusals > 0
        type(self).refusals -= refused
        partial = body and "Range" in self.headers
        self.send_response(self.status if refused else 206 if partial else 200)
        self.send_header("Accept-Ranges", "bytes")
        if self.tag:
            self.send_header("ETag", f'"{self.tag}"')
        self.send_header("Content-Length", "0" if refused else str(len(body or self.data)))
        if partial and not refused:
            low = self.headers["Range"].removeprefix("bytes=").split("-")[0]
            end = int(low) + len(body) - 1
            self.send_header("Content-Range", f"bytes {low}-{end}/{len(self.data)}")
        self.end_headers()
        if not refused:
            self.wfile.write(body)

    def _send_without_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while type(self).sent < 2**27:
                self.wfile.write(bytes(2**16))
                type(self).sent += 2**16
        except OSError:
            pass  # hung up

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Web.refusals, Web.status, Web.asked, Web.tag, Web.whole, Web.sent = 0, 503, 0, "", False, 0
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_busy_server_is_asked_again(web: str) -> None:
    source = open_source(f"{web}/t.tar?X-Signature=secret")
    (item,) = source.listing()
    assert isinstance(item, SourceItem) and item.id == "t/1.jpg"
    Web.refusals, Web.asked = 2, 0
    assert source.read(item) == b"one"
    assert Web.asked == 3
    Web.refusals = 10
    with pytest.raises(ImageError, match="503") as raised:
        source.read(item)
    assert Web.asked == 6 and "secret" not in str(raised.value)
    Web.refusals, Web.status, Web.asked = 1, 403, 0
    with pytest.raises(ImageError, match="403"):
        source.read(item)
    assert Web.asked == 1  # a refusal is final
    Web.refusals, Web.status, Web.asked = 1, 404, 0
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        source.read(item)
    assert Web.asked == 1


def test_a_server_that_sends_more_than_it_is_asked_for(web: str) -> None:
    image, tar = open_source(f"{web}/a.jpg"), open_source(f"{web}/t.tar")
    (item,), (member,) = (list(source.listing()) for source in (image, tar))
    assert isinstance(item, SourceItem) and isinstance(member, SourceItem)
    Web.whole = True
    with pytest.raises(ImageError, match=f"got {item.size + 1} bytes, expected the {item.size} it had"):
        image.read(item)
    with pytest.raises(ImageError, match="sends whole files only"):
        tar.read(member)
    assert Web.sent < 2**25  # what fits into the buffers between the two


def test_a_file_that_has_changed_on_a_server(web: str) -> None:
    Web.tag = "first"
    source = open_source(f"{web}/t.tar")
    (item,) = source.listing()
    assert isinstance(item, SourceItem) and item.version == "first" and source.read(item) == b"one"
    Web.tag = "second"
    with pytest.raises(ImageError, match=r"^changed since it was listed"):
        source.read(item)
    Web.tag = ""  # some of its machines do not tell
    assert source.read(item) == b"one"
