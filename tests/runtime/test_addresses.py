"""Addresses against IANA's registries, copied here; names resolved in bounded time."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import HANGS, wait_until
from vlmforge.errors import ImageFetchError
from vlmforge.vl.addresses import is_public, resolve
from vlmforge.vl.fetch import fetch_bytes
from vlmforge.vl.image_limits import ImageLimits

# IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890, 8190 and later), column "Globally
# Reachable" false or not applicable. Multicast (RFC 5771, 4291) and site-local (RFC 3879) are in
# registries of their own.
NOT_REACHABLE = [
    *("0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10"),
    *("127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.170/32"),
    *("192.0.0.171/32", "192.0.2.0/24"),
    *("192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24"),
    *("240.0.0.0/4", "255.255.255.255/32", "224.0.0.0/4"),
    *("::1/128", "::/128", "64:ff9b:1::/48", "100::/64"),
    *("100:0:0:1::/64", "2001:2::/48", "2001:db8::/32", "2001:10::/28"),
    *("3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10"),
    *("fec0::/10", "ff00::/8"),
]
# Reachable by these registries, but the nearest router's, not a server's (PCP, TURN, AS112, AMT,
# DNS-SD), or no address of a host at all (ORCHIDv2, drone remote ids): refused too.
NO_SERVERS = [
    *("192.0.0.9/32", "192.0.0.10/32", "192.31.196.0/24", "192.52.193.0/24"),
    "192.175.48.0/24",
    *("2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:3::/32"),
    *("2001:4:112::/48", "2001:20::/28", "2001:30::/28"),
    "2620:4f:8000::/48",
]
REFUSED = [ipaddress.ip_network(text) for text in (*NOT_REACHABLE, *NO_SERVERS)]
# In these an IPv4 address is embedded, or all of it is unassigned.
SPECIAL_6 = [
    ipaddress.ip_network(text) for text in ("::/16", "64:ff9b::/96", "2001::/23", "2002::/16")
]
UNICAST_6 = ipaddress.ip_network("2000::/3")


@pytest.mark.parametrize("network", REFUSED, ids=str)
def test_no_address_of_the_registries_is_public(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> None:
    middle = network[network.num_addresses // 2]
    for address in (network[0], middle, network[-1]):
        assert not is_public(str(address))
        if isinstance(address, ipaddress.IPv4Address):
            number = int(address)
            for prefix in ("::ffff:0:0", "::", "64:ff9b::"):
                assert not is_public(str(ipaddress.IPv6Address(prefix) + number))
            high, low = divmod(number, 1 << 16)
            assert not is_public(f"2002:{high:x}:{low:x}::1")


@given(st.ip_addresses(v=4))
def test_every_other_ipv4_address_is_public(address: ipaddress.IPv4Address) -> None:
    refused = any(address in network for network in REFUSED)
    assert is_public(str(address)) is not refused


@given(st.ip_addresses(v=6, network="2000::/3") | st.ip_addresses(v=6))
def test_every_other_ipv6_unicast_address_is_public(address: ipaddress.IPv6Address) -> None:
    assume(not any(address in network for network in SPECIAL_6))
    refused = address not in UNICAST_6 or any(address in network for network in REFUSED)
    assert is_public(str(address)) is not refused


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0177.0.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001"),
        *("127.0.0.1.", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0::1%25lo]"),
        *("①②⑦.0.0.1", "127。0。0。1", "１２７.0.0.1", "localhost", "LOCALHOST."),
    ],
)
def test_the_own_machine_is_refused_however_it_is_spelled(host: str) -> None:
    """Or the name is unknown; it is never dialled. The system's own resolver reads it."""
    with pytest.raises(ImageFetchError) as caught:
        fetch_bytes(f"http://{host}:9/a.png", limits=ImageLimits(), allow_private=False)
    assert "Refused" not in caught.value.found
    assert "resolves to" in caught.value.found or caught.value.found.startswith(
        ("gaierror", "a malformed address", "the host name")
    )


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A resolver that does not answer before the test ends; the names that it was asked for."""
    release, asked = threading.Event(), list[str]()

    def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        release.wait(HANGS)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield asked
    release.set()
    for thread in resolvers():
        thread.join()


def resolvers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vlmforge-resolver"]


def test_name_resolution_is_inside_the_time_limit(stuck: list[str]) -> None:
    with pytest.raises(ImageFetchError) as caught:
        fetch_bytes("http://a.example/", limits=ImageLimits(timeout_s=0.01), allow_private=False)
    assert caught.value.found == "no whole answer within 0.01 s"
    wait_until(lambda: stuck == ["a.example"])  # its thread may be late


def test_look_ups_that_never_end_do_not_pile_up(stuck: list[str]) -> None:
    for number in range(24):
        with pytest.raises(TimeoutError):
            resolve(f"{number}.example", 80, 0.001)
    wait_until(lambda: len(stuck) == 16)  # a thread may come late to its look-up
    assert len(resolvers()) == 16


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "unknown"), ValueError("odd"), KeyError("x")]
)
def test_what_the_resolver_raises_is_the_callers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*_: object, **__: object) -> object:
        raise error

    assert [address.ip for address in resolve("127.0.0.1", 80, 30)] == ["127.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(type(error)) as caught:
        resolve("a.example", 80, 30)
    assert caught.value is error
