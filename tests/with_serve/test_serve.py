# SPDX-License-Identifier: Apache-2.0
"""The application over real HTTP through Ray Serve, with OpenAI's own client.

The engines are fake. What is refused, and with which words, is in `tests/unit/test_serve_*`.
"""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import ray
from PIL import Image
from ray.exceptions import RayTaskError

from serve.app import model_options
from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.ingress import as_api_errors
from serve.protocol import ApiError
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import EngineError
from sg4v_ray.core.records import Turn
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.conversation import Conversation
from tests.waiting import eventually
from tests.with_serve.conftest import KEY, LIMITED, READER, SILENT_S

if TYPE_CHECKING:
    from tests.with_serve.conftest import Server

WAIT_S = 10.0
AUTH = {"authorization": f"Bearer {KEY}"}


def uri() -> str:
    data = BytesIO()
    Image.new("RGB", (30, 20), "teal").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def ask(words: str, *, url: str | None = None) -> list[Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if url is not None:
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def running(server: "Server", model_id: str) -> int:
    stats = server.handle(model_id).stats.remote().result(timeout_s=WAIT_S)
    return int(stats.running + stats.waiting)


def test_both_models_are_listed(server: "Server") -> None:
    models = {one.id: one for one in server.client.models.list()}
    assert set(models) == {"captioner", "slow"}
    assert server.client.models.retrieve("slow") == models["slow"]


def test_a_chat_with_an_image(server: "Server", tiny_model: Path) -> None:
    answer = server.client.chat.completions.create(
        model="captioner", messages=ask("What is it?", url=uri()), max_tokens=12
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    prompt = Conversation.open(tiny_model, "vicuna_v1").prompt(
        [Turn(role="user", text="What is it?")], num_images=1
    )
    assert answer.usage.prompt_tokens == len(prompt.token_ids) + 3  # an image takes 4 tokens


def test_streaming_says_the_same_as_not_streaming(server: "Server") -> None:
    question: dict[str, Any] = {"model": "captioner", "messages": ask("Describe.", url=uri())}
    whole = server.client.chat.completions.create(**question)
    stream = server.client.chat.completions.create(
        **question, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    spoken = "".join(one.choices[0].delta.content or "" for one in chunks)
    assert spoken == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)


def test_several_turns(server: "Server") -> None:
    first = ask("What is it?", url=uri())
    answer = server.client.chat.completions.create(model="captioner", messages=first)
    second = server.client.chat.completions.create(
        model="captioner",
        messages=[*first, answer.choices[0].message, *ask("What colour?")],  # type: ignore[list-item]
    )
    assert answer.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > answer.usage.total_tokens


def test_a_typed_image_token_is_text_and_no_image(server: "Server") -> None:
    answer = server.client.chat.completions.create(
        model="captioner", messages=ask("What is <image> here?"), max_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"


def test_nothing_is_answered_without_a_key(server: "Server") -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/", "/docs", "/openapi.json", "/-/x"):
        for headers in ({}, {"authorization": "Bearer none"}, {"host": "127.0.0.1:1"}):
            found = httpx.get(server.url + path, headers=headers)
            assert found.status_code == 401, path
            assert found.json()["error"]["code"] == "invalid_api_key"
        found = httpx.get(server.url + path, headers={"host": "127.0.0.1/-/healthz"})
        assert found.status_code == 400, "no host; refused by the proxy"
    assert httpx.get(f"{server.url}/-/healthz").status_code == 200, "the proxy's own"


def test_a_client_that_goes_silent_within_a_request_is_sent_away(server: "Server") -> None:
    """It has no key yet, and its place is one of a few thousand."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=4 * SILENT_S) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: ")
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_key_gets_its_quota_and_is_told_when_to_come_back(server: "Server") -> None:
    client = server.client.with_options(api_key=LIMITED)
    first = client.chat.completions.with_raw_response.create(model="captioner", messages=ask("A"))
    assert first.headers["x-ratelimit-limit-requests"] == "6"
    assert first.headers.get_list("x-request-id") == [first.headers["x-request-id"]]
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(3):
            client.chat.completions.create(model="captioner", messages=ask("A"))
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 10
    assert server.client.models.list().data, "other keys go on"


def test_health_is_asked_with_a_key_for_figures(server: "Server") -> None:
    headers = {"authorization": f"Bearer {READER}"}
    for kind in ("live", "ready", "deep"):
        found = httpx.get(f"{server.url}/health/{kind}", headers=headers, timeout=WAIT_S)
        assert found.status_code == 200, found.text
    assert found.json()["models"] == {"captioner": True, "slow": True}
    assert httpx.get(f"{server.url}/health/live", headers=AUTH).status_code == 403


def test_a_key_for_figures_asks_no_model(server: "Server") -> None:
    with pytest.raises(openai.PermissionDeniedError, match="no scope 'inference'"):
        server.client.with_options(api_key=READER).models.list()


def test_an_unknown_model_is_404(server: "Server") -> None:
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        server.client.chat.completions.create(model="gpt-4", messages=ask("Hello"))


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/a.png", "invalid_image_url"),
        ("data:image/png;base64,aGVsbG8=", "not_an_image"),
    ],
)
def test_a_bad_image_is_400_and_the_next_request_is_answered(
    server: "Server", url: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="captioner", messages=ask("a", url=url))
    assert caught.value.code == code
    assert server.client.chat.completions.create(
        model="captioner", messages=ask("What is it?", url=uri()), max_tokens=1
    ).choices


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_413(server: "Server", chunked: bool) -> None:
    body = json.dumps({"model": "captioner", "messages": ask("a" * 3_000_000)}).encode()

    def in_pieces() -> Iterator[bytes]:
        for i in range(0, len(body), 500_000):
            yield body[i : i + 500_000]

    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=in_pieces() if chunked else body,
        headers={**AUTH, "content-type": "application/json"},
        timeout=WAIT_S,
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(server: "Server", stream: bool) -> None:
    body = {"model": "slow", "messages": ask(f"Slowly, {stream}", url=uri()), "stream": stream}
    url = f"{server.url}/v1/chat/completions"
    if stream:
        with httpx.stream("POST", url, json=body, headers=AUTH, timeout=WAIT_S) as response:
            lines = response.iter_lines()  # httpx hangs up when this is collected
            next(lines)
            assert running(server, "slow") == 1
    else:
        with _asked(server, body):
            eventually(lambda: running(server, "slow") == 1)
    # By itself the answer would go on for longer than this waits: 8 tokens or more of 2 s each.
    eventually(lambda: running(server, "slow") == 0)


def _asked(server: "Server", body: dict[str, Any]) -> socket.socket:
    """Return the connection of a request whose body came after its head, as HAProxy 2.8 reads it:
    with `splice-request` it does not see such a client go before the answer begins."""
    data = json.dumps(body).encode()
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=WAIT_S)
    head = {
        **AUTH,
        "host": "localhost",
        "content-type": "application/json",
        "content-length": len(data),
        "expect": "100-continue",
    }
    lines = [f"{name}: {value}\r\n" for name, value in head.items()]
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{''.join(lines)}\r\n".encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    connection.sendall(data)
    return connection


def test_a_full_queue_is_503_with_a_time_to_come_back(server: "Server") -> None:
    body = {"model": "slow", "messages": ask("Slowly"), "stream": True}
    url = f"{server.url}/v1/chat/completions"
    refusals: list[httpx.Response] = []
    answers: list[httpx.Response] = []

    def post() -> None:
        response = httpx.post(url, json={**body, "max_tokens": 1}, headers=AUTH, timeout=30)
        (answers if response.is_success else refusals).append(response)

    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(headers=AUTH, timeout=WAIT_S))
        for _ in range(2):  # as many as the replica takes
            stream = stack.enter_context(client.stream("POST", url, json=body)).iter_lines()
            stack.callback(stream.close)  # type: ignore[attr-defined]
            next(stream)
        others = [threading.Thread(target=post) for _ in range(3)]
        for one in others:
            one.start()
        eventually(lambda: len(refusals) == 2)
    for one in others:
        one.join()
    assert len(answers) == 1  # it had waited in the queue
    for refusal in refusals:
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert refusal.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        pytest.param(EngineError("at 0x7f"), 503, "unavailable", id="dead engine"),
        pytest.param(TimeoutError("at 0x7f"), 504, "timeout", id="deadline"),
    ],
)
def test_an_error_of_a_replica_is_told_in_our_words(
    error: Exception, status: int, code: str
) -> None:
    arrived = RayTaskError("stream", "traceback", error).as_instanceof_cause()
    with pytest.raises(ApiError) as caught, as_api_errors():
        raise arrived
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "0x7f" not in caught.value.message


def test_a_replica_that_is_stopped_may_finish_its_longest_answer() -> None:
    model = ModelDeployment(
        id="chat",
        artifact=Ref(name="vlm"),
        root="/runs",
        template="vicuna_v1",
        geometry="pad",
        engine=EngineConfig(kind="fake"),
        generation=Generation(max_tokens=8),
        max_replicas=4,
    )
    options = model_options(model, Limits(timeout_s=100))
    assert options["graceful_shutdown_timeout_s"] > 100
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert "num_replicas" not in options


def test_captions_of_uploaded_images_come_in_their_order(server: "Server") -> None:
    data = BytesIO()
    Image.new("RGB", (30, 20), "teal").save(data, "PNG")
    files = [("image", ("x.png", data.getvalue(), "image/png"))] * 2
    found = httpx.post(f"{server.url}/v1/captions", files=files, headers=AUTH, timeout=WAIT_S)
    assert found.status_code == 200, found.text
    assert [one["index"] for one in found.json()["data"]] == [0, 1]
    assert found.json()["usage"]["completion_tokens"] > 0


def test_requests_are_counted_where_prometheus_looks(server: "Server") -> None:
    server.client.chat.completions.create(model="captioner", messages=ask("Which?", url=uri()))
    (node,) = ray.nodes()
    place = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def counted() -> bool:
        text = httpx.get(place).text
        lines = [one for one in text.splitlines() if one.startswith("ray_sg4v_serve_")]
        return all(
            any(one.startswith(f"ray_sg4v_serve_{name}") and words in one for one in lines)
            for name, words in (
                ("requests_total", 'route="/v1/chat/completions"'),
                ("time_to_first_token_seconds", 'model="captioner"'),
                ("images_total", 'source="data"'),
                ("requests_rejected_total", 'reason="auth"'),
            )
        )

    eventually(counted, within_s=40.0)
