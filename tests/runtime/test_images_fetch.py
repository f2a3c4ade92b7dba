"""Fetching against local servers; names resolve to what each test says, never to the internet."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import HANGS
from image_server import PIXELS, Network, Server, png
from vlmforge.errors import ImageError, ImageFetchError
from vlmforge.vl import load_image
from vlmforge.vl.addresses import is_public
from vlmforge.vl.fetch import fetch_bytes, shown_url
from vlmforge.vl.image_limits import ImageLimits

PUBLIC = "93.184.216.34"
PATIENT = ImageLimits(timeout_s=HANGS)
OTHER_PUBLIC = "2606:2800:220:1:248:1893:25c8:1946"

# A key pair of these tests only: self-signed for images.example, valid until 2120.
KEY_AND_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgu1TcO18lKVeYx3w/
CqDAT2PSzguCxrJxGAQGO36ojpuhRANCAAQdb8Rq/f4rJIPaTbEI/5y4MpRSooA0
Fu53QzEZ1aWgKs99S/55TlFK1o/kztHeviXlriQs49mWy0zC65+L/MuL
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkTCCATegAwIBAgIBATAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA5pbWFnZXMu
ZXhhbXBsZTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowGTEXMBUG
A1UEAwwOaW1hZ2VzLmV4YW1wbGUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQd
b8Rq/f4rJIPaTbEI/5y4MpRSooA0Fu53QzEZ1aWgKs99S/55TlFK1o/kztHeviXl
riQs49mWy0zC65+L/MuLo24wbDAPBgNVHRMBAf8EBTADAQH/MBkGA1UdEQQSMBCC
DmltYWdlcy5leGFtcGxlMB0GA1UdDgQWBBRAeVkoPua+oOsHhm+zhONLuddKvzAf
BgNVHSMEGDAWgBRAeVkoPua+oOsHhm+zhONLuddKvzAKBggqhkjOPQQDAgNIADBF
AiADBsOAxgMvHIFVh4L0kmrHhv5GZSFhQYOPmy678rCf8AIhAPEcXrWaU5tcJHJn
M5SlcYfqQjxiryQgTGnyvhdCxrgf
-----END CERTIFICATE-----
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def base(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, server: Server) -> Network:
    network = Network(monkeypatch, server)
    network.names["images.example"] = [PUBLIC]
    return network


def local(url: str, **limits: float) -> bytes:
    return fetch_bytes(url, limits=structs.replace(PATIENT, **limits), allow_private=True)


def public(url: str) -> bytes:
    return fetch_bytes(url, limits=PATIENT, allow_private=False)


def refusal(fetch: Callable[..., bytes], url: str, **limits: float) -> str:
    with pytest.raises(ImageFetchError) as caught:
        fetch(url, **limits)
    assert caught.value.found and caught.value.expected and caught.value.fix
    assert shown_url(url) in caught.value.summary
    return str(caught.value)


@pytest.mark.parametrize("route", ["image", "chunked", "until-close"])
def test_the_body_is_returned(base: str, route: str) -> None:
    assert local(f"{base}/{route}") == png()


def test_the_request(base: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    local(f"{base}/image?a=1&b=%20 é#fragment")
    path, headers = server.seen[0]
    assert path == "/image?a=1&b=%20%20%C3%A9"
    assert headers["User-Agent"].startswith("vlmforge/")
    assert headers["Accept"] == "image/*"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == base.removeprefix("http://")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(base: str, status: int) -> None:
    assert local(f"{base}/to/{status}//image") == png()
    assert local(f"{base}/to/{status}/{base}/image") == png()


def test_too_many_redirects(base: str, server: Server) -> None:
    text = refusal(local, f"{base}/loop", max_redirects=3)
    assert "at most 3 redirects" in text
    assert len(server.seen) == 4
    assert local(f"{base}/to/302//image", max_redirects=1) == png()
    refusal(local, f"{base}/to/302//image", max_redirects=0)


@pytest.mark.parametrize(
    ("route", "limits", "words"),
    [
        ("nothing-here", {}, "HTTP status 404 Not Found"),
        ("no-location", {}, "HTTP status 302"),
        ("declared-large", {}, "Content-Length 123456789"),
        ("endless", {"max_bytes": 5000}, "more than 5000 bytes"),
        ("image", {"max_bytes": 50}, "at most 50 bytes"),
        ("short", {}, "7 bytes of a Content-Length of 500"),
        ("drip", {"timeout_s": 0.2}, "no whole answer within 0.2 s"),
        ("drip-headers", {"timeout_s": 0.2}, "no whole answer within 0.2 s"),
        ("silence", {"timeout_s": 0.2}, "no whole answer within 0.2 s"),
        ("garbage", {}, "BadStatusLine"),
        ("to/302/file:///etc/passwd", {}, "the scheme 'file'"),
    ],
)
def test_answers_that_are_refused(
    base: str, route: str, limits: dict[str, float], words: str
) -> None:
    with pytest.raises(ImageFetchError) as caught:
        local(f"{base}/{route}", **limits)
    assert words in str(caught.value)
    assert caught.value.expected and caught.value.fix


def test_a_body_of_exactly_the_limit(base: str) -> None:
    assert local(f"{base}/image", max_bytes=len(png())) == png()
    assert local(f"{base}/chunked", max_bytes=len(png())) == png()


def test_a_closed_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/a.png"
        assert "ConnectionRefusedError" in refusal(local, url)


def test_an_unknown_name(network: Network) -> None:
    assert "Name or service not known" in refusal(public, "http://nowhere.example/a.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://images.example/a.png", "the scheme 'ftp'"),
        ("file:///etc/passwd", "the scheme 'file'"),
        ("http:///a.png", "the host name ''"),
        ("http://images.example:99999/a.png", "malformed"),
        ("http://a..b/a.png", "malformed"),
        ("http://a\0b/a.png", "the host name"),
        ("http://images.example\\@evil.example/a.png", "user name"),
        ("http://us er/a.png", "the host name"),
        ("http://[::1/a.png", "malformed"),
    ],
)
def test_urls_that_are_refused(url: str, words: str, network: Network) -> None:
    assert words in refusal(public, url)
    assert network.resolved == []


def test_secrets_of_a_url_are_not_shown(network: Network) -> None:
    text = refusal(public, "http://me:hunter2@images.example:81/a.png?token=hunter3#hunter4")
    assert "hunter" not in text
    assert "http://images.example:81/a.png" in text


NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "224.0.1.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12:3456::1",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "64:ff9b:1::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "::10.0.0.1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2001:0:7f00:1:0:0:f7f7:f7f7",
    "2001:0:808:808:0:0:80ff:fffe",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_private_addresses_are_refused(address: str, network: Network) -> None:
    assert not is_public(address)
    network.names["images.example"] = [PUBLIC, address]
    text = refusal(public, "http://images.example/image")
    assert f"images.example resolves to {address}" in text
    assert "set VLMFORGE_ALLOW_PRIVATE_URLS=1" in text
    assert network.dialled == []


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "8.8.8.8", OTHER_PUBLIC, "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"],
)
def test_public_addresses_are_dialled(address: str, network: Network) -> None:
    assert is_public(address)
    network.names["images.example"] = [address]
    assert public("http://images.example/image") == png()
    assert network.dialled == [(address, 80)]


@pytest.mark.parametrize("private", ["10.0.0.5", "169.254.169.254", "::1"])
def test_a_redirect_to_a_private_address(private: str, network: Network, server: Server) -> None:
    network.names["intranet.example"] = [private]
    with pytest.raises(ImageFetchError, match=f"intranet.example resolves to {private}"):
        public("http://images.example/to/302/http://intranet.example:8080/image")
    assert network.dialled == [(PUBLIC, 80)]
    assert len(server.seen) == 1


def test_each_name_is_resolved_once_and_that_address_is_dialled(
    network: Network, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    def rebinding(host: str, port: int, **options: int) -> list[tuple[object, ...]]:
        network.names[host] = next(answers)
        return network.getaddrinfo(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert public("http://images.example:8000/image") == png()
    assert network.resolved == ["images.example"]
    assert network.dialled == [(PUBLIC, 8000)]
    assert server.seen[0][1]["Host"] == "images.example:8000"


def test_the_next_address_is_tried(network: Network) -> None:
    network.names["images.example"] = [PUBLIC, "8.8.8.8"]
    network.unreachable = {PUBLIC}
    assert public("http://images.example/image") == png()
    assert network.dialled == [(PUBLIC, 80), ("8.8.8.8", 80)]
    network.unreachable = {PUBLIC, "8.8.8.8"}
    assert "Connection refused" in refusal(public, "http://images.example/image")


def test_international_names_and_default_ports(network: Network, server: Server) -> None:
    network.names["xn--bcher-kva.example"] = [PUBLIC]
    assert public("http://Bücher.example/image") == png()
    assert server.seen[0][1]["Host"] == "xn--bcher-kva.example"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "images.example.pem"
    path.write_text(KEY_AND_CERTIFICATE)
    return path


@pytest.fixture
def server_names(server: Server, certificate: Path) -> list[str | None]:
    """Names that TLS clients of the server ask for."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return names


