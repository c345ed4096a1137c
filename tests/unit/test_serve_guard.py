# SPDX-License-Identifier: Apache-2.0
"""Nothing is reached without a key, and a visit ends however its request ends."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from serve.gate import Gate
from serve.guard import Guard, scope_of
from serve.keys import Key, KeyRing
from serve.protocol import ApiError
from serve.quota import Quotas, Refusal, Ticket
from serve.visit import visit_of

NOW = 20_000 * 86_400.0


class Books:
    """A desk in this process whose clock stands still."""

    def __init__(self) -> None:
        self.quotas, self.left = Quotas(longest_request_s=100.0), []  # type: ignore[var-annotated]
        self.is_away = False

    async def enter(self, key: Key, number: int) -> Ticket | Refusal:
        if self.is_away:
            raise ApiError(503, "away", retry_after_s=1)
        return self.quotas.enter(key.name, key.quota, number, now=NOW)

    async def book(self, key: Key, number: int, tokens: int) -> Refusal | None:
        return self.quotas.book(key.name, key.quota, number, tokens, now=NOW)

    async def leave(self, key: Key, number: int, tokens: int) -> None:
        self.left.append(tokens)
        self.quotas.leave(key.name, number, tokens, now=NOW)


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def client(books: Books, gate: Gate, tmp_path: Path) -> Iterator[TestClient]:
    file = tmp_path / "keys.yaml"
    entries = {
        "plain": "",
        "figures": ", scopes: [metrics]",
        "limited": ", quota: {requests_per_min: 6, tokens_per_min: 6000, concurrency: 1}",
    }
    file.write_text(
        "keys:\n"
        + "".join(
            f"  - {{name: {name}, sha256: {hashlib.sha256(name.encode()).hexdigest()}{more}}}\n"
            for name, more in entries.items()
        )
    )
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.get("/v1/who")
    async def who(request: Request) -> Any:
        visit = visit_of(request.state)
        await visit.book(400)
        visit.prompt_tokens, visit.made = 20, 10
        return {"name": visit.key and visit.key.name}

    @app.get("/v1/much")
    async def much(request: Request) -> None:
        await visit_of(request.state).book(10**9)

    @app.get("/v1/owing")
    async def owing(request: Request) -> None:
        await visit_of(request.state).book(3000)
        await visit_of(request.state).book(1)

    @app.get("/v1/bug")
    async def bug() -> None:
        raise RuntimeError

    @app.get("/v1/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    @app.get("/health/live")
    async def live() -> str:
        return "figures"

    guard = Guard(app, ring=KeyRing(file=str(file)), desk=books, gate=gate)
    with TestClient(guard, raise_server_exceptions=False) as made:
        yield made


def get(client: TestClient, path: str, key: str | None = None, **headers: str) -> Any:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return client.get(path, headers=headers)


@pytest.mark.parametrize(
    "path",
    ["/v1/who", "/health/live", "/nothing", "/docs", "/openapi.json", "/v1/who/../who", "//"],
)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer nobody", "Basic plain", "plain", "Bearer " * 99],
)
def test_no_path_is_open(client: TestClient, path: str, header: str | None) -> None:
    found = client.get(path, headers={} if header is None else {"authorization": header})
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"
    assert found.json()["error"]["code"] == "invalid_api_key"


def test_a_host_header_opens_nothing(client: TestClient) -> None:
    for host in ("x/health", "x?/-/healthz", "127.0.0.1#", "user@x"):
        assert get(client, "/v1/who", host=host).status_code == 401


def test_a_key_opens_what_its_scopes_name(client: TestClient) -> None:
    assert get(client, "/v1/who", "plain").json() == {"name": "plain"}
    assert get(client, "/health/live", "figures").status_code == 200
    for path, key in (("/health/live", "plain"), ("/v1/who", "figures"), ("/nothing", "figures")):
        assert get(client, path, key).status_code == 403
    assert get(client, "/nothing", "plain").status_code == 404


def test_paths_below_a_guarded_one_are_guarded_and_those_that_only_look_alike_are_not() -> None:
    assert (scope_of("/health"), scope_of("/health/x")) == ("metrics", "metrics")
    assert (scope_of("/healthx"), scope_of("/v1/health")) == ("inference", "inference")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1", "abc-1"), ("a b", "a_b"), ("x" * 200, "x" * 128), ("a\tb", "a_b"), ("<b>", "_b_")],
)
def test_a_request_keeps_its_id_as_far_as_a_log_can_have_it(
    client: TestClient, sent: str, kept: str
) -> None:
    found = get(client, "/v1/who", "plain", **{"x-request-id": sent})
    assert found.headers["x-request-id"] == kept


def test_every_request_has_an_id(client: TestClient) -> None:
    assert get(client, "/v1/who", "plain").headers["x-request-id"].startswith("req-")
    assert get(client, "/v1/who").headers["x-request-id"], "of a refusal too"


def test_what_is_left_of_a_quota_is_told(client: TestClient, books: Books) -> None:
    found = get(client, "/v1/who", "limited")
    assert found.headers["x-ratelimit-limit-requests"] == "6"
    assert found.headers["x-ratelimit-remaining-requests"] == "1"
    assert found.headers["x-ratelimit-remaining-tokens"] == "1000"
    assert books.left == [30], "what was used, not what was booked"
    last = get(client, "/v1/who", "limited")
    assert last.headers["x-ratelimit-remaining-requests"] == "0"
    refused = get(client, "/v1/who", "limited")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "10"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_key_without_a_quota_needs_no_books(client: TestClient, books: Books) -> None:
    books.is_away = True
    assert get(client, "/v1/who", "plain").status_code == 200
    away = get(client, "/v1/who", "limited")
    assert (away.status_code, away.headers["retry-after"]) == (503, "1"), "nobody slips through"


@pytest.mark.parametrize("path", ["/v1/who", "/v1/bug", "/v1/stream", "/nothing"])
def test_a_visit_ends_however_its_request_ends(client: TestClient, books: Books, path: str) -> None:
    get(client, path, "limited")
    assert len(books.left) == 1


def test_a_key_that_owes_tokens_waits_and_one_without_a_quota_does_not(client: TestClient) -> None:
    assert get(client, "/v1/much", "plain").status_code == 200, "no quota, no limit"
    owing = get(client, "/v1/owing", "limited")
    assert (owing.status_code, owing.headers["retry-after"]) == (429, "20")
    assert "used its tokens" in owing.json()["error"]["message"]


def test_where_no_keys_are_asked_for_everybody_gets_in(books: Books) -> None:
    app = FastAPI()

    @app.get("/v1/who")
    async def who() -> str:
        return "anybody"

    with TestClient(Guard(app, ring=None, desk=books), base_url="http://localhost") as client:
        assert get(client, "/v1/who").status_code == 200
        for host in ("127.0.0.1:8000", "LOCALHOST:8000", "[::1]:8000"):
            assert get(client, "/v1/who", host=host).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1@evil", "[", ""):
            found = get(client, "/v1/who", host=host)
            assert found.status_code == 403, "a page whose name means this machine is no friend"
            assert "auth.keys_file" in found.json()["error"]["message"]


def test_who_leaves_while_it_is_counted_keeps_no_place(books: Books, tmp_path: Path) -> None:
    """The desk counted it, and the answer is never heard."""
    file = tmp_path / "keys.yaml"
    sha256 = hashlib.sha256(b"one").hexdigest()
    file.write_text(f"keys:\n  - {{name: one, sha256: {sha256}, quota: {{concurrency: 1}}}}\n")
    key = KeyRing(file=str(file)).find("one")
    assert key is not None
    enter = books.enter

    async def unheard(key: Key, number: int) -> Ticket | Refusal:
        await enter(key, number)
        raise asyncio.CancelledError

    async def call() -> None:
        guard = Guard(FastAPI(), ring=KeyRing(file=str(file)), desk=books)
        scope = {
            "type": "http",
            "path": "/v1/models",
            "headers": [(b"authorization", b"Bearer one")],
        }
        with pytest.raises(asyncio.CancelledError):
            await guard(scope, None, None)  # type: ignore[arg-type]

    books.enter = unheard  # type: ignore[method-assign]
    asyncio.run(call())
    assert isinstance(asyncio.run(enter(key, 1)), Ticket)


def test_a_socket_is_not_opened(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/who"):
        pass


@pytest.mark.parametrize("name", ["X-Request-Timeout-Seconds", "x-request-disconnect-disabled"])
def test_nobody_tells_serve_to_work_on_without_end(client: TestClient, name: str) -> None:
    found = get(client, "/v1/who", "plain", **{name: "0"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, name.lower())


def test_a_server_that_stops_lives_and_sends_who_comes_elsewhere(
    client: TestClient, gate: Gate
) -> None:
    asyncio.run(gate.close())
    found = get(client, "/v1/who", "plain")
    assert (found.status_code, found.json()["error"]["code"]) == (503, "stopping")
    assert int(found.headers["retry-after"]) > 0
    assert get(client, "/health/live", "figures").status_code == 200
    assert get(client, "/health/ready", "figures").status_code == 503
    assert get(client, "/v1/who").status_code == 401, "without a key nothing is told"


def test_a_gate_is_closed_when_the_last_one_is_through() -> None:
    async def body() -> None:
        gate = Gate()
        with gate.passing():
            with gate.passing():
                closing = asyncio.create_task(gate.close())
                await asyncio.sleep(0)
                with pytest.raises(ApiError, match="stopping"), gate.passing():
                    pass
            await asyncio.sleep(0)
            assert not closing.done()
        await closing

    asyncio.run(body())
