"""Whatever a server sends, a fetch gives bytes within the limit, or an ImageFetchError in words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import HANGS, examples
from vlmforge.errors import ImageFetchError
from vlmforge.vl.fetch import fetch_bytes
from vlmforge.vl.image_limits import ImageLimits

LIMITS = ImageLimits(max_bytes=1000, timeout_s=HANGS, max_redirects=2)
OK = b"HTTP/1.1 200 OK\r\n"


class Scripted:
    """Answers every connection with `answer`, and hangs up."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.base = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            peer, _ = self._socket.accept()
            with peer:
                if not self.answer:
                    return
                try:
                    peer.recv(1 << 17)
                    peer.sendall(self.answer)
                except OSError:
                    continue  # the client had enough

    def close(self) -> None:
        self.answer = b""
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only numbers resolve: what a hostile redirect names is looked up nowhere."""
    numeric = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: int) -> object:
        return numeric(host, port, flags=socket.AI_NUMERICHOST, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    connect = socket.socket.connect

    def only_here(sock: socket.socket, address: tuple[str, int]) -> None:
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError(111, "Connection refused")
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


def fetched(server: Scripted, answer: bytes) -> bytes | ImageFetchError:
    server.answer = answer
    try:
        body = fetch_bytes(f"{server.base}/a.png", limits=LIMITS, allow_private=True)
    except ImageFetchError as error:
        text = str(error)
        assert error.found and error.expected and error.fix
        assert len(text) < 1500
        assert text.replace("\n", "").isprintable()
        return error
    assert len(body) <= LIMITS.max_bytes
    return body


LOCATIONS = (
    *(b"http://[/x", b"http://[::1", b"//", b"///", b"//[", b"http://", b"http:", b":", b"?", b"#"),
    *(b"http://user:secret@a/", b"//@a/", b"ftp://a/", b"file:///etc/passwd", b"javascript:1"),
    *(b"data:image/png;base64,AA==", b"gopher://127.0.0.1:25/", b"//a..b/", b"//.a/", b"//./"),
    *(b"http://127.0.0.1:99999/", b"http://127.0.0.1:-1/", b"http://127.0.0.1:x/", b"//a:b:c/"),
    *(b"//xn--/", b"//xn--a/", b"//xn--\xff/", b"//\xc3\xa9/", "//bücher/".encode(), b"//\xad/"),
    *(b"//[::ffff:127.0.0.1%25lo]/", b"//[v1.x]/", b"//[1:2:3:4:5:6:7:8:9]/", b"//0x7f.1/"),
    *(b"a" * 5000, b"//" + b"a" * 300 + b"/", b"//" + b"a." * 4000 + b"/", b"/\x00", b"//a\x00b/"),
    *(
        b"/\x1b[2J",
        b"/\x7f",
        b"/%",
        b"/%zz",
        b"/\r",
        b"\\\\a\\b",
        b"/..//../..",
        b"/ /\t/",
        b"\x85",
    ),
    *(b"http://127.0.0.1\\@a/", b"//127.0.0.1#@a/", b"//a;b/", b"//a%00b/", b"//%31%32%37.0.0.1/"),
)
CHUNK_SIZES = (
    *(b"-5", b"-1", b"-0", b"+5", b"0x5", b"5_0", b"", b" ", b"z", b"f" * 17, b"7" * 9000),
    *(
        b"5;a=b",
        b"5;",
        b";",
        b"5 ;x",
        b"\xb2",
        b"\xd9\xa5",
        b"00000005",
        b"5\r",
        b"fffffffffffffff",
    ),
)
LENGTHS = (b"-1", b"5", b"500", b"1001", b"9" * 5000, b"5, 5", b"5, 6", b"0x5", b"", b"+5", b"5.0")
STATUS_LINES = (
    *(OK, b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200\r\n", b"HTTP/1.1 302 Found\r\n", b"\r\n", b"\n"),
    *(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"HTTP/1.1 101 Switching\r\n", b"HTTP/0.9 200 OK\r\n"),
    *(b"HTTP/2 200\r\n", b"HTTP/9.9 200 OK\r\n", b"HTTP/1.1 +200 OK\r\n", b"HTTP/1.1 2_00 x\r\n"),
    *(b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 206 Partial\r\n", b"HTTP/1.1 304 x\r\n"),
    *(b"HTTP/1.1 999 \x1b]0;x\x07\r\n", b"HTTP/1.1 -1 x\r\n", b"HTTP/1.1 \xd9\xa2\xd9\xa0 x\r\n"),
    *(b"HTTP/1.1 200 " + b"x" * 70000 + b"\r\n", b"SSH-2.0\r\n", b"ICY 200 OK\r\n", b"<html>\r\n"),
)
HEADERS = (
    *(
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Content-Encoding: gzip",
    ),
    *(b"Transfer-Encoding: CHUNKED", b"Connection: keep-alive", b"Keep-Alive: 5", b"no colon"),
    *(
        b": empty",
        b" folded",
        b"\tfolded",
        b"A: \x00",
        b"A: \xff\xfe",
        b"A:" + b"b" * 66000,
        b"\x00",
    ),
    *(
        b"From ",
        b"Content-Type: multipart/x; boundary=a",
        b"Content-Type: message/rfc822",
        b"A: =?x",
    ),
)
BYTES = st.binary(max_size=40)
HEADER_LINES = st.one_of(
    st.sampled_from(HEADERS),
    BYTES,
    st.sampled_from(LENGTHS).map(lambda value: b"Content-Length: " + value),
    (st.sampled_from(LOCATIONS) | BYTES).map(lambda value: b"Location: " + value),
)
CHUNKS = st.tuples(
    st.sampled_from(CHUNK_SIZES) | st.sampled_from([b"5", b"0", b"3e8"]),
    st.sampled_from([b"12345", b"", b"123", b"x" * 1000]),
    st.sampled_from([b"\r\n", b"", b"\n"]),
).map(lambda part: part[0] + b"\r\n" + part[1] + part[2])
ANSWERS = st.builds(
    lambda status, headers, body, cut: (
        status + b"".join(line + b"\r\n" for line in headers) + b"\r\n" + body
    )[: cut or None],
    st.sampled_from(STATUS_LINES) | BYTES,
    st.lists(HEADER_LINES, max_size=4),
    BYTES | st.lists(CHUNKS, max_size=4).map(b"".join) | st.just(b"x" * 5000),
    st.integers(-60, 0),
)
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@settings(
    max_examples=examples(300),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(ANSWERS.filter(bool) | st.binary(min_size=1))
@example(b"HTTP/1.1 302 x\r\nLocation: http://[/x\r\n\r\n")
@example(CHUNKED + b"-5\r\nxxxx")
@example(OK + b"A: b\r\n" * 200 + b"\r\n")
@example(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
def test_any_answer_gives_bytes_or_a_typed_error(server: Scripted, answer: bytes) -> None:
    fetched(server, answer)


@pytest.mark.parametrize("location", LOCATIONS, ids=lambda text: ascii(text[:20]))
def test_no_redirect_raises_untyped(server: Scripted, location: bytes) -> None:
    answer = fetched(server, b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
    assert isinstance(answer, ImageFetchError)
    assert "secret" not in str(answer)


@pytest.mark.parametrize("size", CHUNK_SIZES, ids=lambda text: ascii(text[:20]))
def test_no_size_of_a_chunk_raises_untyped(server: Scripted, size: bytes) -> None:
    fetched(server, CHUNKED + size + b"\r\n12345\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (CHUNKED + b"-1\r\n", b"x"),
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"Trailer: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["a chunk of length -1", "trailers", "informational answers"],
)
def test_what_http_does_not_count_is_bounded_too(
    server: Scripted, beginning: bytes, more: bytes
) -> None:
    answer = fetched(server, beginning + more * (2_000_000 // len(more)))
    assert isinstance(answer, ImageFetchError)
    assert answer.found == f"OSError: the answer does not end within {2 * 1000 + (1 << 20)} bytes"


def test_the_coding_that_a_server_names_does_not_matter(server: Scripted) -> None:
    """Stores label what they hold by how it came to them; the bytes tell what they are."""
    body = OK + b"Content-Encoding: aws-chunked\r\nContent-Length: 5\r\n\r\n12345"
    assert fetched(server, body) == b"12345"
    assert fetched(server, CHUNKED + b"5;a=b\r\n12345\r\n0\r\n\r\n") == b"12345"


@pytest.mark.parametrize(
    "url", ["http://a\ud800.example/", "http://a/\ud800", "http://a.example/" + "b" * 10**6]
)
def test_what_a_user_passes_is_shown_cut_and_whole_characters(url: str) -> None:
    with pytest.raises(ImageFetchError) as caught:
        fetch_bytes(url, limits=LIMITS, allow_private=True)
    assert len(str(caught.value)) < 1500
    str(caught.value).encode()
