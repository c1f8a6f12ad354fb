"""Sources on a web server: one that is busy, that changes its files, that sends more than it is asked for."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from made_archives import tar_of

from multisa.runtime.errors import ImageError
from multisa.runtime.sources.base import SourceItem
from multisa.runtime.sources.registry import open_source


class Web(http.server.BaseHTTPRequestHandler):
    """One file that takes ranges; refuses as many requests as it is told to, as a busy server does."""

    data = tar_of({"1.jpg": b"one"})
    refusals = 0
    status = 503
    asked = 0
    tag = ""
    whole = False  # ignores ranges, and has no end
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
    assert Web.asked == 1  # it has said what it thinks
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
