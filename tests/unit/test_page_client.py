# SPDX-License-Identifier: Apache-2.0
"""The page's client: what it sends to the true routes, and what it says when it is refused."""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from serve.page.captions import CaptionCalls, Captioned, Captioner
from serve.page.client import ApiClient, Exchange, Refused, messages
from serve.protocol import ApiError
from tests.unit.serve_site import LIMITS, InProcess, make_routes, open_model, png

ADDRESS = "http://server"
CALLS = CaptionCalls(max_images=3, max_bytes=200_000, max_waits=2)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def client_of(handler: Any) -> ApiClient:
    return ApiClient(ADDRESS, timeout_s=5, transport=httpx2.MockTransport(handler))


def refusing(status: int, body: Any = None, **headers: str) -> ApiClient:
    def handle(_: httpx2.Request) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, str):
            return httpx2.Response(status, text=body, headers=named)
        return httpx2.Response(status, json=body, headers=named)

    return client_of(handle)


@pytest.fixture
def backend(tiny_model: Path) -> InProcess:
    return InProcess(tiny_model, open_model(tiny_model))


@pytest.fixture
def client(backend: InProcess) -> ApiClient:
    transport = httpx2.ASGITransport(make_routes(backend).app())
    return ApiClient(ADDRESS, timeout_s=5, transport=transport)


async def spoken(client: ApiClient, *exchanges: Exchange) -> list[Any]:
    return [one async for one in client.chat("", model="captioner", exchanges=exchanges)]


def test_the_key_goes_with_each_request_and_nowhere_else() -> None:
    seen: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        if len(seen) == 2:
            return httpx2.Response(307, headers={"location": "http://elsewhere.test/"})
        return httpx2.Response(200, json={"data": [{"id": "chat"}, {"id": "captioner"}]})

    client = client_of(handle)
    assert run(client.models(" secret ")) == ["chat", "captioner"]
    with pytest.raises(Refused, match="Temporary Redirect"):
        run(client.models("other"))
    assert [one.headers["authorization"] for one in seen] == ["Bearer secret", "Bearer other"]
    assert {str(one.url) for one in seen} == {f"{ADDRESS}/v1/models"}


@pytest.mark.parametrize("key", ["two words", "\u00e4", "a\nb", "x" * 513])
def test_what_is_no_key_is_not_sent(key: str) -> None:
    client = client_of(lambda request: pytest.fail(f"sent {request.headers}"))
    with pytest.raises(Refused, match="no API key") as caught:
        run(client.models(key))
    assert key not in caught.value.words()


def test_an_answer_comes_in_pieces_and_with_its_count(
    client: ApiClient, backend: InProcess
) -> None:
    async def both() -> tuple[list[Any], Any]:
        found = await spoken(client, Exchange("What is it?", png("teal")))
        return found, await backend.complete("captioner", backend.jobs[0])

    (*pieces, last), whole = run(both())
    assert len(pieces) > 3
    assert (last.text, last.finish_reason) == ("", "stop")
    assert "".join(one.text for one in pieces) == whole.text
    assert last.num_tokens == whole.num_tokens
    assert len(backend.jobs[0].request.images) == 1


def test_a_conversation_is_sent_whole_with_its_image(client: ApiClient, backend: InProcess) -> None:
    first = Exchange("What is it?", png("teal"), answer="a circle")
    run(spoken(client, first, Exchange("Which colour?")))
    assert len(backend.jobs[0].request.images) == 1
    roles = [one["role"] for one in messages([first, Exchange("Which colour?")])]
    assert roles == ["user", "assistant", "user"]


def test_a_question_that_was_stopped_becomes_a_part_of_the_next(
    client: ApiClient, backend: InProcess
) -> None:
    stopped = Exchange("What is it?", png("teal"))
    run(spoken(client, stopped, Exchange("Which colour?")))
    (said,) = messages([stopped, Exchange("Which colour?")])
    assert [part["type"] for part in said["content"]] == ["image_url", "text", "text"]
    assert len(backend.jobs[0].request.images) == 1


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        (Exchange("a", b"no image"), "400: this is not an image; send JPEG, PNG, WEBP, GIF, BMP"),
        (Exchange("a" * 20_000), "400: 20000 characters are more than this model's context"),
    ],
)
def test_what_the_server_says_is_shown_without_the_field_that_it_names(
    client: ApiClient, exchange: Exchange, words: str
) -> None:
    with pytest.raises(Refused) as caught:
        run(spoken(client, exchange))
    assert caught.value.words().startswith(words)


def test_an_error_in_the_middle_of_an_answer_is_told(client: ApiClient, backend: InProcess) -> None:
    backend.error = ApiError(504, "the answer took longer than this server allows")
    with pytest.raises(Refused, match="longer than this server allows"):
        run(spoken(client, Exchange("What is it?")))


