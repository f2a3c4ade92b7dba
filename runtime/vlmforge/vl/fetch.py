"""Images from the web: one bounded GET that cannot be steered to a private address.

The name of each hop is resolved once, all its addresses are checked, and exactly those are
dialled, so that a second answer of the name server has no say. Proxies are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from msgspec import Struct

from vlmforge.errors import ImageFetchError
from vlmforge.vl.addresses import Address, is_public, resolve
from vlmforge.vl.image_limits import ImageLimits

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16
_URL_CHARACTERS = "%/:=&?~+!$,;'@()*[]"
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PORTS = {"http": 80, "https": 443}

_SHOWN = 200
# A body may come in small chunks, each with its length; all that is more is not a body.
_OVERHEAD = 1 << 20


class _Target(Struct, frozen=True):
    """A checked URL. `resource` is path and query, percent-encoded; `host` is ASCII."""

    url: str
    scheme: str
    host: str
    port: int
    resource: str


class _Deadline(Struct, frozen=True):
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
        limits: `max_bytes`, `max_redirects` and `timeout_s`, which covers the whole fetch.
        allow_private: Whether addresses outside the public internet may be dialled.

    Raises:
        ImageFetchError: the URL is malformed or leads to a private address, the server cannot be
            reached or verified, it answers with a status other than 200, or a limit is passed.
    """
    deadline = _Deadline(time.monotonic() + limits.timeout_s)
    next_url = url
    for _ in range(limits.max_redirects + 1):
        target = _target(next_url)
        _check_domain(target, limits.media_domains)
        answer = _get(target, deadline, limits, allow_private)
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
    """`url`, cut, without what may be secret: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a malformed URL"
    return _shown(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _shown(text: str) -> str:
    """What a stranger wrote, on one line of an error: cut, and nothing that moves a cursor."""
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return "".join(letter if letter.isprintable() else "?" for letter in cut)


def _target(url: str) -> _Target:
    """Parse and check one hop's URL."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or _PORTS.get(parts.scheme, 0)
        query = f"?{parts.query}" if parts.query else ""
        resource = quote((parts.path or "/") + query, safe=_URL_CHARACTERS)
    except ValueError as error:  # UnicodeError included: of the host name, or lone surrogates
        raise _bad_url(url, "a malformed address") from error
    if parts.scheme not in _PORTS:
        raise _bad_url(url, f"the scheme {_shown(parts.scheme)!r}")
    if "@" in parts.netloc:
        raise _bad_url(url, "a user name or password in the address")
    if not _HOST.fullmatch(host):
        raise _bad_url(url, f"the host name {_shown(host)!r}")
    return _Target(url, parts.scheme, host, port, resource)


def _check_domain(target: _Target, domains: Sequence[str] | None) -> None:
    if domains is None:
        return
    host = target.host.lower().rstrip(".")
    for domain in (name.lower() for name in domains):
        if host == domain or (domain.startswith(".") and host.endswith(domain)):
            return
    raise ImageFetchError(
        f"The image at {shown_url(target.url)} is not at an allowed address.",
        found=f"the host {_shown(host)}",
        expected=" or ".join(domains) or "no address at all",
        fix="send the image as a data URL, or allow the host "
        "(VisionConfig.media_domains; vlmforge serve --allowed-media-domains)",
    )


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
        addresses = _addresses(target, deadline, allow_private)
        with contextlib.closing(_connect(target, addresses, deadline)) as sock:
            wire = _TimedSocket(sock, deadline, 2 * limits.max_bytes + _OVERHEAD)
            response = _request(target, wire)
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return urljoin(target.url, location)
            _check_status(target, response)
            return _read_body(target, response, limits)
    except ImageFetchError:  # a ValueError too
        raise
    except TimeoutError as error:
        raise _failed(target, f"no whole answer within {limits.timeout_s} s") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        # ValueError: what urljoin, ssl and the parser of chunks make of nonsense.
        raise _failed(target, _shown(f"{type(error).__name__}: {error}")) from error


def _addresses(target: _Target, deadline: _Deadline, allow_private: bool) -> list[Address]:
    """Resolve the host, once; refuse it whole when any of its addresses is not public."""
    addresses = resolve(target.host, target.port, deadline.left())
    for address in addresses:
        if not allow_private and not is_public(address.ip):
            raise ImageFetchError(
                f"The image at {shown_url(target.url)} is at a private address.",
                found=f"{_shown(target.host)} resolves to {address.ip}",
                expected="only public addresses",
                fix="set VLMFORGE_ALLOW_PRIVATE_URLS=1 if every user of this process may read "
                "from its private network",
            )
    return addresses


def _connect(target: _Target, addresses: Sequence[Address], deadline: _Deadline) -> socket.socket:
    sock = _dial(addresses, deadline)
    if target.scheme == "http":
        return sock
    try:
        sock.settimeout(deadline.left())
        context = ssl.create_default_context()
        # A dot at the end makes a name absolute for the resolver; certificates have none.
        return context.wrap_socket(sock, server_hostname=target.host.removesuffix("."))
    except BaseException:
        sock.close()
        raise


def _dial(addresses: Sequence[Address], deadline: _Deadline) -> socket.socket:
    """Connect to the first address that answers."""
    failure = OSError("the name has no address")
    for address in addresses:
        try:
            return _dial_one(address, deadline)
        except OSError as error:
            failure = error
    raise failure


def _dial_one(address: Address, deadline: _Deadline) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left())
        sock.connect(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


class _TimedReader(io.RawIOBase):
    """Reads of a socket that end by one deadline, however slowly or endlessly the bytes come."""

    def __init__(self, sock: socket.socket, deadline: _Deadline, most: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._left = self._most = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._sock.settimeout(self._deadline.left())
        count = self._sock.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError(f"the answer does not end within {self._most} bytes")
        return count


class _TimedSocket:
    """What http.client uses of a socket, under one deadline. Its owner closes the socket.

    At most `most` bytes are read: http.client itself has no limit for informational answers,
    trailers and a chunk of length -1.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline, most: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._most = most

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._deadline, self._most))

    def close(self) -> None:
        pass


def _request(target: _Target, wire: _TimedSocket) -> http.client.HTTPResponse:
    """Send the request on a connected socket; http.client itself never dials."""
    kind = http.client.HTTPConnection if target.scheme == "http" else http.client.HTTPSConnection
    connection = kind(target.host, target.port)
    connection.auto_open = 0
    connection.sock = cast("socket.socket", wire)
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
            found=_shown(f"HTTP status {response.status} {response.reason}".rstrip()),
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
