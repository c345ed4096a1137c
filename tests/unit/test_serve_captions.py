# SPDX-License-Identifier: Apache-2.0
"""Images in, captions out: as JSON or as files, one or many, in the order they were sent."""

import asyncio
import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.answer import Piece
from serve.captions import CaptionRequest
from serve.protocol import ApiError, ImageUrl
from serve.request import Job
from serve.routes import Routes
from serve.versions import Entry
from tests.unit.serve_site import DEPLOYMENT, LIMITS, InProcess, make_routes, open_model, png, uri
from tests.waiting import eventually

JSON_BODY = {"content-type": "application/json"}


@pytest.fixture
def backend(tiny_model: Path) -> InProcess:
    return InProcess(tiny_model, open_model(tiny_model))


@pytest.fixture
def client(backend: InProcess) -> Iterator[TestClient]:
    entries = {
        "captioner": Entry(backend.model, created=5, fingerprint="0123"),
        "chat": Entry(
            replace(backend.model, config=replace(DEPLOYMENT, id="chat", instruction=None)),
            created=5,
            fingerprint="0123",
        ),
    }
    with TestClient(Routes(entries, backend, LIMITS).app()) as made:
        yield made


def test_files_and_json_ask_the_same_and_get_the_same(
    client: TestClient, backend: InProcess
) -> None:
    colours = ("teal", "red")
    as_json = client.post("/v1/captions", json={"images": [uri(one) for one in colours]})
    files = [("image", ("x.png", png(one), "image/png")) for one in colours]
    as_files = client.post("/v1/captions", files=files)
    assert as_json.status_code == as_files.status_code == 200, as_files.text
    assert as_json.json()["data"] == as_files.json()["data"]
    assert [one["index"] for one in as_json.json()["data"]] == [0, 1]
    first, second, third, fourth = (one.request for one in backend.jobs)
    assert first.token_ids == third.token_ids and (first.images[0] == third.images[0]).all()
    assert (second.images[0] == fourth.images[0]).all()
    assert not (first.images[0] == second.images[0]).all()


def test_the_models_own_instruction_is_asked_unless_another_is_sent(
    client: TestClient, backend: InProcess
) -> None:
    client.post("/v1/captions", json={"images": uri("teal")})
    client.post("/v1/captions", json={"images": uri("teal"), "instruction": "Describe it."})
    client.post("/v1/captions", json={"images": uri("teal"), "instruction": "Which colour?"})
    default, same, other = (one.request.token_ids for one in backend.jobs)
    assert default == same != other


def test_an_answer_says_tokens_and_what_a_batch_job_would_not_keep(client: TestClient) -> None:
    found = client.post("/v1/captions", json={"images": uri("teal"), "max_tokens": 2}).json()
    (caption,) = found["data"]
    assert caption["finish_reason"] == "length" and "cut_off" in caption["flags"]
    assert caption["tokens"] == found["usage"]["completion_tokens"] == 2
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 2
    assert found["model"] == "captioner"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "images: Field required"),
        ({"images": []}, "images"),
        ({"images": [uri("teal")] * 4}, "at most 3 a call"),
        ({"images": ["https://a.b/c.png"]}, "images.0: .*data: URIs only"),
        ({"images": [uri("teal"), "data:;base64,AAAA"]}, "images.1: .*not an image"),
        ({"images": [uri("teal")], "stream": True}, "stream"),
        ({"images": [uri("teal")], "max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(
    client: TestClient, backend: InProcess, body: dict[str, Any], words: str
) -> None:
    found = client.post("/v1/captions", json=body)
    assert found.status_code == 400
    assert re.search(words, found.json()["error"]["message"])
    assert not backend.jobs


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"rubbish", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\nmuch\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n1\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_a_broken_form_is_400(client: TestClient, content: bytes, kind: str) -> None:
    found = client.post("/v1/captions", content=content, headers={"content-type": kind})
    assert found.status_code == 400, found.text


@pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "utf-16", "x"])
def test_a_form_says_nothing_about_its_charset(client: TestClient, charset: str) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="a\\ud800"\r\n\r\n1\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    found = client.post("/v1/captions", content=content, headers={"content-type": kind})
    assert found.status_code == 400, found.text


def test_more_files_than_are_taken_are_not_read(client: TestClient) -> None:
    files = [("image", ("x.png", png("teal"), "image/png"))] * 4
    found = client.post("/v1/captions", files=files)
    assert found.status_code == 400
    assert "Too many files" in found.json()["error"]["message"]


def test_a_web_page_of_somebody_else_cannot_upload_where_no_key_is_asked_for(
    client: TestClient,
) -> None:
    files = [("image", ("x.png", png("teal"), "image/png"))]
    found = client.post("/v1/captions", files=files, headers={"origin": "https://evil.example"})
    assert found.status_code == 403


def test_a_refusal_of_one_image_is_the_answer(client: TestClient, backend: InProcess) -> None:
    backend.refusal = ApiError(503, "full", code="overloaded", retry_after_s=1)
    backend.refuses_from = 1
    found = client.post("/v1/captions", json={"images": [uri("teal")] * 3})
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")


def test_a_model_that_is_not_there_is_404(client: TestClient) -> None:
    found = client.post("/v1/captions", json={"images": uri("teal"), "model": "none"})
    assert found.status_code == 404
    assert json.loads(found.content)["error"]["code"] == "model_not_found"


def test_of_one_call_no_more_images_are_asked_about_than_the_models_queue_takes(
    tiny_model: Path,
) -> None:
    class Counting(InProcess):
        now = most = 0

        async def complete(self, model_id: str, job: Job) -> Piece:
            self.now += 1
            self.most = max(self.most, self.now)
            piece = await super().complete(model_id, job)
            self.now -= 1
            return piece

    model = open_model(tiny_model)
    backend = Counting(tiny_model, replace(model, config=replace(model.config, max_queued=2)))
    with TestClient(make_routes(backend).app()) as client:
        found = client.post("/v1/captions", json={"images": [uri("teal")] * 3})
    assert (found.status_code, len(found.json()["data"]), backend.most) == (200, 3, 2)


@pytest.mark.parametrize("path", ["/v1/captions", "/v1/chat/completions"])
def test_the_request_body_is_freed_before_generation_ends(tiny_model: Path, path: str) -> None:
    url = uri("teal")

    def is_freed() -> bool:
        gc.collect()  # count reachable objects only, whenever the collector ran last
        return not any(
            (isinstance(one, ImageUrl) and one.url == url)
            or (isinstance(one, CaptionRequest) and url in one.images)
            for one in gc.get_objects()
        )

    class SlowBackend(InProcess):
        async def complete(self, model_id: str, job: Job) -> Piece:
            # A thread of the pool may hold its last arguments for a moment, so this waits. A body
            # that the handler holds is not freed until this call returns, and fails the test.
            await asyncio.to_thread(eventually, is_freed)
            return await super().complete(model_id, job)

    body: dict[str, Any] = {"images": url, "model": "captioner"}
    if path != "/v1/captions":
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": "captioner", "messages": [{"role": "user", "content": [part]}]}
    routes = make_routes(SlowBackend(tiny_model, open_model(tiny_model)))
    with TestClient(routes.app()) as client:
        assert client.post(path, content=json.dumps(body).encode(), headers=JSON_BODY).is_success