def test_an_answer_that_just_ends_is_not_taken_for_a_whole_one() -> None:
    choice = {"index": 0, "delta": {"content": "a ci"}, "finish_reason": None}
    chunk = {"id": "a", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    event = f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"

    def handle(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, text=event, headers={"content-type": "text/event-stream"})

    with pytest.raises(Refused, match="too early"):
        run(spoken(client_of(handle), Exchange("What is it?")))


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (
            refusing(429, {"error": {"message": "used; try again in 7 s"}}, retry_after="7"),
            "429: used; try again in 7 s",
        ),
        (
            refusing(503, {"error": {"message": "the queue is full"}}, retry_after="2"),
            "503: the queue is full (in 2 s)",
        ),
        (refusing(503, "no healthy upstream"), "503: the server said Service Unavailable"),
        (refusing(200, "<html>"), f"what answers at {ADDRESS} is not the server"),
        (refusing(200, {"models": []}), f"what answers at {ADDRESS} is not the server"),
    ],
)
def test_a_refusal_says_how_long_to_wait(client: ApiClient, words: str) -> None:
    with pytest.raises(Refused) as caught:
        run(client.models("key"))
    assert caught.value.words() == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx2.ConnectError("at 10.0.0.7"), f"the server at {ADDRESS} cannot be reached"),
        (httpx2.ReadTimeout("slow"), "did not answer in time"),
    ],
)
def test_a_server_that_is_away_is_told(error: Exception, words: str) -> None:
    def handle(_: httpx2.Request) -> httpx2.Response:
        raise error

    with pytest.raises(Refused, match=words) as caught:
        run(client_of(handle).models("key"))
    assert "10.0.0.7" not in caught.value.words()


async def captioned(captioner: Captioner, *files: Path) -> list[list[Captioned]]:
    return [batch async for batch in captioner.run(files)]


def files_in(folder: Path, *contents: bytes) -> list[Path]:
    made = []
    for index, data in enumerate(contents):
        made.append(folder / f"{index}.png")
        made[-1].write_bytes(data)
    return made


def test_one_bad_image_loses_no_other_and_keeps_its_place(
    client: ApiClient, backend: InProcess, tmp_path: Path
) -> None:
    sent = [png("teal"), b"no image", png("red"), b"", png("blue")]
    files = files_in(tmp_path, *sent)
    batches = run(captioned(Captioner(client, "", CALLS), *files))
    assert [len(one) for one in batches] == [3, 2]
    done = [one for batch in batches for one in batch]
    assert [one.file for one in done] == files
    assert [one.caption is None for one in done] == [False, True, False, True, False]
    assert done[1].error.startswith("400: this is not an image")
    assert done[3].error == "400: the image has 0 bytes"
    assert done[1].record() == {"file": "1.png", "error": done[1].error}
    assert len(backend.jobs) == 3, "what is refused costs no work"


def test_calls_are_as_large_as_the_server_takes(client: ApiClient, tmp_path: Path) -> None:
    # Text after an image does no harm to it; 150 kB do not fit twice into a call.
    large = png("teal") + b" " * 150_000
    files = files_in(tmp_path, large, large, png("red"), png("teal") + b" " * 400_000)
    batches = run(captioned(Captioner(client, "", CALLS), *files))
    assert [len(one) for one in batches] == [1, 2, 1]
    assert batches[2][0].error == f"413: the body has more than {LIMITS.max_body_bytes} bytes"


def test_an_upload_that_is_gone_is_told_of(client: ApiClient, tmp_path: Path) -> None:
    (file,) = files_in(tmp_path, png("teal"))
    ((here, gone),) = run(captioned(Captioner(client, "", CALLS), file, tmp_path / "x.png"))
    assert here.caption is not None
    assert (gone.file.name, gone.caption) == ("x.png", None)
    assert "upload it again" in gone.error


def test_another_instruction_is_sent(client: ApiClient, backend: InProcess, tmp_path: Path) -> None:
    (file,) = files_in(tmp_path, png("teal"))
    own = Captioner(client, "", CALLS)
    other = replace(own, model="captioner", instruction="Which colour?")

    async def both() -> None:
        await captioned(own, file)
        await captioned(other, file)

    run(both())
    first, second = backend.jobs
    assert first.request.token_ids != second.request.token_ids
    with pytest.raises(Refused, match="no model 'x' here"):
        run(captioned(replace(own, model="x"), *files_in(tmp_path, png("teal"), png("red"))))


def busy(times: int, wait_s: int) -> tuple[ApiClient, list[int]]:
    """Return a server that says 429 some times, then answers; and the calls it got."""
    calls: list[int] = []

    def handle(_: httpx2.Request) -> httpx2.Response:
        calls.append(1)
        if len(calls) <= times:
            error = {"error": {"message": f"used; try again in {wait_s} s"}}
            return httpx2.Response(429, json=error, headers={"retry-after": str(wait_s)})
        return httpx2.Response(200, json={"data": [{"caption": "a", "tokens": 1, "flags": []}]})

    return client_of(handle), calls


def test_a_busy_server_is_asked_again_when_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    # The module's own name for it: loops of other threads sleep too.
    own = SimpleNamespace(sleep=sleep, to_thread=asyncio.to_thread)
    monkeypatch.setattr("serve.page.captions.asyncio", own)
    (file,) = files_in(tmp_path, png("teal"))
    client, calls = busy(2, 7)
    ((made,),) = run(captioned(Captioner(client, "", CALLS), file))
    assert (made.record()["caption"], len(calls), waited) == ("a", 3, [7, 7])
    for times, wait_s, asked in ((3, 7, 3), (1, 4000, 1)):
        client, calls = busy(times, wait_s)
        with pytest.raises(Refused, match=f"try again in {wait_s} s"):
            run(captioned(Captioner(client, "", CALLS), file))
        assert len(calls) == asked
