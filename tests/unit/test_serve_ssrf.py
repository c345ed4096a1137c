# SPDX-License-Identifier: Apache-2.0
"""No address that a client names makes this server connect to where it should not.

One host is allowed, `images.example.org`. DNS is faked; every connection that would be opened is
noted, and only the allowed host's public address answers.
"""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpcore
import pytest
from fastapi.testclient import TestClient

from sg4v_ray.core import fetch
from tests.unit.serve_site import LIMITS, png, routes_over

pytestmark = pytest.mark.serving

HOST, PUBLIC, REBOUND = "images.example.org", "93.184.216.34", "rebinding.example.org"
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")
PRIVATE_V4 = (
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.254"),
    *("192.168.1.1", "100.64.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *METADATA[:4],
)
PRIVATE_V6 = (
    *("::1", "::", "fd00::1", "fe80::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::"),
    *("2001:0:7f00:1::", "100::1", "2001:db8::1", METADATA[4]),
)
WRITTEN = (
    *("2130706433", "017700000001", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.1"),
    *("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "0", "localhost"),
    *("localhost.", "LOCALHOST", "metadata.google.internal", "kubernetes.default.svc", "\u2460"),
    *("127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1"),
)
LOOKALIKES = (
    *(f"{HOST}.evil.org", f"evil-{HOST}", f"x.{HOST}", f"{HOST}%2eevil.org", "example.org"),
    *(f"{HOST}%00.evil.org", f"{HOST}\u3002evil.org"),
)
CONFUSED = (
    f"http://{HOST}@127.0.0.1/",
    f"http://user:{HOST}@127.0.0.1/",
    f"http://127.0.0.1@{HOST}/",
    f"http://a:b@{HOST}/",
    f"http://127.0.0.1\\@{HOST}/",
    f"http://{HOST}\\@127.0.0.1/",
    f"http://{HOST}\\.evil.org/",
    f"http:\\\\{HOST}\\",
    f"http://127.0.0.1#@{HOST}/",
    f"http://127.0.0.1?@{HOST}/",
    f"http://127.0.0.1;{HOST}/",
    f"http://{HOST} @127.0.0.1/",
    f"http://{HOST}\t@127.0.0.1/",
    f"http://{HOST}\n@127.0.0.1/",
    f"http:///{HOST}@127.0.0.1/",
    f"http://[::ffff:127.0.0.1]#@{HOST}/",
    f"//{HOST}/",
    "http://",
    "http://[",
    "http://..",
)
SCHEMES = (
    *("file:///etc/passwd", "file://localhost/etc/passwd", "/etc/passwd", "../secret.png"),
    *(f"ftp://{HOST}/a", f"gopher://{HOST}/a", f"dict://{HOST}:11211/", f"ldap://{HOST}/"),
    *("s3://bucket/key", "gs://bucket/key", f"jar:http://{HOST}!/", "tar:0:10:/etc/passwd"),
)
PORTS = tuple(
    f"http://{HOST}:{port}/" for port in (0, 1, 22, 25, 2375, 6379, 8000, 8265, 10250, 65535)
)
DIRECT = (
    *(f"http://{one}/a.png" for one in (*PRIVATE_V4, *WRITTEN, *LOOKALIKES)),
    *(f"http://[{one}]/a.png" for one in PRIVATE_V6),
    *CONFUSED,
    *SCHEMES,
    *PORTS,
)


class Network(httpcore.AsyncNetworkBackend):
    """Notes where somebody connects; the public address answers what it is told to."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.answer = b""

    async def connect_tcp(self, host: str, port: int, **_: Any) -> httpcore.AsyncNetworkStream:
        self.opened.append((host, port))
        return httpcore.AsyncMockStream([self.answer])

    async def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What each name resolves to, one answer after the other; the last one stays."""
    names = {HOST: [PUBLIC]}

    async def look_up(self: object, host: str, port: int, **_: Any) -> list[Any]:
        answers = names.get(host)
        if answers is None:
            raise socket.gaierror("no such host")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", look_up)
    return names


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    monkeypatch.setattr(fetch.httpcore, "AnyIOBackend", lambda: made)
    return made


@pytest.fixture
def client(tiny_model: Path, network: Network, dns: object) -> Iterator[TestClient]:
    limits = replace(LIMITS, allowed_media_domains=(HOST, REBOUND))
    with TestClient(routes_over(tiny_model, limits).app()) as made:
        yield made


def refused(client: TestClient, url: str) -> str:
    found = client.post("/v1/captions", json={"images": [url]})
    assert found.status_code == 400, (url, found.text)
    return str(found.json()["error"]["message"])


def test_there_are_enough_of_them() -> None:
    assert len(set(DIRECT)) + len(PRIVATE_V4) + len(METADATA) >= 120


@pytest.mark.parametrize("url", DIRECT, ids=ascii)
def test_no_address_that_is_not_allowed_is_connected_to(
    client: TestClient, network: Network, url: str
) -> None:
    said = refused(client, url)
    assert network.opened == []
    assert "127.0.0.1" not in said and "resolve" not in said, "nothing of the network is told"


@pytest.mark.parametrize("target", [*PRIVATE_V4, "[::1]", "localhost", f"{HOST}:22", "evil.org"])
def test_no_redirect_leads_there_either(client: TestClient, network: Network, target: str) -> None:
    network.answer = f"HTTP/1.1 302 F\r\nLocation: http://{target}/\r\n\r\n".encode()
    refused(client, f"http://{HOST}/a.png")
    assert set(network.opened) == {(PUBLIC, 80)}


@pytest.mark.parametrize("address", [*PRIVATE_V4, *PRIVATE_V6])
def test_an_allowed_name_that_resolves_there_is_not_connected_to(
    client: TestClient, network: Network, dns: dict[str, list[str]], address: str
) -> None:
    dns[HOST] = [address]
    refused(client, f"http://{HOST}/a.png")
    assert network.opened == []


def test_a_name_whose_answer_changes_is_connected_to_at_the_address_that_was_checked(
    client: TestClient, network: Network, dns: dict[str, list[str]]
) -> None:
    dns[REBOUND] = [PUBLIC, "127.0.0.1"]
    network.answer = b"HTTP/1.1 404 N\r\n\r\n"
    refused(client, f"http://{REBOUND}/a.png")
    assert network.opened == [(PUBLIC, 80)]
    refused(client, f"http://{REBOUND}/a.png")
    assert network.opened == [(PUBLIC, 80)], "the second time it resolves to this machine"


def test_an_image_of_an_allowed_host_is_fetched(client: TestClient, network: Network) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(png('teal'))}\r\n\r\n"
    network.answer = head.encode() + png("teal")
    found = client.post("/v1/captions", json={"images": [f"http://{HOST}/a.png"]})
    assert found.status_code == 200, found.text
    assert network.opened == [(PUBLIC, 80)]


def test_without_allowed_hosts_nothing_is_fetched(tiny_model: Path, network: Network) -> None:
    with TestClient(routes_over(tiny_model).app()) as client:
        assert "data: URIs only" in refused(client, f"http://{HOST}/a.png")
    assert network.opened == []
