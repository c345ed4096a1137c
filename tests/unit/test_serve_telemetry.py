# SPDX-License-Identifier: Apache-2.0
"""What is told of a request: enough to run a service, and nothing that was asked or answered."""

import asyncio
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.answer import Piece
from serve.choices import Listener
from serve.guard import Guard
from serve.telemetry import LogOnly, line, status_of
from serve.visit import Visit
from tests.unit.serve_site import (
    LIMITS,
    InProcess,
    make_routes,
    open_model,
    routes_over,
    uri,
)
from tests.unit.test_serve_guard import Books

SECRET = "the harbour at dawn"
URL = "http://localhost"


class Recorder(LogOnly):
    """Keeps every visit."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []

    def ended(self, visit: Visit) -> None:
        super().ended(visit)
        self.visits.append(visit)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def app(tiny_model: Path, recorder: Recorder) -> Guard:
    return Guard(routes_over(tiny_model).app(), ring=None, desk=Books(), telemetry=recorder)


def body(**more: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": uri("teal")}}
    content = [image, {"type": "text", "text": SECRET}]
    return {"model": "captioner", "messages": [{"role": "user", "content": content}], **more}


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_who_what_how_much_and_how_long(
    app: Guard, recorder: Recorder, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="serve.requests"),
        TestClient(app, base_url=URL) as client,
    ):
        sent = client.post(
            "/v1/chat/completions", json=body(stream=stream), headers={"x-request-id": "r-1"}
        )
    assert sent.status_code == 200
    (record,) = (one for one in caplog.records if one.name == "serve.requests")
    said = json.loads(record.message)
    assert (said["id"], said["route"], said["model"]) == (
        "r-1",
        "/v1/chat/completions",
        "captioner",
    )
    assert (said["status"], said["images"]) == (200, 1)
    assert said["prompt_tokens"] > 0 and said["completion_tokens"] > 0
    assert 0 < said["ttft_s"] <= said["e2e_s"]
    assert said["finish_reason"] in ("stop", "length")
    assert SECRET not in caplog.text and "base64" not in caplog.text


def test_a_stream_has_a_gap_between_each_two_pieces(app: Guard, recorder: Recorder) -> None:
    with TestClient(app, base_url=URL) as client:
        client.post("/v1/chat/completions", json=body(stream=True, max_tokens=8))
    (visit,) = recorder.visits
    assert visit.made == 8 and 0 < len(visit.gaps_s) < 8


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [("/v1/none", {}, 404), ("/v1/captions", {"images": ["x"]}, 400)],
)
def test_a_refusal_is_told_too(
    app: Guard, recorder: Recorder, path: str, sent: dict[str, Any], status: int
) -> None:
    with TestClient(app, base_url=URL) as client:
        client.post(path, json=sent)
    (visit,) = recorder.visits
    assert status_of(visit) == status
    assert (visit.prompt_tokens, visit.made) == (0, 0)


def test_paths_that_do_not_exist_share_one_label(app: Guard, recorder: Recorder) -> None:
    with TestClient(app, base_url=URL) as client:
        for path in ("/a", "/b/c", "/v1/models/x"):
            client.get(path)
    assert {one.route for one in recorder.visits} == {"none", "/v1/models/{model_id}"}


def test_a_client_that_does_not_wait_for_the_end_is_499(app: Guard, recorder: Recorder) -> None:
    async def call() -> None:
        data = json.dumps(body(stream=True)).encode()
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "state": {},
        }  # fmt: skip
        messages = [{"type": "http.request", "body": data}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            pass

        await app(scope, receive, send)

    asyncio.run(call())
    (visit,) = recorder.visits
    assert line(visit)["status"] == 499


def test_a_body_that_does_not_come_is_408(tiny_model: Path, recorder: Recorder) -> None:
    async def call() -> list[Any]:
        scope = {
            "type": "http", "method": "POST", "path": "/v1/captions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "state": {},
        }  # fmt: skip
        said, first = [], [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            return first.pop(0) if first else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            said.append(message)

        await guard(scope, receive, send)
        return said

    routes = routes_over(tiny_model, replace(LIMITS, body_timeout_s=0.05))
    guard = Guard(routes.app(), ring=None, desk=Books(), telemetry=recorder)
    said = asyncio.run(call())
    assert said[0]["status"] == 408
    assert b"body_too_slow" in said[1]["body"]


def test_a_bug_is_told_as_one(tiny_model: Path, recorder: Recorder) -> None:
    backend = InProcess(tiny_model, open_model(tiny_model))
    backend.error = RuntimeError("/secret/path")
    app = make_routes(backend).app()
    app.add_middleware(partial(Guard, ring=None, desk=Books(), telemetry=recorder))
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as client:
        found = client.post("/v1/captions", json={"images": [uri("teal")]})
    assert found.status_code == 500
    (visit,) = recorder.visits
    assert (status_of(visit), visit.route) == (500, "/v1/captions")


def test_what_found_no_room_costs_its_key_nothing() -> None:
    visit = Visit(request_id="r", prompt_tokens=600, booked=1000, made=3, is_whole=True)
    assert visit.tokens == 603
    visit.status = 503
    assert visit.tokens == 0


@pytest.mark.parametrize(("status", "is_whole"), [(0, False), (200, False), (504, True)])
def test_what_was_made_for_nobody_costs_what_it_may_have_been(status: int, is_whole: bool) -> None:
    """Else a quota is passed by whoever leaves early and asks again."""
    visit = Visit(request_id="r", prompt_tokens=600, booked=1000, status=status, is_whole=is_whole)
    assert visit.tokens == 1000
    Listener(visit).hear(0, Piece("a", 7))
    assert visit.tokens == 607, "of a stream it is known"
