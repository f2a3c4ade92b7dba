"""Addresses that clients name instead of a picture's: nobody inside is called."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from running_server import Running, running
from stand_in import stand_in
from vlmforge.server.settings import ServerSettings, server_vision_config

# `{port}` is that of somebody who listens on this machine and must not be called.
INSIDE = """
http://127.0.0.1:{port}/            http://localhost:{port}/            http://LOCALHOST.:{port}/
http://127.1:{port}/                http://127.0.1:{port}/              http://127.255.255.254:{port}/
http://2130706433:{port}/           http://0x7f000001:{port}/           http://0x7f.0.0.1:{port}/
http://017700000001:{port}/         http://0177.0.0.01:{port}/          http://0:{port}/
http://0.0.0.0:{port}/              http://127.0.0.1.:{port}/           http://127.0.0.1%2e:{port}/
http://[::1]:{port}/                http://[::]:{port}/                 http://[0:0:0:0:0:0:0:1]:{port}/
http://[::ffff:127.0.0.1]:{port}/   http://[::ffff:7f00:1]:{port}/      http://[::127.0.0.1]:{port}/
http://[64:ff9b::7f00:1]:{port}/    http://[2002:7f00:1::]:{port}/      http://[::1%25lo]:{port}/
http://a@127.0.0.1:{port}/          http://8.8.8.8@127.0.0.1:{port}/    http://a:b@127.0.0.1:{port}/
http://127.0.0.1:{port}#@8.8.8.8/   http://127.0.0.1:{port}?@8.8.8.8/   http://127.0.0.1:{port}\\@8.8.8.8/
http://127。0。0。1:{port}/            http://①②⑦.0.0.1:{port}/            http://１２７.0.0.1:{port}/
http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/            http://%31%32%37.0.0.1:{port}/      http://127.0.0.1%00.a:{port}/
https://127.0.0.1:{port}/           HTTP://127.0.0.1:{port}/            http:127.0.0.1:{port}/
http:/127.0.0.1:{port}/             http:///127.0.0.1:{port}/           http://\\t127.0.0.1:{port}/
//127.0.0.1:{port}/                 \\\\127.0.0.1:{port}\\a             http:\\\\127.0.0.1:{port}\\a
gopher://127.0.0.1:{port}/_GET      dict://127.0.0.1:{port}/info        ftp://127.0.0.1:{port}/a.png
ws://127.0.0.1:{port}/              ldap://127.0.0.1:{port}/            tftp://127.0.0.1:{port}/a
jar:http://127.0.0.1:{port}/!/a     view-source:http://127.0.0.1:{port} url:http://127.0.0.1:{port}/
http://169.254.169.254/latest/      http://[fd00:ec2::254]/latest/      http://100.100.100.200/latest/
http://2852039166/latest/           http://[::ffff:a9fe:a9fe]/latest/   http://169.254.170.2/v2/
http://10.0.0.1/                    http://172.16.0.1/                  http://192.168.0.1/
http://[fe80::1]/                   http://[fc00::1]/                   http://224.0.0.1/
file:///etc/passwd                  file://localhost/etc/passwd         FILE:///etc/passwd
file:/etc/passwd                    /etc/passwd                         ../../etc/passwd
~/.ssh/id_rsa                       C:\\a.png                           unix:///run/docker.sock
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with (
        stand_in(vision=server_vision_config()) as pipe,
        running([("tiny", pipe)], ServerSettings()) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def inside() -> Iterator[tuple[int, list[str]]]:
    """The port of somebody on this machine, of all its addresses, and who has called."""
    callers: list[str] = []
    with socket.create_server(("", 0), family=socket.AF_INET) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, address = listening.accept()
                except OSError:  # closed
                    return
                callers.append(str(address))
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield listening.getsockname()[1], callers
        listening.shutdown(socket.SHUT_RDWR)


def ask(server: Running, address: str) -> httpx.Response:
    block = {"type": "image_url", "image_url": {"url": address}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [block]}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {server.key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)


def test_nobody_inside_is_called(server: Running, inside: tuple[int, list[str]]) -> None:
    port, callers = inside
    before = list(callers)
    answers = {given: ask(server, given.replace("{port}", str(port))) for given in INSIDE.split()}
    assert callers == before
    for given, found in answers.items():
        assert found.status_code in (400, 422), (given, found.text)
        assert found.json()["error"]["code"] is not None, given
        assert "root:" not in found.text


def test_somebody_inside_is_called_where_that_is_allowed(
    server: Running, inside: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above would notice a call."""
    port, callers = inside
    before = list(callers)
    monkeypatch.setenv("VLMFORGE_ALLOW_PRIVATE_URLS", "1")
    assert ask(server, f"http://127.0.0.1:{port}/").status_code == 422
    assert len(callers) > len(before)