def test_https_verifies_the_name_at_the_pinned_address(
    network: Network,
    server: Server,
    server_names: list[str | None],
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert public("https://images.example/image") == png()
    assert network.dialled == [(PUBLIC, 443)]
    assert server_names == ["images.example"]
    assert server.seen[0][1]["Host"] == "images.example"

    network.names["other.example"] = [PUBLIC]
    assert "certificate" in refusal(public, "https://other.example/image")
    assert len(server.seen) == 1


def test_https_refuses_an_unknown_authority(
    network: Network, server: Server, server_names: list[str | None]
) -> None:
    assert "SSLCertVerificationError" in refusal(public, "https://images.example/image")
    assert server.seen == []


def test_load_image_fetches(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMFORGE_ALLOW_PRIVATE_URLS", raising=False)
    with pytest.raises(ImageFetchError, match="set VLMFORGE_ALLOW_PRIVATE_URLS=1"):
        load_image(f"{base}/image")
    monkeypatch.setenv("VLMFORGE_ALLOW_PRIVATE_URLS", "1")
    np.testing.assert_array_equal(np.asarray(load_image(f"{base}/image?secret")), PIXELS)
    with pytest.raises(ImageError, match="not an image that can be read") as caught:
        load_image(f"{base}/text?secret")
    assert f"The image at {base}/text is" in str(caught.value)
