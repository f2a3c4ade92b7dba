"""Images from the web: one bounded GET that cannot be steered to a private address.

The name of each hop is resolved once, all its addresses are checked, and exactly those are
dialled, so that a second answer of the name server has no say. Proxies are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from vlmforge.errors import ImageFetchError
from vlmforge.image_limits import ImageLimits

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16
_URL_CHARACTERS = "%/:=&?~+!$,;'@()*[]"
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PORTS = {"http": 80, "https": 443}

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, 2.5.5.1


@dataclass(frozen=True, slots=True)
class _Target:
    """A checked URL. `resource` is path and query, percent-encoded; `host` is ASCII."""

    url: str
    scheme: str
    host: str
    port: int
    resource: str


@dataclass(frozen=True, slots=True)
class _Address:
    """One answer of the resolver: `sockaddr` goes to `socket.connect` as it is."""

    family: int
    sockaddr: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Deadline:
    """The monotonic time at which a fetch must be over."""

    at: float

    def left(self) -> float:
        """Seconds left (TimeoutError when there are none)."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


def fetch_bytes(url: str, *, limits: ImageLimits, allow_private: bool) -> bytes:
    """GET an http or https URL.

    Args:
        url: The address; redirects are followed and checked like it.
        limits: `max_bytes`, `max_redirects` and `timeout_s`, which covers the whole fetch except
            name resolution: that ends when the system's resolver gives up.
        allow_private: Whether addresses outside the public internet may be dialled.

    Raises:
        ImageFetchError: the URL is malformed or leads to a private address, the server cannot be
            reached or verified, it answers with a status other than 200, or a limit is passed.
    """
    deadline = _Deadline(time.monotonic() + limits.timeout_s)
    next_url = url
    for _ in range(limits.max_redirects + 1):
        answer = _get(_target(next_url), deadline, limits, allow_private)
        if isinstance(answer, bytes):
            return answer
        next_url = answer
    raise ImageFetchError(
        f"The image at {shown_url(url)} is redirected too often.",
        found=f"a redirect to {shown_url(next_url)}",
        expected=f"at most {limits.max_redirects} redirects",
        fix="use the address at which the redirects end",
    )


def shown_url(url: str) -> str:
    """`url` without what may be secret: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a malformed URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address embedded in it, is of the public internet."""
    ip: _IPAddress = ipaddress.ip_address(address.partition("%")[0])
    embedded = _embedded(ip) if isinstance(ip, ipaddress.IPv6Address) else ()
    return all(_is_public_alone(one) for one in embedded or (ip,))


def _is_public_alone(ip: _IPAddress) -> bool:
    return ip.is_global and not (
        ip.is_private
        or ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_reserved
        or ip.is_unspecified
    )


def _embedded(ip: ipaddress.IPv6Address) -> Sequence[ipaddress.IPv4Address]:
    """IPv4 addresses at which a packet to `ip` may arrive."""
    if ip.ipv4_mapped is not None:
        return (ip.ipv4_mapped,)
    if ip.sixtofour is not None:
        return (ip.sixtofour,)
    if ip.teredo is not None:
        return ip.teredo
    if ip in _NAT64 or ip in _IPV4_COMPATIBLE:
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    return ()


