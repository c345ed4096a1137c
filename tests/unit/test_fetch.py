# SPDX-License-Identifier: Apache-2.0
"""The HTTP fetcher: only allowed hosts, only checked addresses, capped bytes and seconds."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.fetch import ByteBudget, FetchConfig, Fetcher, is_public
from sg4v_ray.core.images import Rejected
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.retry import RetryPolicy

QUICK = RetryPolicy(max_tries=3, first_delay_s=0.001)


class Site(ThreadingHTTPServer):
    """A web server whose paths say what it does; it counts its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.held = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests.append(path)
        if path == "image":
            self.answer(200, b"image bytes")
        elif path == "busy-once":
            is_first = self.server.requests.count(path) == 1
            self.answer(503 if is_first else 200, b"at last")
        elif path.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("to/"))
            self.end_headers()
        elif path == "endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
        elif path == "silent":
            self.server.held.wait(20)
        elif path.isdigit():
            self.answer(int(path), b"x" * 5000)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.held.set()
    site.shutdown()
    site.server_close()


def get(url: str, config: FetchConfig | None = None, *, max_bytes: int = 1000) -> bytes | Rejected:
    config = config or FetchConfig(allow_private_hosts=("127.0.0.1",), retry=QUICK)

    async def run() -> bytes | Rejected:
        fetcher = Fetcher(config)
        try:
            return await fetcher.get(url, max_bytes=max_bytes)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def reason(found: bytes | Rejected) -> Reject:
    assert isinstance(found, Rejected), found
    return found.reason


def test_an_image_is_fetched(site: Site) -> None:
    assert get(site.url("image")) == b"image bytes"


def test_a_busy_server_is_asked_again(site: Site) -> None:
    assert get(site.url("busy-once")) == b"at last"
    assert len(site.requests) == 2


@pytest.mark.parametrize(
    ("path", "wanted", "calls"),
    [
        pytest.param("404", Reject.MISSING, 1, id="not found is final"),
        pytest.param("403", Reject.HTTP_ERROR, 1, id="forbidden is final"),
        pytest.param("503", Reject.HTTP_ERROR, 3, id="busy to the end"),
        pytest.param("200", Reject.TOO_MANY_BYTES, 1, id="told to be too large"),
        pytest.param("endless", Reject.TOO_MANY_BYTES, 1, id="too large without telling"),
        pytest.param("to//to//to//image", None, 4, id="a few redirects"),
    ],
)
def test_an_answer_that_is_no_image_has_a_reason(
    site: Site, path: str, wanted: Reject | None, calls: int
) -> None:
    found = get(site.url(path))
    if wanted is None:
        assert found == b"image bytes"
    else:
        assert reason(found) is wanted
    assert len(site.requests) == calls


def test_redirects_end(site: Site) -> None:
    config = FetchConfig(allow_private_hosts=("127.0.0.1",), max_redirects=1, retry=QUICK)
    assert reason(get(site.url("to//to//image"), config)) is Reject.HTTP_ERROR


def test_a_silent_server_costs_its_time_and_no_more(site: Site) -> None:
    config = FetchConfig(
        allow_private_hosts=("127.0.0.1",), timeout_s=0.2, retry=RetryPolicy(max_tries=1)
    )
    assert reason(get(site.url("silent"), config)) is Reject.TIMED_OUT


def test_no_host_is_allowed_by_default(site: Site) -> None:
    assert reason(get(site.url("image"), FetchConfig())) is Reject.HOST_NOT_ALLOWED
    assert site.requests == []


def test_every_public_host_does_not_mean_private_addresses(site: Site) -> None:
    config = FetchConfig(allow_hosts=("*",), retry=QUICK)
    for url in (site.url("image"), site.url("image").replace("127.0.0.1", "localhost")):
        found = get(url, config)
        assert reason(found) is Reject.HOST_NOT_ALLOWED
        assert "not public" in found.detail
    assert site.requests == []


def test_a_redirect_is_checked_like_a_first_url(site: Site) -> None:
    found = get(site.url("to/http://localhost/secret"))
    assert reason(found) is Reject.HOST_NOT_ALLOWED


@pytest.mark.parametrize(
    "url", ["ftp://a.org/1", "http://", "http://[::bad/", "file:///etc/passwd"]
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    assert reason(get(url)) is Reject.HOST_NOT_ALLOWED


def test_a_host_below_an_allowed_domain(site: Site) -> None:
    config = FetchConfig(allow_hosts=(".example.org",), retry=RetryPolicy(max_tries=1))
    assert reason(get("http://badexample.org/", config)) is Reject.HOST_NOT_ALLOWED
    refused = "not in allow_hosts"
    found = get("http://images.example.org.invalid/", config)
    assert isinstance(found, Rejected)
    assert refused in found.detail


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),  # cloud metadata
        ("192.0.0.192", False),  # cloud metadata
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fd00::1", False),
        ("fe80::1%eth0", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),  # NAT64 of 127.0.0.1
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host",
    [
        "https://a.org",
        "a.org:80",
        "a.org/path",
        "*.a.org",
        "a.org.",
        "",
        ".",
        "a b.org",
        "x@a.org",
        "bü_cher.org",
    ],
)
def test_a_host_is_a_name_and_nothing_else(host: str) -> None:
    with pytest.raises(ConfigError, match="host names"):
        FetchConfig(allow_hosts=(host,))


@pytest.mark.parametrize("port", ["99999", "70000/x"])
def test_a_port_that_no_host_has_is_a_reason(site: Site, port: str) -> None:
    assert reason(get(f"http://127.0.0.1:{port}")) is Reject.HTTP_ERROR
    assert reason(get(site.url(f"to/http://127.0.0.1:{port}"))) is Reject.HTTP_ERROR


def test_several_bodies_share_one_budget(site: Site) -> None:
    async def body() -> list[bytes | Rejected]:
        fetcher = Fetcher(FetchConfig(allow_private_hosts=("127.0.0.1",), retry=QUICK))
        budget = ByteBudget(left=2 * len(b"image bytes"))
        urls = [site.url("image")] * 3
        try:
            return [await fetcher.get(url, max_bytes=1000, budget=budget) for url in urls]
        finally:
            await fetcher.close()

    first, second, third = asyncio.run(body())
    assert first == second == b"image bytes"
    assert isinstance(third, Rejected) and third.reason is Reject.TOO_MANY_BYTES


@pytest.mark.parametrize("allowed", ["bücher.example", "xn--bcher-kva.example", ".EXAMPLE"])
@pytest.mark.parametrize("asked", ["bücher.example", "xn--bcher-kva.example", "BÜCHER.example."])
def test_a_name_in_any_alphabet_is_the_same_host(
    allowed: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def nobody(host: str, *_: object, **__: object) -> list[object]:
        seen.append(host)
        return [(0, 0, 0, "", ("10.0.0.1", 80))]

    async def body() -> bytes | Rejected:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", nobody)
        fetcher = Fetcher(FetchConfig(allow_hosts=(allowed,), retry=RetryPolicy(max_tries=1)))
        return await fetcher.get(f"http://{asked}/", max_bytes=9)

    found = asyncio.run(body())
    assert isinstance(found, Rejected) and "not public" in found.detail
    assert [one.rstrip(".") for one in seen] == ["xn--bcher-kva.example"]
