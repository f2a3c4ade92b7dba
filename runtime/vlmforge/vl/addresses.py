"""Which IP addresses are of the public internet, and names to addresses in bounded time.

The tables follow IANA's special-purpose address registries (RFC 6890 and its successors) and refuse
more than what these call unreachable: deprecated, unassigned and anycast addresses are no place of
an image either. `ipaddress` is not asked, since its answers differ between Python versions.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from msgspec import Struct

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24"),
            *("192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")  # all else is special or unassigned (RFC 4291, 2.4)
_NOT_PUBLIC_6 = tuple(
    map(
        ipaddress.IPv6Network,
        ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20"),
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, 2.5.5.1

_MOST_LOOKUPS = 16


class Address(Struct, frozen=True):
    """One answer of the resolver: `sockaddr` goes to `socket.connect` as it is."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def ip(self) -> str:
        """The IP address as text, with an IPv6 zone if it has one."""
        return str(self.sockaddr[0])


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address embedded in it, is of the public internet.

    ValueError: `address` is no IP address.
    """
    ip: _IPAddress = ipaddress.ip_address(address.partition("%")[0])
    embedded = _embedded(ip) if isinstance(ip, ipaddress.IPv6Address) else ()
    return all(_is_public_alone(one) for one in embedded or (ip,))


def _is_public_alone(ip: _IPAddress) -> bool:
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC_4)
    return ip in _UNICAST_6 and not any(ip in network for network in _NOT_PUBLIC_6)


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


class _Lookups:
    """The right to run one of a few look-ups at once; a child process starts with all of them."""

    def __init__(self) -> None:
        self.refill()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.refill)

    def refill(self) -> None:
        """Forget the look-ups of threads that a fork has left behind."""
        self.free = threading.BoundedSemaphore(_MOST_LOOKUPS)


_LOOKUPS = _Lookups()


def resolve(host: str, port: int, timeout_s: float) -> list[Address]:
    """All addresses of a host.

    The system's resolver cannot be interrupted: it runs in a thread that is left behind when the
    time is over. At most 16 such threads are alive at once; more callers wait for their turn.

    Raises:
        TimeoutError: no answer, and no turn, within `timeout_s` seconds.
        OSError, ValueError: the resolver refuses the name, or knows no address.
    """
    answer: Future[list[Address]] = Future()
    free = _LOOKUPS.free
    if not free.acquire(timeout=timeout_s):
        raise TimeoutError("timed out")

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([Address(family, sockaddr) for family, *_, sockaddr in found])
        except BaseException as error:  # noqa: BLE001 - it belongs to the one who asked
            answer.set_exception(error)
        finally:
            free.release()

    try:
        threading.Thread(target=look_up, name="vlmforge-resolver", daemon=True).start()
    except RuntimeError as error:
        free.release()
        raise OSError(f"no thread for the resolver: {error}") from error
    return answer.result(timeout_s)