def _target(url: str) -> _Target:
    """Parse and check one hop's URL."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:  # UnicodeError of the host name included
        raise _bad_url(url, "a malformed address") from error
    if parts.scheme not in _PORTS:
        raise _bad_url(url, f"the scheme {parts.scheme!r}")
    if "@" in parts.netloc:
        raise _bad_url(url, "a user name or password in the address")
    if not _HOST.fullmatch(host):
        raise _bad_url(url, f"the host name {host!r}")
    query = f"?{parts.query}" if parts.query else ""
    resource = quote((parts.path or "/") + query, safe=_URL_CHARACTERS)
    return _Target(url, parts.scheme, host, port, resource)


def _bad_url(url: str, found: str) -> ImageFetchError:
    return ImageFetchError(
        f"The image at {shown_url(url)} cannot be fetched: its URL is not allowed.",
        found=found,
        expected="http://host/path or https://host/path",
        fix="correct the URL, or download the image and pass its path",
    )


def _get(
    target: _Target, deadline: _Deadline, limits: ImageLimits, allow_private: bool
) -> bytes | str:
    """The body; or the URL of a redirect."""
    try:
        addresses = _resolve(target, allow_private)
        with contextlib.closing(_connect(target, addresses, deadline)) as sock:
            response = _request(target, sock, deadline)
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return urljoin(target.url, location)
            _check_status(target, response)
            return _read_body(target, response, limits)
    except TimeoutError as error:
        raise _failed(target, f"no whole answer within {limits.timeout_s} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _failed(target, f"{type(error).__name__}: {error}") from error


def _resolve(target: _Target, allow_private: bool) -> list[_Address]:
    """Resolve the host, once; refuse it whole when any of its addresses is not public."""
    answers = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    for *_, sockaddr in answers:
        if not allow_private and not is_public(str(sockaddr[0])):
            raise ImageFetchError(
                f"The image at {shown_url(target.url)} is at a private address.",
                found=f"{target.host} resolves to {sockaddr[0]}",
                expected="only public addresses",
                fix="set VLMFORGE_ALLOW_PRIVATE_URLS=1 if every user of this process may read "
                "from its private network",
            )
    return [_Address(family, sockaddr) for family, *_, sockaddr in answers]


def _connect(target: _Target, addresses: Sequence[_Address], deadline: _Deadline) -> socket.socket:
    sock = _dial(addresses, deadline)
    if target.scheme == "http":
        return sock
    try:
        sock.settimeout(deadline.left())
        context = ssl.create_default_context()
        return context.wrap_socket(sock, server_hostname=target.host)
    except BaseException:
        sock.close()
        raise


def _dial(addresses: Sequence[_Address], deadline: _Deadline) -> socket.socket:
    """Connect to the first address that answers."""
    failure = OSError("the name has no address")
    for address in addresses:
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.left())
            sock.connect(address.sockaddr)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


class _TimedReader(io.RawIOBase):
    """Reads of a socket that all end by one deadline, however slowly the bytes drip in."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._sock.settimeout(self._deadline.left())
        return self._sock.recv_into(buffer)


class _TimedSocket:
    """What http.client uses of a socket, under one deadline. Its owner closes the socket."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        pass


def _request(target: _Target, sock: socket.socket, deadline: _Deadline) -> http.client.HTTPResponse:
    """Send the request on a connected socket; http.client itself never dials."""
    kind = http.client.HTTPConnection if target.scheme == "http" else http.client.HTTPSConnection
    connection = kind(target.host, target.port)
    connection.auto_open = 0
    connection.sock = cast("socket.socket", _TimedSocket(sock, deadline))
    headers = {
        "User-Agent": f"vlmforge/{version('vlmforge')}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    connection.request("GET", target.resource, headers=headers)
    return connection.getresponse()


def _check_status(target: _Target, response: http.client.HTTPResponse) -> None:
    if response.status != 200:
        raise ImageFetchError(
            f"The server refused the image at {shown_url(target.url)}.",
            found=f"HTTP status {response.status} {response.reason}".rstrip(),
            expected="HTTP status 200",
            fix="check that the address opens without a login",
        )


def _read_body(target: _Target, response: http.client.HTTPResponse, limits: ImageLimits) -> bytes:
    declared = response.length
    if declared is not None and declared > limits.max_bytes:
        raise _too_large(target, f"Content-Length {declared}", limits)
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > limits.max_bytes:
            raise _too_large(target, f"more than {limits.max_bytes} bytes", limits)
    if declared is not None and len(body) != declared:
        raise _failed(target, f"{len(body)} bytes of a Content-Length of {declared}")
    return bytes(body)


def _too_large(target: _Target, found: str, limits: ImageLimits) -> ImageFetchError:
    return ImageFetchError(
        f"The image at {shown_url(target.url)} is too large.",
        found=found,
        expected=f"at most {limits.max_bytes} bytes",
        fix="link to a smaller image",
    )


def _failed(target: _Target, found: str) -> ImageFetchError:
    return ImageFetchError(
        f"The image at {shown_url(target.url)} could not be fetched.",
        found=found,
        expected="an answer of the server with the whole image",
        fix="check the address and the network, or download the image and pass its path",
    )
