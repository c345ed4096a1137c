# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes in one process, without Ray.

`tests/with_serve` holds the same application to the wire through Ray Serve.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.protocol import ApiError
from serve.request import ChatModel
from tests.unit.serve_site import DEPLOYMENT, InProcess, make_routes


@pytest.fixture
def backend(tiny_model: Path) -> InProcess:
    chat = replace(DEPLOYMENT, id="chat", instruction=None)
    return InProcess(tiny_model, ChatModel.open(chat, tiny_model))


@pytest.fixture
def client(backend: InProcess) -> Iterator[TestClient]:
    app = make_routes(backend).app()
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def chat(words: str = "What is it?", **fields: Any) -> bytes:
    messages = [{"role": "user", "content": words}]
    return json.dumps({"model": "chat", "messages": messages, **fields}).encode()


def post(client: TestClient, body: bytes | Iterator[bytes], **headers: str) -> Any:
    headers = {"content-type": "application/json", **headers}
    return client.post("/v1/chat/completions", content=body, headers=headers)


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_streaming_says_the_same_as_not_streaming(client: TestClient) -> None:
    whole = post(client, chat()).json()
    stream = post(client, chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = events(stream)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    spoken = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
    assert spoken == whole["choices"][0]["message"]["content"] != ""
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(one["usage"] is None for one in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {one["id"] for one in chunks} == {last["id"]}


def test_a_message_has_the_fields_of_openai_s_and_is_taken_back_as_it_came(
    client: TestClient,
) -> None:
    said = post(client, chat()).json()["choices"][0]["message"]
    assert said == {
        "role": "assistant",
        "content": said["content"],
        "refusal": None,
        "annotations": [],
    }
    turns = [{"role": "user", "content": "What is it?"}, said, {"role": "user", "content": "Why?"}]
    assert post(client, chat(messages=turns)).status_code == 200


def test_without_include_usage_a_stream_has_none(client: TestClient) -> None:
    *chunks, done = events(post(client, chat(stream=True)))
    assert done == "[DONE]"
    assert all("usage" not in one for one in chunks)


def test_a_full_queue_is_a_plain_503_even_for_a_stream(
    client: TestClient, backend: InProcess
) -> None:
    backend.refusal = ApiError(503, "full", code="overloaded", retry_after_s=1)
    response = post(client, chat(stream=True))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["type"] == "server_error"


def test_an_error_inside_a_stream_is_an_event_and_no_done_follows(
    client: TestClient, backend: InProcess
) -> None:
    backend.error = ApiError(504, "too slow", code="timeout")
    *_, last = events(post(client, chat(stream=True)))
    assert last["error"]["code"] == "timeout"


def test_a_bug_is_a_500_that_says_nothing(client: TestClient, backend: InProcess) -> None:
    backend.error = RuntimeError("/secret/path")
    response = post(client, chat())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_an_unknown_model_is_404_everywhere(client: TestClient) -> None:
    for response in (
        post(client, chat(model="gpt-4")),
        client.get("/v1/models/gpt-4"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_the_list_of_models(client: TestClient) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert card == client.get("/v1/models/chat").json()
    assert (card["id"], card["object"], card["created"]) == ("chat", "model", 5)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_is_counted_as_it_arrives(client: TestClient, chunked: bool) -> None:
    body = chat("a" * 500_000)
    content = iter([body[:300_000], body[300_000:]]) if chunked else body
    response = post(client, content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_form_of_a_foreign_page_is_refused(client: TestClient) -> None:
    response = post(client, chat(), **{"content-type": "text/plain"})
    assert response.status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
        ("POST", "/openapi.json", 405),
    ],
)
def test_other_paths_answer_in_the_same_shape(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_health_tells_a_living_process_from_models_that_run_and_models_that_answer(
    client: TestClient, backend: InProcess
) -> None:
    for kind in ("live", "ready", "deep"):
        assert client.get(f"/health/{kind}").status_code == 200
    backend.is_ready = False
    backend.refusal = ApiError(503, "full", retry_after_s=1)
    assert client.get("/health/live").status_code == 200
    for kind in ("ready", "deep"):
        found = client.get(f"/health/{kind}")
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json() == {"status": "unavailable", "models": {"chat": False}}
